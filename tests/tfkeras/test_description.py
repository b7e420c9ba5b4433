"""What `describe` tells, in every state of a model."""

from __future__ import annotations

import json

import numpy as np
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, dqa, kl, small


def test_rows_tell_layer_tensor_grid_and_numbers():
    qmodel, x = calibrated({**LSQ, "rules": [{"match": {"name": "head"}, "weights": {"n_bits": 8}}]})
    rows = trainable_keras.keras2.describe(qmodel).rows
    assert [(row.layer, row.op, row.tensor, row.n_bits, row.channels_axis) for row in rows] == [
        ("conv", "conv", "kernel", 4, 3),
        ("conv", "conv", "inputs", 8, None),
        ("head", "linear", "kernel", 8, 1),
        ("head", "linear", "inputs", 8, None),
    ]
    assert len(rows[0].params["threshold"]) == 4
    assert set(rows[1].params) == {"range_min", "range_max"}
    # the nudged range holds what was seen but for half a step at either end
    step = (rows[1].params["range_max"] - rows[1].params["range_min"]) / 255
    assert abs(rows[1].params["range_min"] - x.min()) <= step
    assert {row.state for row in rows} == {"trainable"}


def test_states_from_wrapped_to_deployed():
    qmodel = trainable_keras.keras2.wrap(small(), LSQ)
    assert {row.state for row in trainable_keras.keras2.describe(qmodel).rows} == {"not calibrated"}
    qmodel, _ = calibrated()
    trained = trainable_keras.keras2.describe(qmodel)
    deployed = trainable_keras.keras2.describe(trainable_keras.keras2.finalize(qmodel))
    assert deployed.finalized
    assert {row.state for row in deployed.rows} == {"deployed"}
    assert [row.params for row in deployed.rows] == [row.params for row in trained.rows]


def test_of_several_widths_the_selected_one_is_told():
    qmodel, _ = calibrated(dqa())
    quantizer = qmodel.get_layer("conv").weights_quantizers["kernel"]
    quantizer.assign(quantizer.logits, np.array([0.0, 0.0, 1.0], np.float32))
    assert trainable_keras.keras2.describe(qmodel).rows[0].n_bits == 8


def test_what_is_left_out_says_why():
    class Own(kl.Layer):
        def build(self, shape):
            self.w = self.add_weight(name="w", shape=(shape[-1],))

        def call(self, x):
            return x * self.w

    model = tf.keras.Sequential([tf.keras.Input((3,)), Own(name="own"), kl.Dense(2, name="kept"), kl.Dense(2)])
    rule = {"match": {"name": "kept"}, "skip": True}
    description = trainable_keras.keras2.describe(trainable_keras.keras2.wrap(model, {**LSQ, "rules": [rule]}))
    assert "no known kind" in description.left_out["own"]
    assert "skip" in description.left_out["kept"]


def test_it_is_a_table_and_a_document():
    qmodel, _ = calibrated()
    description = trainable_keras.keras2.describe(qmodel)
    assert "conv" in str(description)
    assert "norm -> conv" in str(description)
    assert json.loads(description.to_json()) == json.loads(json.dumps(description.to_dict()))
