"""Module types: their op kinds, the axes of their weights, and that their forward really uses the quantized ones."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.torch.models import quantizer_at, ready, recipe, spec, vectors, weights_only
from trainable_core.errors import InvalidArgumentError, ModelError, RuleError
from trainable_core.recipe.layers import OPS
from trainable_torch import calibrate, describe, finalize, layers, register_layer, wrap
from trainable_torch.layers import FUNCTIONS, kind_of

# op kind, layer, input, channels: how many thresholds its weight has
LAYERS = {
    "linear": ("linear", lambda: nn.Linear(3, 4), (2, 3), 4),
    "conv1d": ("conv", lambda: nn.Conv1d(3, 4, 2), (2, 3, 5), 4),
    "conv2d": ("conv", lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5), 4),
    "conv3d": ("conv", lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4), 4),
    "grouped": ("conv", lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 5, 5), 6),
    "depthwise": ("depthwise_conv", lambda: nn.Conv2d(4, 4, 2, groups=4), (2, 4, 5, 5), 4),
    "depthwise_multiplied": ("depthwise_conv", lambda: nn.Conv1d(2, 6, 2, groups=2), (2, 2, 5), 6),
    "one_channel": ("conv", lambda: nn.Conv2d(1, 4, 2), (2, 1, 5, 5), 4),
    "reflecting": ("conv", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5), 4),
    "transposed1d": ("conv_transpose", lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 5), 4),
    "transposed2d": ("conv_transpose", lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 5, 5), 4),
    "transposed3d": ("conv_transpose", lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 3, 3, 3), 4),
    # (in, out / groups, ...): the groups share the thresholds of their columns
    "transposed_grouped": ("conv_transpose", lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5), 3),
}
CASES = pytest.mark.parametrize("name", LAYERS)


def case(name):
    """Return op kind, layer and input."""
    op, build, shape, channels = LAYERS[name]
    torch.manual_seed(0)
    return op, build(), vectors(*shape), channels


def with_quantized_weights(layer, qmodel, names=("weight",)):
    """Return a float copy of a layer that holds the wrapped one's quantized weights."""
    other, quantized = copy.deepcopy(layer), qmodel.get_quantized_weights()
    assert set(quantized) == set(names)
    with torch.no_grad():
        for name in names:
            weight = other.get_parameter(name)
            assert not torch.equal(weight, quantized[name])  # 4 bits: something must have moved
            weight.copy_(quantized[name])
    return other


@CASES
def test_each_layer_has_its_op_kind(name):
    op, layer, _, _ = case(name)
    assert kind_of(layer).op == op
    assert op in OPS


@CASES
def test_there_is_one_threshold_for_each_output_channel(name):
    _, layer, _, channels = case(name)
    qmodel = ready(layer, weights_only())
    axis = 1 if "transposed" in name else 0
    assert quantizer_at(qmodel, "weights_quantizers.weight").threshold.shape == (channels,)
    assert describe(qmodel).rows[0].channels_axis == axis
    quantized = qmodel.get_quantized_weights()["weight"].transpose(0, axis)
    # on the grid of its own channel there are at most 16 values, over all channels more
    assert all(channel.unique().numel() <= 16 for channel in quantized)


@CASES
def test_each_layer_computes_with_its_quantized_weights(name):
    _, layer, x, _ = case(name)
    qmodel = ready(layer, weights_only())
    assert torch.equal(qmodel(x), with_quantized_weights(layer, qmodel)(x))


@CASES
def test_each_layer_computes_with_its_quantized_input(name):
    _, layer, x, _ = case(name)
    qmodel = ready(layer, recipe(), x)
    quantized = quantizer_at(qmodel, "input_holders.input.activation_holder_quantizer")(x)
    assert not torch.equal(quantized, x)
    assert torch.equal(qmodel(x), with_quantized_weights(layer, qmodel)(quantized))


@CASES
def test_each_layer_takes_its_input_by_keyword(name):
    _, layer, x, _ = case(name)
    qmodel = ready(layer, recipe(), {"input": x})
    assert torch.equal(qmodel(input=x), qmodel(x))


