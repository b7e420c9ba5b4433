"""Every registered Keras quantizer keeps every law of the kit; how the kit is run; plugins that are not ours."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

import trainable_keras
from tests.keras.framework import BACKEND, functions, internal, keras, only_keras
from tests.kit import affordable
from trainable_core.cli import main
from trainable_core.config import TrainableQuantizerWeightsConfig
from trainable_core.conformance import LAWS, check_quantizer, replay
from trainable_core.conformance.suite import Check, checks
from trainable_core.conformance.template import write_plugin
from trainable_core.registry import process as registry

ADAPTER = internal("conformance").ADAPTER
reciprocal = internal("engine").reciprocal
quantizers = internal("quantizers")

ROOT = Path(__file__).parents[2]
SOME = 3  # a case costs five times what it does in PyTorch; `trainable check --backend keras` tries more
FEW = 3  # what is tested here is how the kit is run
SLOW = "no_framework_leak"
"""A law about the class: it starts an interpreter and imports TensorFlow, for each class and grid."""
# What an installed plugin is tried on here; tests/plugin runs the whole kit on it.
SHORT = ["on_grid", "tie_rule", "deployment", "input_gradient", "variable_gradients", "config_round_trip"]


SHARED = 3
"""Laws on sequences, surroundings and documents meet every third quantizer each: a call is the same code for all."""


def shared(made: list[Check]) -> list[Check]:
    """Return all checks of laws on values and gradients, and a share of the others."""
    laws, subjects = list(LAWS), list(dict.fromkeys(check.subject for check in made))
    first = laws.index("interleaved_calls")
    return [
        check
        for check in made
        if (place := laws.index(check.law.name)) < first or (place + subjects.index(check.subject)) % SHARED == 0
    ]


EVERY = checks(backend=BACKEND, plugin=BACKEND, laws=[name for name in LAWS if name != SLOW], examples=SOME)
CHECKS = affordable(shared(EVERY))


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_built_in_quantizers_keep_every_law(check):
    check()


def test_every_law_meets_some_quantizers():
    subjects = {check.subject for check in CHECKS}
    about = {name for name, law in LAWS.items() if any(map(law.about, subjects))}
    assert {check.law.name for check in CHECKS} == about - {SLOW}
    # the others are about methods without an oracle, or with a penalty that is declared, such as a plugin's
    without = {"gradients_arrive", "gradient_direction", "declared_penalty", "gradient_reaches_the_input"}
    random = {"random_values", "random_channels", "seeds"}
    of_modules = {"mode_of_the_call"}  # Keras's calls say it, or nobody does
    assert set(LAWS) - about == {*without, *random, *of_modules, "regularization_arrives"}


def test_importing_a_quantizer_loads_no_other_framework():
    verdict = next(v for v in check_quantizer(quantizers.SteWeightsQuantizer, BACKEND, laws=[SLOW]))
    assert verdict.holds, verdict.counterexample


def test_every_built_in_class_is_checked():
    assert {check.subject.cls for check in CHECKS} == set(quantizers.BUILTIN)


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], "TIES")
class TiesToEven(quantizers.SteWeightsQuantizer):
    """Rounds ties to even, where TensorFlow's kernels round up."""

    def fake_quantize(self, x, grid, training):
        codes = functions.round(x * reciprocal(grid.scale))
        return (functions.clip(codes, *grid.ends) + 0.0) * grid.scale


def test_a_broken_law_is_told_by_a_counterexample_that_can_be_replayed():
    verdict = next(v for v in check_quantizer(TiesToEven, BACKEND, laws=["tie_rule"], seed=0))
    assert verdict.counterexample is not None
    assert verdict.counterexample.case is not None
    assert verdict.counterexample.case.x.size == 1
    document = json.dumps(verdict.counterexample.document())
    with pytest.raises(AssertionError, match="ties"):
        replay(document, TiesToEven)


def test_the_adapter_sees_gradients_that_do_not_arrive():
    """What does not arrive is zero, in the shape that it would have."""
    config = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 4}
    quantizer = ADAPTER.build(
        quantizers.LsqWeightsQuantizer, _config({**config, "weights_quantization_params": {"threshold": 1.0}}), (2,), {}
    )
    x = np.ones(2, np.float32)
    run = ADAPTER.run(quantizer, x, training=True, dtype="float32", device=ADAPTER.devices[0], upstream=x * 0)
    assert run.variables["threshold"].tolist() == 0.0
    assert run.x is not None
    assert run.x.tolist() == [0.0, 0.0]


