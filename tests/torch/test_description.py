"""What `describe` tells of a PyTorch model, at each point of its life."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from tests.torch.models import images, network, ready, recipe, spec, vectors, weights_only
from trainable_core.backend.description import Description, DescriptionRow
from trainable_core.errors import ModelError
from trainable_torch import calibrate, describe, finalize, freeze_quant_params, save, wrap

MINMAX = {"weights": "minmax", "activations": "minmax"}


def states(qmodel):
    return {row.state for row in describe(qmodel).rows}


def test_a_row_tells_everything_of_its_quantizer():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.5], [-0.25, 0.0]]))
    qmodel = ready(model, recipe("LSQ", calibration=MINMAX), torch.tensor([[3.0, 0.5]]))
    assert describe(qmodel) == Description(
        rows=(
            DescriptionRow(
                layer="0",
                op="linear",
                tensor="weight",
                target="Weights",
                training_method="LSQ",
                method="SYMMETRIC",
                n_bits=4,
                channels_axis=0,
                params={"threshold": [1.0, 0.25]},
                state="trainable",
                quantizer="LsqWeightsQuantizer",
                granularity="channel (axis 0)",
            ),
            DescriptionRow(
                layer="0",
                op="linear",
                tensor="input",
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


def test_states_follow_the_life_of_a_model():
    qmodel = wrap(network(), recipe("LSQ"))
    assert states(qmodel) == {"not calibrated"}
    assert all(row.params == {} for row in describe(qmodel).rows)
    calibrate(qmodel, [images()])
    assert states(qmodel) == {"trainable"}
    freeze_quant_params(qmodel)
    assert states(qmodel) == {"frozen"}
    deployed = finalize(qmodel)
    assert states(deployed) == {"deployed"}
    assert describe(deployed).finalized


@pytest.mark.parametrize("grid", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])
def test_the_deployed_model_tells_the_same_numbers(grid):
    qmodel = ready(network(), recipe("LSQ", grid), images())
    told, deployed = describe(qmodel).rows, describe(finalize(qmodel)).rows
    assert [(row.params, row.n_bits) for row in told] == [(row.params, row.n_bits) for row in deployed]
    assert all(row.quantizer.endswith("InferableQuantizer") for row in deployed)


def test_the_width_of_several_is_the_one_chosen():
    qmodel = ready(nn.Linear(2, 2), weights_only("DQA"))
    assert describe(qmodel).rows[0].n_bits == 4
    with torch.no_grad():
        qmodel.weights_quantizers["weight"].logits[1] = 1.0
    assert describe(qmodel).rows[0].n_bits == 8
    assert describe(finalize(qmodel)).rows[0].n_bits == 8


class Block(nn.Module):
    """Functional operations, twice the same, and names that look like those of holders."""

    def __init__(self):
        super().__init__()
        self.out_output = nn.Linear(3, 3)
        self.an_input_0 = nn.Linear(3, 3)

    def forward(self, x):
        return torch.cat([self.out_output(x) + 1, self.an_input_0(x) + 2]) @ F.relu(x).transpose(0, 1)


def test_holders_are_told_by_layer_and_place():
    rules = [{"match": {"op": "matmul"}, "activations": {"placement": "inputs"}}]
    qmodel = ready(Block(), {"activations": spec(placement="outputs"), "rules": rules}, vectors(4, 3))
    assert [(row.layer, row.op, row.tensor) for row in describe(qmodel).rows] == [
        ("out_output", "linear", "output"),
        ("an_input_0", "linear", "output"),
        ("add", "add", "output"),
        ("add_1", "add", "output"),
        ("cat", "cat", "output"),
        ("relu", "activation", "output"),
        ("matmul", "matmul", "input 0"),
        ("matmul", "matmul", "input 1"),
    ]


def test_inputs_of_attention_are_told_by_name():
    qmodel = wrap(nn.Sequential(nn.MultiheadAttention(4, 2)), {"activations": spec()})
    assert [(row.layer, row.tensor) for row in describe(qmodel).rows] == [
        ("0", "query"),
        ("0", "key"),
        ("0", "value"),
    ]


class Owner(nn.Module):
    """Has a parameter and is of no known kind."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return x * self.scale


def test_a_model_that_is_one_layer_is_called_model():
    for placement, tensor in (("inputs", "input"), ("outputs", "output")):
        qmodel = wrap(nn.Linear(2, 2), {"activations": spec(placement=placement)})
        assert [(row.layer, row.tensor) for row in describe(qmodel).rows] == [("model", tensor)]


def test_the_document_is_json_and_loses_nothing():
    qmodel = ready(nn.Sequential(network(), Owner()), recipe(), images())
    description = describe(qmodel)
    document = json.loads(description.to_json())
    assert document == description.to_dict()
    assert document["schema_version"] == 1
    assert len(document["rows"]) == len(description.rows) == 6
    assert document["folded"] == {"0.stem.norm": "0.stem.conv"}
    assert set(document["left_out"]) == {"1"}


def test_the_table_names_every_quantizer_fold_and_reason():
    model = nn.Sequential(network(), Owner())
    text = str(describe(ready(model, recipe(), images())))
    for part in ("0.stem.conv", "0.head", "weight", "input", "STE", "SYMMETRIC per channel (axis 0)", "trainable"):
        assert part in text
    assert "0.stem.norm -> 0.stem.conv" in text
    assert "1: Owner is of no known kind" in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_what_was_not_wrapped_is_refused(model):
    with pytest.raises(ModelError, match="wrap"):
        describe(model)


def test_describing_and_saving_do_not_go_on_computing_a_weight(tmp_path):
    net = network()
    net.head = nn.utils.parametrizations.spectral_norm(net.head)  # its vectors move at each reading in training
    qmodel = ready(net, recipe("LSQ"), images()).train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    describe(qmodel)
    save(qmodel, tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