@CASES
def test_one_threshold_per_tensor_if_asked(name):
    _, layer, x, _ = case(name)
    qmodel = ready(layer, {"weights": spec(per_channel=False)})
    assert quantizer_at(qmodel, "weights_quantizers.weight").threshold.shape == ()
    assert torch.equal(qmodel(x), with_quantized_weights(layer, qmodel)(x))


def test_bilinear_quantizes_both_inputs():
    torch.manual_seed(0)
    layer, x, y = nn.Bilinear(3, 2, 4), vectors(5, 3), 2 * vectors(5, 2)
    qmodel = ready(layer, recipe(), {"input1": x, "input2": y})
    first, second = (
        quantizer_at(qmodel, f"input_holders.{name}.activation_holder_quantizer") for name in ("input1", "input2")
    )
    assert torch.equal(qmodel(x, y), with_quantized_weights(layer, qmodel)(first(x), second(y)))


# ---- embeddings -----------------------------------------------------------------------------------------------------


def test_an_embedding_looks_up_quantized_rows_by_untouched_indices():
    torch.manual_seed(0)
    layer, indices = nn.Embedding(7, 3), torch.tensor([[0, 6], [3, 3]])
    qmodel = ready(layer, recipe())  # no batches: its input holds indices, nothing is observed
    assert [row.target for row in describe(qmodel).rows] == ["Weights"]
    assert quantizer_at(qmodel, "weights_quantizers.weight").threshold.shape == (7,)
    assert torch.equal(qmodel(indices), with_quantized_weights(layer, qmodel)(indices))


def test_an_embedding_bag_too():
    torch.manual_seed(0)
    layer, indices, offsets = nn.EmbeddingBag(7, 3), torch.tensor([0, 6, 3, 3]), torch.tensor([0, 2])
    qmodel = ready(layer, recipe())
    assert torch.equal(qmodel(indices, offsets), with_quantized_weights(layer, qmodel)(indices, offsets))


def test_an_embeddings_output_can_be_quantized():
    qmodel = ready(nn.Embedding(7, 3), {"activations": spec(placement="outputs", n_bits=2)}, torch.arange(7))
    assert qmodel(torch.arange(7)).unique().numel() <= 4


TABLES = {
    "embedding": lambda **more: nn.Embedding(7, 3, **more),
    "bag": lambda **more: nn.EmbeddingBag(7, 3, mode="sum", **more),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("how", "reason"), [({"sparse": True}, "sparse gradients"), ({"max_norm": 1.0}, r"rescale.*\(max_norm\)")]
)
def test_a_table_that_is_not_only_looked_up_is_left_out_and_trains_as_in_float(table, how, reason):
    torch.manual_seed(0)
    model, indices = nn.Sequential(TABLES[table](**how), nn.Linear(3, 2)), torch.tensor([[0, 6], [3, 3]])
    with torch.no_grad():
        model[0].weight.mul_(3)
    qmodel = ready(model, weights_only())
    assert re.search(reason, describe(qmodel).left_out["0"])
    assert [row.layer for row in describe(qmodel).rows] == ["1"]
    for each in (model, qmodel):
        each(indices).sum().backward()
    assert qmodel[0].weight.grad.is_sparse is ("sparse" in how)
    assert torch.equal(qmodel[0].weight, model[0].weight)  # rescaled alike
    deployed = finalize(qmodel.eval())
    assert torch.equal(deployed(indices), qmodel(indices))
    with pytest.raises(RuleError, match=reason):
        wrap(model, weights_only(rules=[{"match": {"op": "embedding"}, "weights": {"n_bits": 8}}]))
    wrap(model, weights_only(rules=[{"match": {"op": "embedding"}, "skip": True}]))


def test_a_row_of_padding_gets_no_gradient():
    qmodel = ready(nn.Embedding(7, 3, padding_idx=0), weights_only())
    qmodel(torch.tensor([0, 1])).sum().backward()
    assert qmodel.weight.grad[0].abs().sum() == 0
    assert qmodel.weight.grad[1].abs().sum() > 0


