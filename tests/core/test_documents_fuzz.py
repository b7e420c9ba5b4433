"""Damaged and hostile documents: whatever a loader is given, it returns or raises one of the library's errors."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from pydantic import ValidationError

from tests.mutations import INPUTS, mutated_bytes, mutated_value, seeded
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.documents.files import read_arrays, write_arrays
from trainable_core.documents.plan import plan_document, plan_from_document, state_document, state_from_document
from trainable_core.errors import DocumentError, TrainableError
from trainable_core.quantizer import read_document
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.state import WrappedState
from trainable_core.schedule import LinearAnnealingScheduler

LAYERS = [
    LayerInfo("stem", "conv", {"weight": WeightInfo((4, 1, 3, 3), 0)}),
    LayerInfo("body", "linear", {"weight": WeightInfo((4, 4), 0)}),
    LayerInfo("add", "add"),
]
RECIPE = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "per_channel": True, "training_method": "LSQ"},
    "activations": {
        "method": "POWER_OF_TWO", "n_bits": 8, "training_method": "DQA", "candidates": [4, 8], "signed": False,
        "placement": "outputs", "arguments": {"temperature": {"t_start": 0, "t_end": 9}}, "min_threshold": 0.1,
    },
    "calibration": {"weights": "mse", "activations": "percentile", "percentile": 99.9, "p": 2.5},
    "target": "mctq",
    "fold_batch_norm": True,
    "rules": [
        {"match": {"name": "ste*"}, "weights": {"n_bits": 8}},
        {"match": {"op": "linear", "name": "body"}, "activations": {"n_bits": 6, "enabled": False}},
        {"match": {"op": "add"}, "skip": True},
    ],
}  # fmt: skip
WEIGHTS = {
    "weights_quantization_method": "UNIFORM",
    "weights_n_bits": 4,
    "weights_quantization_params": {"range_min": [-1.0, -2.0], "range_max": [1.0, 0.5]},
    "weights_per_channel_threshold": True,
    "weights_channels_axis": 0,
    "min_threshold": 0.001,
    "weights_quantization_candidates": [{"n_bits": 2}, {"n_bits": 8, "quantization_params": {"threshold": [1.0, 2.0]}}],
}
ACTIVATION = {
    "activation_quantization_method": "SYMMETRIC",
    "activation_n_bits": 8,
    "activation_quantization_params": {"threshold": 2.0, "is_signed": False},
}
QUANTIZER = {
    "quantization_config": {"target": "weights", **WEIGHTS},
    "freeze_quant_params": False,
    "arguments": {"bit_cost_weight": 0.5},
    "tensor_ndim": 2,
    "signed": True,
    "variables": {"range_min": [-1.0, -2.0], "range_max": [1.0, 0.5]},
}


def wrapped_state():
    recipe = QuantizationRecipe.of(RECIPE)
    return WrappedState(recipe, {plan.layer.name: plan for plan in recipe.resolve(LAYERS)}, {"head": "why"}, {"a": "b"})


def into_recipe(document):
    recipe = QuantizationRecipe.of(document)
    recipe.resolve(LAYERS)
    assert QuantizationRecipe.of(json.loads(recipe.model_dump_json(exclude_unset=True))) == recipe


def into_schedule(document):
    LinearAnnealingScheduler.from_dict(document)


VALUES = {
    "recipe": (into_recipe, RECIPE),
    "weights config": (TrainableQuantizerWeightsConfig.model_validate, WEIGHTS),
    "activation config": (TrainableQuantizerActivationConfig.model_validate, ACTIVATION),
    "candidate config": (
        TrainableQuantizerCandidateConfig.model_validate,
        WEIGHTS["weights_quantization_candidates"][1],
    ),
    "quantizer": (lambda document: read_document(document, "quantizer"), QUANTIZER),
    "plan": (plan_from_document, plan_document(wrapped_state().plans["stem"])),
    "state": (state_from_document, state_document(wrapped_state())),
    "schedule": (into_schedule, {"t_start": 0, "t_end": 9, "initial_val": 1.0, "target_val": 0.1}),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_damaged_document_loads_or_is_refused(kind):
    load, document = VALUES[kind]
    rng, refused = seeded(kind), 0
    for _ in range(INPUTS):
        damaged = mutated_value(document, rng)
        try:
            load(damaged)
        except (TrainableError, ValidationError) as error:
            refused += bool(str(error))  # which must be told, too
        except BaseException as error:
            message = f"{type(error).__name__}: {error}\nfrom {damaged!r:.2000}"
            raise AssertionError(message) from error
    assert refused > INPUTS / 4  # the mutations are no harmless ones


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_damaged_recipe_file_loads_or_is_refused(kind, tmp_path):
    yaml = pytest.importorskip("yaml", reason="reading YAML needs pyyaml")
    path = tmp_path / f"recipe.{kind}"
    text = json.dumps(RECIPE) if kind == "json" else yaml.safe_dump(RECIPE)
    rng, refused = seeded(kind), 0
    for index in range(INPUTS // 4):  # YAML is slow to read
        damaged = mutated_bytes(text.encode(), rng)
        path.write_bytes(damaged)
        try:
            into_recipe(path)
        except (TrainableError, ValidationError) as error:
            refused += bool(str(error))  # which must be told, too
        except BaseException as error:
            message = f"input {index}: {type(error).__name__}: {error}\nfrom {damaged!r}"
            raise AssertionError(message) from error
    assert refused > INPUTS / 16


def test_a_damaged_file_of_arrays_loads_or_is_refused(tmp_path):
    path = tmp_path / "model"
    header = {"format": "backend", "schema_version": 1, "recipe": RECIPE, "frozen": ["a"]}
    arrays = {"0:kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "1:step": np.asarray(7)}
    write_arrays(path, header, arrays)
    content, rng, refused = path.read_bytes(), seeded("arrays"), 0
    for index in range(INPUTS):
        damaged = mutated_bytes(content, rng)
        path.write_bytes(damaged)
        try:
            found, read = read_arrays(path, "backend", 1, {"recipe": dict, "frozen": list})
        except DocumentError:
            refused += 1
        except BaseException as error:
            message = f"input {index}: {type(error).__name__}: {error}\nfrom {damaged!r}"
            raise AssertionError(message) from error
        else:  # what is outside of the checksums has no meaning
            assert found == header
            assert all(np.array_equal(read[name], array) for name, array in arrays.items())
    assert refused > INPUTS / 4


# ---- made by hand ---------------------------------------------------------------------------------------------------

BILLION = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        f"weights:\n  arguments:\n    {BILLION.replace(chr(10), chr(10) + '    ')}",
        "weights: &a {arguments: {x: *a}}",
        "rules: &a [*a]",
        "weights: " + "[" * 5000,
        "weights: " + "{a: " * 400 + "1" + "}" * 400,
        "!!python/object/apply:os.system ['echo']",
        "weights: !!binary '*'",
        "when: 2024-13-45",
        "? [a, b]\n: 1",
        "1: 2",
    ],
    ids=[
        "billion laughs",
        "its own argument",
        "its own rule",
        "open",
        "deep",
        "python",
        "binary",
        "date",
        "list key",
        "int",
    ],
)
def test_hostile_yaml_is_refused_at_once(text, tmp_path):
    pytest.importorskip("yaml", reason="reading YAML needs pyyaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises((TrainableError, ValidationError)):
        QuantizationRecipe.of(path)


@pytest.mark.parametrize("load", [load for load, _ in VALUES.values()], ids=list(VALUES))
def test_documents_that_hold_themselves_are_refused(load):
    loop = {}
    loop["weights"] = loop["weights_quantization_params"] = loop["arguments"] = loop["variables"] = loop
    listed = []
    listed.append(listed)
    for document in (loop, {"weights": {"arguments": {"x": listed}}}, {"weights_quantization_params": {"a": listed}}):
        with contextlib.suppress(TrainableError, ValidationError):
            load(document)
            pytest.fail("it was accepted")
