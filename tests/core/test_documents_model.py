"""The header that every backend's files have, and the checks that a file fits a model."""

import json

import numpy as np
import pytest

from tests.core.numpy_backend import NumpySte
from trainable_core import QuantizationRecipe, TrainableQuantizerWeightsConfig
from trainable_core.documents.files import check_header
from trainable_core.documents.model import (
    KINDS,
    SCHEMA_VERSION,
    check_names,
    check_shapes,
    freeze_quantizers,
    header_of,
    placeholder,
    recipe_of,
)
from trainable_core.errors import DocumentError
from trainable_core.recipe.state import WrappedState

RECIPE = {"schema_version": 1, "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "STE"}}


def quantizer(*, frozen=False):
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="UNIFORM", weights_n_bits=4, weights_quantization_params={}
    )
    made = NumpySte(config, freeze_quant_params=frozen)
    made.initialize_quantization((3, 2), "kernel", None)
    return made


def header(quantizers):
    return header_of("form", WrappedState(QuantizationRecipe.model_validate(RECIPE)), quantizers)


def test_a_header_is_json_that_its_own_check_accepts():
    found = header({"fc.kernel": quantizer(frozen=True), "head.kernel": quantizer()})
    assert json.loads(json.dumps(found)) == found
    check_header("file", found, "form", SCHEMA_VERSION, KINDS)
    assert recipe_of("file", found) == QuantizationRecipe.model_validate(RECIPE)
    assert (found["frozen"], found["finalized"]) == (["fc.kernel"], False)


@pytest.mark.parametrize("key", list(KINDS))
def test_a_key_that_a_header_lacks_is_named(key):
    found = {name: value for name, value in header({}).items() if name != key}
    with pytest.raises(DocumentError, match=key):
        check_header("file", found, "form", SCHEMA_VERSION, KINDS)


def test_a_damaged_recipe_is_refused():
    with pytest.raises(DocumentError, match="recipe is damaged"):
        recipe_of("file", {"recipe": {"weights": 3}})


def test_a_placeholder_makes_a_quantizer_convert():
    made = quantizer()
    placeholder(made)
    assert made.calibrated
    assert made.convert2inferable().current_qparams().quant_max == 15


@pytest.mark.parametrize(
    ("found", "fact"),
    [
        ({}, "missing: a"),
        ({"a": (2,), "b": (2,)}, "unknown: b"),
        ({"a": (3,)}, r"\(3,\), this model's has \(2,\)"),
    ],
)
def test_variables_of_another_model_are_refused(found, fact):
    with pytest.raises(DocumentError, match=fact):
        check_shapes("file", {"a": (2,)}, found)
    check_shapes("file", {"a": (2,)}, {"a": np.ones(2).shape})


def test_quantizers_that_the_model_lacks_are_named_and_none_is_frozen():
    made = quantizer()
    with pytest.raises(DocumentError, match="nowhere"):
        freeze_quantizers("file", ["fc.kernel", "nowhere"], {"fc.kernel": made})
    assert not made.freeze_quant_params
    freeze_quantizers("file", ["fc.kernel"], {"fc.kernel": made})
    assert made.freeze_quant_params
    with pytest.raises(DocumentError, match="nowhere"):
        check_names("file", {"nowhere": True}, {"fc.kernel": made})