# ---- attention ------------------------------------------------------------------------------------------------------

FUSED = ("in_proj_weight", "out_proj.weight")
APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
ATTENTIONS = {
    "same": (lambda: nn.MultiheadAttention(4, 2), FUSED),
    "batch_first": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), FUSED),
    "own_dims": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True), APART),
    "no_bias": (lambda: nn.MultiheadAttention(4, 2, bias=False), FUSED),
    "bias_kv": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), FUSED),
}
WITH_ATTENTION = pytest.mark.parametrize("name", ATTENTIONS)


def attention(name):
    """Return an attention layer, the names of its weights, and query, key and value for it."""
    build, names = ATTENTIONS[name]
    torch.manual_seed(0)
    layer = build()
    return layer, names, (vectors(3, 2, 4), vectors(3, 2, layer.kdim) * 2, vectors(3, 2, layer.vdim) * 3)


def call_by_keywords(model, batch):
    query, key, value = batch
    return model(query, key=key, value=value)


def calibrated_attention(layer, batch):
    return calibrate(wrap(layer, recipe()), [batch], forward=lambda model, given: model(*given))


@WITH_ATTENTION
def test_all_projections_of_attention_are_quantized(name):
    layer, names, _ = attention(name)
    rows = describe(ready(layer, weights_only())).rows
    assert [(row.op, row.tensor) for row in rows] == [("attention", each) for each in names]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@WITH_ATTENTION
def test_attention_computes_with_quantized_projections_and_inputs(name, training, grad):
    layer, names, batch = attention(name)
    qmodel = calibrated_attention(layer, batch).train(training)
    inputs = [
        quantizer_at(qmodel, f"input_holders.{each}.activation_holder_quantizer")(x)
        for each, x in zip(("query", "key", "value"), batch, strict=True)
    ]
    expected = with_quantized_weights(layer, qmodel, names)(*inputs)
    with torch.set_grad_enabled(grad):
        outputs = qmodel(*batch)
    assert all(map(torch.equal, outputs, expected))
    with torch.set_grad_enabled(grad):
        assert all(map(torch.equal, call_by_keywords(qmodel, batch), expected))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_self_attention_in_eval_mode_takes_no_fused_kernel(batch_first, grad):
    """The fused kernel reads float weights or rounds in another way; with or without a gradient, all is the same."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    x = vectors(3, 2, 4)
    qmodel = calibrated_attention(layer, (x, x, x)).eval()
    inputs = [
        quantizer_at(qmodel, f"input_holders.{each}.activation_holder_quantizer")(x)
        for each in ("query", "key", "value")
    ]
    expected, _ = with_quantized_weights(layer, qmodel, FUSED).train()(*inputs)  # in train mode nothing is fused
    with torch.set_grad_enabled(grad):
        assert torch.equal(qmodel(x, x, x)[0], expected)
        assert torch.equal(qmodel(x, key=x, value=x)[0], expected)
        assert torch.equal(qmodel(query=x, key=x, value=x)[0], expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("need_weights", [True, False])
@WITH_ATTENTION
def test_attention_gives_the_same_trained_and_deployed(name, need_weights, grad):
    """A deployed weight needs no gradient; with inputs as strided as these, PyTorch would take another kernel."""
    layer, _, batch = attention(name)
    qmodel = calibrated_attention(layer, batch).eval()
    deployed = finalize(qmodel)
    with torch.set_grad_enabled(grad):
        assert torch.equal(qmodel(*batch, need_weights=need_weights)[0], deployed(*batch, need_weights=need_weights)[0])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gives_the_same_trained_and_deployed_for_a_strided_input(bias, grad):
    torch.manual_seed(0)
    qmodel = ready(nn.Linear(4, 4, bias=bias), weights_only("LSQ")).eval()
    deployed, x = finalize(qmodel), vectors(5, 7, 4).transpose(0, 1)
    with torch.set_grad_enabled(grad):
        assert torch.equal(qmodel(x), deployed(x))


def test_attention_weights_and_masks_come_through():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(4, 2, batch_first=True), vectors(2, 3, 4)
    qmodel = ready(layer, weights_only()).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    _, weights = qmodel(x, x, x, key_padding_mask=mask, average_attn_weights=False)
    assert weights.shape == (2, 2, 3, 3)
    assert weights[0, :, :, 2].abs().max() == 0
    assert qmodel(x, x, x, need_weights=False)[1] is None


def encoder_layer(**more):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64, **more)


def with_all_weights_quantized(model, qmodel):
    """Return a float copy of a model, in train mode, where no kernel is fused, holding the wrapped one's weights."""
    other = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, module in qmodel.named_modules():
            for attribute, weight in getattr(module, "get_quantized_weights", dict)().items():
                other.get_submodule(name).get_parameter(attribute).copy_(weight)
    return other


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_in_eval_mode_computes_with_quantized_weights(activation, norm_first, grad):
    layer, x = encoder_layer(activation=activation, norm_first=norm_first), vectors(2, 3, 4).double()
    qmodel = ready(layer, weights_only()).eval()
    assert len(describe(qmodel).rows) == 4
    expected = with_all_weights_quantized(layer, qmodel)(x)
    with torch.set_grad_enabled(grad):
        result = qmodel(x)
    # float64, values of order 1, some hundred operations: rounding stays below 1e-12, 4 bits are off by 1e-2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert (layer.eval()(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_in_eval_mode_computes_with_quantized_weights(masked):
    model, x = nn.TransformerEncoder(encoder_layer(), 2), vectors(2, 3, 4).double()
    mask = torch.tensor([[False, False, True], [False, False, False]]) if masked else None
    qmodel = ready(model, weights_only()).eval()
    assert len(describe(qmodel).rows) == 8
    expected = with_all_weights_quantized(model, qmodel)(x, src_key_padding_mask=mask)
    with torch.no_grad():
        result = qmodel(x, src_key_padding_mask=mask)
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(result[valid], expected[valid], rtol=0, atol=1e-12)  # as above


