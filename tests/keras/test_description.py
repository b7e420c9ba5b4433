"""What `describe` tells of a Keras model, at each point of its life."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, tensor
from tests.keras.models import GRIDS, dense, images, moved, network, ready, recipe, spec, vectors, weights_only
from trainable_core.backend.description import Description, DescriptionRow
from trainable_core.errors import ModelError
from trainable_keras import calibrate, describe, finalize, freeze_quant_params, wrap
from trainable_keras.training import quantizers_of

MINMAX = {"weights": "minmax", "activations": "minmax"}


def states(qmodel: Any) -> set[str]:
    return {row.state for row in describe(qmodel).rows}


def test_a_row_tells_everything_about_its_quantizer() -> None:
    model = dense(2, 2)
    model.layers[0].kernel.assign([[1.0, -0.25], [0.5, 0.0]])
    qmodel = ready(model, recipe("LSQ", calibration=MINMAX), np.array([[3.0, 0.5]], np.float32))
    assert describe(qmodel) == Description(
        rows=(
            DescriptionRow(
                layer="fc",
                op="linear",
                tensor="kernel",
                target="Weights",
                training_method="LSQ",
                method="SYMMETRIC",
                n_bits=4,
                channels_axis=1,
                params={"threshold": [1.0, 0.25]},
                state="trainable",
                quantizer="LsqWeightsQuantizer",
                granularity="channel (axis 1)",
            ),
            DescriptionRow(
                layer="fc",
                op="linear",
                tensor="inputs",
                target="Activation",
                training_method="LSQ",
                method="SYMMETRIC",
                n_bits=4,
                channels_axis=None,
                params={"threshold": 3.0, "is_signed": False},
                state="trainable",
                quantizer="LsqActivationQuantizer",
                granularity="tensor",
            ),
        ),
        left_out={},
        folded={},
        finalized=False,
    )


def test_states_follow_the_life_of_a_model() -> None:
    qmodel = wrap(dense(), recipe("LSQ"))
    assert states(qmodel) == {"not calibrated"}
    calibrate(qmodel, [vectors(8, 4)])
    assert states(qmodel) == {"trainable"}
    freeze_quant_params(qmodel)
    assert states(qmodel) == {"frozen"}
    freeze_quant_params(qmodel, frozen=False)
    assert states(qmodel) == {"trainable"}
    assert states(finalize(qmodel)) == {"deployed"}
    assert [describe(each).finalized for each in (qmodel, finalize(qmodel))] == [False, True]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_deployed_model_tells_the_same_numbers(grid: str) -> None:
    qmodel = moved(ready(network(), recipe("LSQ", grid), images()))
    rows, deployed = describe(qmodel).rows, describe(finalize(qmodel)).rows
    assert [(row.layer, row.tensor, row.n_bits, row.params) for row in deployed] == [
        (row.layer, row.tensor, row.n_bits, row.params) for row in rows
    ]


def test_the_width_of_several_is_the_one_chosen() -> None:
    qmodel = ready(dense(), {"weights": spec("DQA", candidates=[2, 8])})
    (quantizer,) = quantizers_of(qmodel).values()
    quantizer.assign(quantizer.logits, np.array([0.0, 1.0], np.float32))
    assert [row.n_bits for row in describe(qmodel).rows] == [8]


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_what_is_left_out_says_why() -> None:
    class Scaled(kl.Layer):
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(shape=(shape[-1],), name="factor")

        def call(self, x: Any) -> Any:
            return x * self.factor

    model = keras.Sequential([keras.Input((4,)), Scaled(name="scaled"), kl.Dense(2, name="fc")])
    rules = [{"match": {"name": "fc"}, "skip": True}]
    left_out = describe(wrap(model, weights_only(rules=rules))).left_out
    assert "Scaled is of no known kind; see register_layer" in left_out["scaled"]
    assert "skip" in left_out["fc"]


def test_inputs_of_attention_are_told_by_name() -> None:
    given = keras.Input((5, 4))
    model = keras.Model(given, kl.MultiHeadAttention(2, 3, name="attention")(given, given))
    rows = describe(wrap(model, recipe())).rows
    assert [row.tensor for row in rows if row.target == "Activation"] == ["query", "value", "key"]


def test_a_layer_alone_is_called_model() -> None:
    layer = kl.Dense(3)
    layer(tensor(vectors(1, 4)))
    assert {row.layer for row in describe(wrap(layer, recipe())).rows} == {"model"}


def test_the_document_is_json_and_loses_nothing() -> None:
    description = describe(moved(ready(network(), recipe("LSQ", "UNIFORM"), images())))
    document = json.loads(description.to_json())
    assert document == description.to_dict()
    assert [DescriptionRow(**row) for row in document["rows"]] == list(description.rows)
    assert document["folded"] == {"stem.norm": "stem.conv"}


def test_the_table_names_every_quantizer_fold_and_reason() -> None:
    text = str(describe(ready(network(), recipe(), images())))
    for part in ("stem.conv", "body", "head", "kernel", "inputs", "stem.norm -> stem.conv"):
        assert part in text


@pytest.mark.parametrize("model", [None, "qmodel", dense])
def test_what_was_not_wrapped_is_refused(model: Any) -> None:
    given = model() if callable(model) else model
    with pytest.raises(ModelError):
        describe(given)
