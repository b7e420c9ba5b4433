"""Laws on classes: what they refuse, and what they import."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.conformance.case import BESIDE, Case, Subject, Violation
from trainable_core.conformance.law import law, require
from trainable_core.conformance.strategies import Kind
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import TrainableError

FRAMEWORKS = ("jax", "keras", "tensorflow", "tf_keras", "torch")
REPORT = """
import importlib, json, runpy, sys
for name in {dependencies!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
before = set(sys.modules)
{load}
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.__stdout__)
"""


def _refused(what: str, call: Callable[[], Any]) -> None:
    """Require that a call raises an error of the library."""
    try:
        got = call()
    except TrainableError:
        return
    except Exception as error:
        raise Violation(what, "a TrainableError", f"{type(error).__name__}: {error}") from error
    raise Violation(what, "a TrainableError", f"nothing raised, {type(got).__name__} returned")


@law(
    "A mistake that is reported when the quantizer is built costs a second; after training it costs the whole run.",
    kind=Kind(least=1),
)
def refusals(subject: Subject, case: Case) -> None:
    """What the class can't do is refused with an error of the library."""
    cls, adapter, config = subject.cls, subject.adapter, case.config
    fields = config.model_dump()
    other, prefix = (
        (TrainableQuantizerActivationConfig, "activation")
        if subject.weights
        else (TrainableQuantizerWeightsConfig, "weights")
    )
    foreign = other.model_validate(
        {
            f"{prefix}_quantization_method": subject.key.method,
            f"{prefix}_n_bits": 4,
            f"{prefix}_quantization_params": {},
        }
    )
    _refused("a config for the other target", lambda: cls(foreign))
    _refused("a config that is a dict", lambda: cls(fields))
    refused = False
    try:
        cls(config, **{**case.arguments, UNKNOWN_OPTION: 1})
    except Exception:  # noqa: BLE001 - Python's own TypeError says it well
        refused = True
    require("an option that the class doesn't have", refused, "an error", "nothing raised")
    marked = {method.name for method in cls.quantization_method}
    for method in QuantizationMethod:
        if method.name not in marked:
            unmarked = type(config).model_validate(
                {
                    f"{config.prefix}_quantization_method": method,
                    f"{config.prefix}_n_bits": 4,
                    f"{config.prefix}_quantization_params": {},
                }
            )
            _refused(f"a grid that the class is not marked with, {method}", functools.partial(_build, cls, unmarked))
    if not subject.method.computes_grid:
        bare = type(config).model_validate({**fields, f"{config.prefix}_quantization_params": {}})
        waiting = subject.fresh(case, bare)
        _refused("a call before calibration", lambda: subject.values(waiting, case.x))
        _refused("deploying before calibration", waiting.convert2inferable)
    axis = config.channels_axis if config.blocks is None else config.blocks.axes[-1]
    if axis is not None:
        _refused("a channel axis outside the tensor", lambda: adapter.build(cls, config, (), case.arguments))
        given = [
            value for key, value in config.quantization_params.items() if isinstance(value, list) and key not in BESIDE
        ]
        if given and len(given[0]) > 1:
            wrong = list(case.x.shape)
            wrong[axis] += 1
            _refused("another number of channels", lambda: adapter.build(cls, config, tuple(wrong), case.arguments))


UNKNOWN_OPTION = "misspelt_option"


def _build(cls: Any, config: Any) -> Any:
    return cls(config)


@functools.lru_cache
def _imported(module: str, file: str, dependencies: tuple[str, ...]) -> tuple[str, ...]:
    """Return the top-level modules that importing a module loads in a new process, beyond those its backend loads."""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    load = f"importlib.import_module({module!r})" if found else f"runpy.run_path({file!r})"
    code = REPORT.format(dependencies=dependencies, load=load)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Violation(f"importing {module} alone", "no error", done.stderr.strip().splitlines()[-1:])
    return tuple(sorted({name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}))


@law("A plugin for one framework must not make its users install and load another one.", once=True)
def no_framework_leak(subject: Subject, case: Case) -> None:  # noqa: ARG001 - a law about the class
    """The class's module imports no framework that its backend does not load anyway."""
    try:
        file = inspect.getfile(subject.cls)
    except (OSError, TypeError):
        return  # defined in a notebook: there is no module to import
    loaded = _imported(subject.cls.__module__, file, tuple(subject.adapter.modules))
    foreign = sorted(set(FRAMEWORKS) & set(loaded) - {subject.key.backend})
    require("imported frameworks of other backends", not foreign, [], foreign)