# ---- what is left out, and why --------------------------------------------------------------------------------------


class Owner(nn.Module):
    """Has a parameter and is of no known kind."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return x * self.scale


def left_out(layer):
    """Return why a layer is left out; nothing else may be, and the layer before it is quantized."""
    description = describe(wrap(nn.Sequential(nn.Linear(3, 3), layer), recipe()))
    assert {row.layer for row in description.rows} == {"0"}
    ((name, reason),) = description.left_out.items()
    assert name == "1"
    return reason


class Double(nn.Module):
    """A parametrization."""

    def forward(self, tensor):
        return 2 * tensor


def test_a_parametrized_bias_does_not_keep_the_weight_from_being_quantized():
    layer, x = nn.Linear(3, 4), vectors(2, 3)
    parametrize.register_parametrization(layer, "bias", Double())
    qmodel = ready(layer, weights_only())
    quantized = qmodel.get_quantized_weights()["weight"]
    assert torch.equal(qmodel(x), nn.functional.linear(x, quantized, layer.bias))


@pytest.mark.parametrize("path", ["in_proj_weight", "out_proj.weight"])
def test_a_parametrized_projection_of_attention_is_quantized(path):
    layer, x = nn.MultiheadAttention(4, 1), vectors(2, 3, 4)
    owner, _, name = path.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(owner), name, Double())
    qmodel = ready(layer, weights_only())
    plain = nn.MultiheadAttention(4, 1)
    with torch.no_grad():
        plain.load_state_dict(
            {key: value for key, value in layer.state_dict().items() if "parametr" not in key}, strict=False
        )
        for attribute, weight in qmodel.get_quantized_weights().items():
            plain.get_parameter(attribute).copy_(weight)
    assert set(qmodel.weights_quantizers) == {"in_proj_weight", "out_proj.weight"}
    # of one tensor three times, PyTorch makes one product, which some processors round otherwise than three
    assert torch.equal(qmodel(x, x, x)[0], plain(x, x.clone(), x)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_that_has_not_run_yet_is_wrapped():
    model, x = nn.utils.weight_norm(nn.Linear(3, 3)), vectors(2, 3)
    qmodel = ready(model, weights_only())
    assert torch.equal(qmodel(x), nn.functional.linear(x, qmodel.get_quantized_weights()["weight"], model.bias))


def test_a_module_of_no_known_kind_with_parameters_is_left_out():
    reason = left_out(Owner())
    assert "Owner" in reason
    assert "register_layer" in reason


def test_modules_without_parameters_need_no_reason():
    qmodel = wrap(nn.Sequential(nn.Linear(3, 3), nn.Flatten(), nn.Dropout()), recipe())
    assert describe(qmodel).left_out == {}


def test_normalization_is_no_layer_with_weights_to_quantize():
    qmodel = wrap(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), recipe())
    assert describe(qmodel).left_out == {}
    assert {row.layer for row in describe(qmodel).rows} == {"0"}


# ---- layers of one's own --------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A linear layer of another shape: (in, out)."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(vectors(3, 5))

    def forward(self, x, *, power=1):
        return (x @ self.kernel) ** power


@pytest.fixture
def registered(monkeypatch):
    """Let `Scaled` be known for the length of a test."""
    monkeypatch.setattr(layers, "_KINDS", dict(layers._KINDS))  # noqa: SLF001 - put back as it was
    register_layer(Scaled, "linear", {"kernel": 1}, inputs=("x",))


def test_a_layer_of_ones_own_is_quantized_once_registered(registered):
    layer, x = Scaled(), vectors(2, 3)
    qmodel = ready(layer, recipe(), x)
    row = describe(qmodel).rows[0]
    assert (row.op, row.tensor, row.channels_axis) == ("linear", "kernel", 1)
    assert quantizer_at(qmodel, "weights_quantizers.kernel").threshold.shape == (5,)
    quantized = quantizer_at(qmodel, "input_holders.x.activation_holder_quantizer")(x)
    assert torch.equal(qmodel(x, power=2), with_quantized_weights(layer, qmodel, ("kernel",))(quantized, power=2))


def test_subclasses_are_meant_too(registered):
    class Special(Scaled):
        pass

    assert kind_of(Special()).op == "linear"


def test_a_subclass_of_a_known_type_is_of_its_kind():
    class Special(nn.Conv2d):
        pass

    assert kind_of(Special(3, 4, 2)).op == "conv"


def test_what_is_no_module_type_is_refused():
    with pytest.raises(InvalidArgumentError, match="Module"):
        register_layer(int, "linear")
    with pytest.raises(InvalidArgumentError, match="Module"):
        register_layer(nn.Linear(2, 2), "linear")


def test_an_unknown_op_is_refused_with_those_known():
    with pytest.raises(InvalidArgumentError, match="conv_transpose"):
        register_layer(Scaled, "convolution")


def test_a_registered_weight_that_the_layer_lacks_is_told(registered):
    register_layer(Scaled, "linear", {"kernels": 1})
    with pytest.raises(ModelError, match="kernels"):
        wrap(Scaled(), weights_only())


def test_a_convolution_of_ones_own_needs_no_groups(registered):
    register_layer(Scaled, "conv", {"kernel": 1}, inputs=("x",))
    assert kind_of(Scaled()).op == "conv"


def test_every_function_is_of_a_known_op():
    assert set(FUNCTIONS.values()) <= set(OPS)


def test_the_transposed_linear_layer_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="tests a layer of transformers").Conv1D
    torch.manual_seed(0)
    layer, x = conv1d(5, 3), vectors(2, 3)  # weight (3, 5): inputs first
    qmodel = ready(layer, recipe(), x)
    row = describe(qmodel).rows[0]
    assert (row.op, row.channels_axis) == ("linear", 1)
    assert quantizer_at(qmodel, "weights_quantizers.weight").threshold.shape == (5,)
    quantized = quantizer_at(qmodel, "input_holders.x.activation_holder_quantizer")(x)
    assert torch.equal(qmodel(x), with_quantized_weights(layer, qmodel)(quantized))
