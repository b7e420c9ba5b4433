"""Laws on configs, saved states and copies: each restores an equal quantizer."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject, Violation, move, variables
from trainable_core.conformance.law import law, require, same_bits
from trainable_core.conformance.strategies import Kind
from trainable_core.errors import TrainableError
from trainable_core.registry.process import get_backend, get_trainable_quantizer_class


def _bare(case: Case) -> Case:
    """Return the case without quantization params, as a model is before its state is loaded."""
    config = case.config
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    kept = {} if config.calibrated else config.quantization_params  # a sign that no calibration decides
    bare = type(config)(**{**fields, f"{config.prefix}_quantization_params": kept})
    return Case(bare, case.x, case.upstream, (1.0,), 0, case.arguments)


def _same(subject: Subject, what: str, case: Case, got: Any, expected: Any) -> None:
    """Require that two quantizers hold the same numbers and give the same values."""
    own = variables(expected)
    found = variables(got)
    require(f"variables of {what}", list(found) == list(own), list(own), list(found))
    for name, value in own.items():
        same_bits(f"{name} of {what}", found[name], value)
    same_bits(f"values of {what}", subject.values(got, case.x), subject.values(expected, case.x))


@law(
    "What the config leaves out is lost when a model is saved: candidates, trained numbers, arguments, the freeze.",
    kind=Kind(least=1),
)
def config_round_trip(subject: Subject, case: Case) -> None:
    """``get_config`` is plain JSON, and ``from_config`` rebuilds an equal quantizer from it."""
    quantizer = subject.quantizer(case)
    quantizer.freeze()
    document = quantizer.get_config()
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as error:
        raise Violation("get_config() is JSON", "a JSON document", f"{error!r}") from error
    again = subject.cls.from_config(json.loads(text))
    require("config", again.quantization_config == case.config, case.config, again.quantization_config)
    require("frozen", bool(again.freeze_quant_params), "true", again.freeze_quant_params)
    require(
        "get_config() of what it rebuilt", again.get_config() == json.loads(text), text, json.dumps(again.get_config())
    )
    if case.arguments:
        given = {name: again.get_arguments().get(name) for name in case.arguments}
        require("arguments of the constructor", given == case.arguments, case.arguments, given)
    _same(subject, "what from_config rebuilt", case, again, quantizer)


@law("A checkpoint that is restored into a new model must give the model that was saved.")
def state_round_trip(subject: Subject, case: Case) -> None:
    """The framework's own saved state, loaded into an uncalibrated quantizer, gives an equal one."""
    quantizer = subject.quantizer(case)
    again = subject.fresh(_bare(case))
    subject.adapter.restore(again, subject.adapter.save(quantizer))
    _same(subject, "what the state restored", case, again, quantizer)


@law("A checkpoint of another model must not be half loaded; files are written in any order.", kind=Kind(tensor=False))
def incomplete_states(subject: Subject, case: Case) -> None:
    """A state is loaded in any order of its entries; one that lacks an entry, or has a foreign one, is refused."""
    quantizer = subject.quantizer(case)
    state = dict(subject.adapter.entries(quantizer))
    require("entries of the state", state or not quantizer.variable_names, quantizer.variable_names, list(state))
    again = subject.fresh(_bare(case))
    subject.adapter.restore_entries(again, dict(reversed(state.items())))
    _same(subject, "a state in another order", case, again, quantizer)
    broken = {f"a state without {name}": {k: v for k, v in state.items() if k != name} for name in state}
    broken["a state with a foreign entry"] = {**state, "foreign": np.zeros((), np.float32)}
    for what, entries in broken.items():
        other = subject.fresh(_bare(case))
        try:
            subject.adapter.restore_entries(other, entries)
        except Exception:  # noqa: BLE001, S112 - the framework's own error
            continue
        raise Violation(what, "an error", "nothing raised")


def registered(subject: Subject) -> bool:
    """Return whether a recipe can choose the class."""
    key = subject.key
    try:
        return get_trainable_quantizer_class(key.target, key.quantizer_id, key.method, key.backend) is subject.cls
    except TrainableError:
        return False


@law(
    "Users save models, not quantizers; a class may save itself correctly and still be lost inside a model.",
    about=registered,
    once=True,
)
def model_round_trip(subject: Subject, case: Case) -> None:  # noqa: ARG001 - a law about the class
    """A model quantized by a recipe gives the same values after it was saved and loaded, finalized or not."""
    verbs = import_module(get_backend(subject.key.backend).verbs)
    fields = {"method": subject.key.method.name, "n_bits": subject.width, "training_method": subject.key.quantizer_id}
    recipe: dict[str, Any] = (
        {"weights": {**fields, "per_channel": True}} if subject.weights else {"activations": fields}
    )
    if subject.method.computes_grid:
        recipe["target"] = "native"
    model, batch, values = subject.adapter.model()
    qmodel = verbs.wrap(model, recipe)
    verbs.calibrate(qmodel, [batch])
    with TemporaryDirectory() as folder:
        for what, saved in (("the wrapped model", qmodel), ("the finalized model", verbs.finalize(qmodel))):
            same_bits(f"values of {what} and of the calibrated model", values(saved), values(qmodel))
            path = Path(folder) / what
            verbs.save(saved, path)
            same_bits(
                f"values of {what} after loading", values(verbs.load(path, subject.adapter.model()[0])), values(saved)
            )


@law("Averaged weights (EMA) and teacher models are copies, which must not share variables with the original.")
def deepcopy(subject: Subject, case: Case) -> None:
    """A copy that is taken after a training step is equal and independent."""
    quantizer = subject.quantizer(case)
    subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    copied = subject.adapter.copy(quantizer)
    _same(subject, "a copy", case, copied, quantizer)
    values, before = subject.values(quantizer, case.x), variables(quantizer)
    move(copied, (3.0,))
    for name, value in variables(quantizer).items():
        same_bits(f"{name} after the copy changed", value, before[name])
    same_bits("values after the copy changed", subject.values(quantizer, case.x), values)
    moved = subject.quantizer(case)
    move(moved, (3.0,))
    same_bits("values of the changed copy", subject.values(copied, case.x), subject.values(moved, case.x))