def _config(fields):
    return TrainableQuantizerWeightsConfig(**fields)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_adapter_gives_the_dtypes_it_says(dtype):
    config = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 4}
    config = _config({**config, "weights_quantization_params": {"threshold": 1.0}})
    quantizer = ADAPTER.build(quantizers.SteWeightsQuantizer, config, (3,), {})
    ones = np.ones(3, np.float32)
    run = ADAPTER.run(quantizer, ones, training=True, dtype=dtype, device=ADAPTER.devices[0], upstream=ones)
    assert (run.dtype, run.device) == (dtype, ADAPTER.devices[0])
    assert run.x.tolist() == [0.0, 0.0, 0.0]  # beyond 7/8, the last grid point


WEIGHTS = [quantizers.SteWeightsQuantizer, quantizers.LsqWeightsQuantizer, quantizers.DqaWeightsQuantizer]


@pytest.mark.parametrize("cls", WEIGHTS)
def test_an_uncalibrated_quantizer_can_be_copied(cls):
    fields = {"weights_quantization_method": "UNIFORM", "weights_n_bits": 4, "weights_quantization_params": {}}
    quantizer = ADAPTER.build(cls, _config(fields), (2,), {})
    again = copy.deepcopy(quantizer)
    assert again.variable_names == quantizer.variable_names
    assert not again.calibrated
    assert copy.deepcopy(cls(_config(fields))).variable_names == ()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a source tree an installed distribution, as pip would: importable, with its metadata."""
    loaded = set(sys.modules)

    def put(source: Path, name: str, plugin: str) -> None:
        metadata = tmp_path / "site" / f"{name.replace('-', '_')}-0.1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(f"[trainable]\n{plugin}\n")
        monkeypatch.syspath_prepend(str(metadata.parent))
        monkeypatch.syspath_prepend(str(source))
        registry.default_registry().reset()

    yield put
    monkeypatch.undo()
    registry.default_registry().reset()
    for module in set(sys.modules) - loaded:
        if module.startswith(("trainable_ewgs", "trainable_fade", "trainable_log_threshold")):
            del sys.modules[module]


def check(plugin: str, backend: str = "keras", more: tuple[str, ...] = ()) -> int:
    assert {*SHORT, *more} <= set(LAWS)
    laws = [part for law in (*SHORT, *more) for part in ("--law", law)]
    return main(["check", "--backend", backend, "--plugin", plugin, "--examples", str(1 if more else FEW), *laws])


of_keras_3 = only_keras(3, "what plugins register for `keras`")


@of_keras_3
def test_a_new_plugin_keeps_the_laws_as_it_is_written(tmp_path, install, capsys):
    write_plugin("trainable-fade", ["keras"], tmp_path / "plugin")
    install(tmp_path / "plugin" / "src", "trainable-fade", "trainable_fade = trainable_fade.plugin")
    assert check("trainable-fade") == 0, capsys.readouterr().out


@of_keras_3
def test_the_example_plugin_keeps_the_laws(install, capsys):
    install(ROOT / "examples/plugin-ewgs/src", "trainable-ewgs", "ewgs = trainable_ewgs.plugin")
    assert check("ewgs") == 0, capsys.readouterr().out


def test_methods_with_variables_of_their_own_keep_the_laws(install, capsys):
    source = ROOT / "examples/plugin-log-threshold/src"
    install(source, "trainable-log-threshold", "log_threshold = trainable_log_threshold.plugin")
    of_variables = ("declared_variables", "gradients_arrive", "per_channel_gradients")
    more = ("per_channel", *of_variables, "schedule_resume", "regularization_gradient", "model_round_trip")
    assert check("log_threshold", BACKEND, more) == 0, capsys.readouterr().out


@of_keras_3
def test_the_example_plugin_is_chosen_by_a_recipe(install):
    install(ROOT / "examples/plugin-ewgs/src", "trainable-ewgs", "ewgs = trainable_ewgs.plugin")
    weights = {"method": "SYMMETRIC", "n_bits": 4, "training_method": "EWGS", "arguments": {"delta": 0.25}}
    model = trainable_keras.wrap(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), {"weights": weights})
    found = [q for layer in model.layers for q in getattr(layer, "weights_quantizers", {}).values()]
    assert [quantizer.delta for quantizer in found] == [0.25]
