"""Which quantizer makes what a layer is given, and where a model that runs in integers gets quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

import trainable_torch
from tests.torch.models import same_state, spec, train, vectors
from trainable_core.errors import UnsupportedConfigError
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.wrapper import QuantizationWrapper


def how(placement: str = "integer", method: str = "UNIFORM", **more: Any) -> dict[str, Any]:
    """Return a recipe of int32 biases."""
    weights, activations = spec("LSQ", "SYMMETRIC", 8), spec("LSQ", method, 8, placement=placement)
    return {"weights": weights, "activations": activations, "bias": "int32", **more}


def assert_every_bias_is_on_the_grid_of_its_input(deployed: nn.Module, *batches: Any) -> int:
    """Assert that what each layer with an integer bias is given is on the grid whose scale the bias has.

    Snapping is idempotent: what is on the grid stays as it is, bit for bit. Returns how many layers were looked at.
    """
    looked: list[str] = []
    hooks = []
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizationWrapper) and module.quantizes_bias:
            quantizer = module.bias_quantizer.source.activation_holder_quantizer
            own = dict(module.input_holders).get("input")

            def look(_: Any, args: Any, quantizer: Any = quantizer, own: Any = own, name: str = name) -> None:
                x = args[0] if own is None else own(args[0])
                assert torch.equal(quantizer(x), x), name
                looked.append(name)

            hooks.append(module.register_forward_pre_hook(look))
    for batch in batches:
        deployed(batch)
    for hook in hooks:
        hook.remove()
    return len(looked)


def quantized_tensors(qmodel: nn.Module) -> set[str]:
    """Return the activations that have a quantizer."""
    return {f"{row.layer}: {row.tensor}" for row in trainable_torch.describe(qmodel).rows if row.target == "Activation"}


# ---- past what only moves codes -------------------------------------------------------------------------------------


class Between(nn.Module):
    """A convolution, something, and a linear layer."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.between, self.fc = nn.Conv2d(1, 4, 3), between, nn.LazyLinear(2)
        self.eval()(vectors(2, 1, 6, 6))
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv(x)))


def on_conv(between: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return the model, its convolution's input quantized and all outputs."""
    return Between(between)


FIRST = {"match": {"name": "conv"}, "activations": {"placement": "integer"}}


class Dropping(nn.Module):
    """Dropout as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": nn.Identity(),
    "flatten": nn.Flatten(),
    "dropout": nn.Sequential(nn.Dropout(0.5), nn.Flatten()),
    "max pooling": nn.Sequential(nn.MaxPool2d(2), nn.Flatten()),
    "global max pooling": nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "zero padding": nn.ZeroPad2d(1),
    "reflection": nn.ReflectionPad2d(1),
    "pixel shuffle": nn.PixelShuffle(2),
    "nearest": nn.Upsample(scale_factor=2),
    "unflatten": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 16))),
    "relu behind pooling": nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
    "relu in place": nn.ReLU(inplace=True),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: torch.reshape(x, (x.shape[0], -1)),
    "flatten method": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3).contiguous(),
    "slice": lambda x: x[:, 1:, ::2],
    "item": lambda x: x[:, 0],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.pad": lambda x: F.pad(x, (1, 1)),
    "F.pad by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "F.interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "F.dropout": lambda x: F.dropout(x, 0.5, training=False),
    "F.dropout in training": nn.Sequential(Dropping(), nn.Flatten()),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "cat with itself": lambda x: torch.flip(x, (1,)),
    "detach and clone": lambda x: x.detach().clone(),
}


@pytest.mark.parametrize("seen", ["traced", "example"])
@pytest.mark.parametrize("name", PASSING)
def test_the_scale_comes_past_what_only_moves_codes(name: str, seen: str, monkeypatch: pytest.MonkeyPatch):
    x = vectors(2, 1, 6, 6)
    model = on_conv(PASSING[name])
    if seen == "example":
        make_untraceable(monkeypatch)
    qmodel = trainable_torch.wrap(model, how("outputs", rules=[FIRST]), x if seen == "example" else None)
    produced = trainable_torch.describe(qmodel).biases["fc.bias"]
    assert produced.endswith(": output")
    deployed = trainable_torch.finalize(train(trainable_torch.calibrate(qmodel, [x]), [x]))
    assert assert_every_bias_is_on_the_grid_of_its_input(deployed, x) == 2
    assert torch.equal(qmodel.eval()(x), deployed(x))


def make_untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model's forward do what symbolic tracing can't follow."""
    forward = Between.forward

    def opaque(self: Between, x: Tensor) -> Tensor:
        assert bool(x.isfinite().all())
        return forward(self, x)

    monkeypatch.setattr(Between, "forward", opaque)


def set_zero(x: Tensor) -> Tensor:
    y = x.flatten(1)
    y.clamp_(-0.31, 0.29)
    return y


def softened(x: Tensor) -> Tensor:
    torch.sigmoid_(x)
    return x


NOT_PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "square root": lambda x: x.abs().sqrt(),
    "division": lambda x: x / 3,
    "dropout that stays": lambda x: F.dropout(x, 0.3, training=True),
    "half precision": lambda x: x.half().float(),
    "padding with ones": nn.ConstantPad2d(1, 1.0),
    "F.pad with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "F.interpolate bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "instance norm by itself": F.instance_norm,
    "clamp in place": set_zero,
    "sigmoid in place": softened,
    "L2 normalization": F.normalize,
}


@pytest.mark.parametrize("seen", ["traced", "example"])
@pytest.mark.parametrize("name", NOT_PASSING)
def test_the_scale_does_not_come_past_what_makes_new_values(name: str, seen: str, monkeypatch: pytest.MonkeyPatch):
    x = vectors(2, 1, 6, 6)
    model = on_conv(NOT_PASSING[name])
    if seen == "example":
        make_untraceable(monkeypatch)
    example = x if seen == "example" else None
    with pytest.raises(UnsupportedConfigError, match=r"^fc\.bias: .*no quantizer makes that input"):
        trainable_torch.wrap(model, how("outputs", rules=[FIRST]), example)
    qmodel = ready_with(model, how(), x, example)  # in integers, it gets a quantizer of its own
    assert trainable_torch.describe(qmodel).biases["fc.bias"] == "fc: input"
    assert assert_every_bias_is_on_the_grid_of_its_input(trainable_torch.finalize(qmodel), x) == 2


def ready_with(model: nn.Module, recipe: Any, x: Tensor, example: Any = None) -> nn.Module:
    """Return the model wrapped with an example, and calibrated."""
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe, example), [x])


@pytest.mark.parametrize("place", ["conv", "between", "fc"])
def test_a_hook_that_may_change_what_a_layer_is_given_hides_the_scale(place: str):
    model = on_conv(nn.MaxPool2d(2))
    module: nn.Module = model.get_submodule(place)
    if place == "fc":
        module.register_forward_pre_hook(lambda _, args: (args[0] * 1.7,))
    else:
        module.register_forward_hook(lambda _, __, output: output * 1.7)
    with pytest.raises(UnsupportedConfigError, match=r"^fc\.bias: .*forward (pre )?hook"):
        trainable_torch.wrap(model, how("outputs", rules=[FIRST]))
    qmodel = ready_with(model, how(), vectors(2, 1, 6, 6))
    assert trainable_torch.describe(qmodel).biases["fc.bias"] == "fc: input"


# ---- the integer placement ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """What image models consist of: a stem, a residual addition, a concatenation, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.stem(x))))
        y = F.relu(self.body(x) + x)
        z = torch.cat([y, self.side(y)], 1)
        return self.fc(self.drop(F.adaptive_avg_pool2d(z, 1).flatten(1)))


class Opaque(Residual):
    """The same where tracing can't follow."""

    def forward(self, x: Tensor) -> Tensor:
        assert bool(x.isfinite().all())
        return super().forward(x)


PICTURE = vectors(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "example", "add", "relu", "cat", "mean"),
    [
        (Residual, None, "add", "relu_1", "cat", "adaptive_avg_pool2d"),
        (Opaque, PICTURE, "add", "activation", "cat", "pooling"),
    ],
)
def test_every_output_gets_a_quantizer_and_of_inputs_the_models(
    model: type[nn.Module], example: Any, add: str, relu: str, cat: str, mean: str, tmp_path: Path
):
    qmodel = ready_with(model(), how(), PICTURE, example)
    assert quantized_tensors(qmodel) == {
        "stem: input", "relu: output", "body: output", f"{relu}: output", "side: output", f"{cat}: output",
        f"{mean}: output", "fc: output",
    }  # fmt: skip
    assert trainable_torch.describe(qmodel).islands == {}
    assert trainable_torch.describe(qmodel).biases == {
        "stem.bias": "stem: input",
        "body.bias": "relu: output",
        "side.bias": f"{relu}: output",
        "fc.bias": f"{mean}: output",
    }
    deployed = trainable_torch.finalize(train(qmodel, [PICTURE]))
    assert assert_every_bias_is_on_the_grid_of_its_input(deployed, PICTURE) == 4
    assert torch.equal(qmodel.eval()(PICTURE), deployed(PICTURE))
    assert add not in {row.layer for row in trainable_torch.describe(qmodel).rows}  # relu is computed with it
    for name, saved in (("training", qmodel), ("deployed", deployed)):
        trainable_torch.save(saved, tmp_path / name)
        loaded = trainable_torch.load(tmp_path / name, model())
        assert same_state(saved, loaded)
        assert trainable_torch.describe(loaded).to_dict() == trainable_torch.describe(saved).to_dict()
        assert torch.equal(loaded.eval()(PICTURE), deployed(PICTURE))


@pytest.mark.parametrize("example", [None, PICTURE])
def test_what_is_given_the_same_float_tensor_shares_its_quantizer(example: Any):
    class FromInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if example is not None:
                assert bool(x.isfinite().all())
            return self.one(x) + self.two(x) + x

    qmodel = ready_with(FromInput(), how(), PICTURE, example)
    deployed = trainable_torch.finalize(train(qmodel, [PICTURE]))
    for model in (qmodel, deployed):
        held = [m for _, m in model.named_modules() if isinstance(m, ActivationQuantizationHolder)]
        one, two = model.one.input_holders["input"], model.two.input_holders["input"]
        assert one is two
        assert len(held) == 5  # the input's; the outputs of both layers and both additions
    assert torch.equal(qmodel.eval()(PICTURE), deployed(PICTURE))


def test_what_only_a_softer_function_uses_is_quantized_before_it_and_behind_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU6())
    qmodel = ready_with(model, how(), vectors(3, 4))
    assert quantized_tensors(qmodel) == {f"{i}: output" for i in (0, 1, 2, 3, 5)} | {"0: input"}
    assert set(trainable_torch.describe(qmodel).islands) == {"1", "3"}
    assert "computed in float:" in str(trainable_torch.describe(qmodel))
    deployed = trainable_torch.finalize(qmodel)
    assert assert_every_bias_is_on_the_grid_of_its_input(deployed, vectors(3, 4)) == 3


def test_functions_that_no_kernel_computes_are_islands_with_their_reason():
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.out(torch.exp(y).view(y.size(0), -1))

    qmodel = ready_with(Exponential(), how(), vectors(3, 4))
    assert trainable_torch.describe(qmodel).islands == {"exp": "no integer kernel is known for the function 'exp'"}
    assert quantized_tensors(qmodel) == {"fc: input", "fc: output", "out: input", "out: output"}


def test_an_empty_tensor_that_the_example_shows_needs_no_quantizer():
    """As the cache of keys and values before its first use."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            cache = x.new_zeros(int(x.shape[0]), 0)
            return self.out(torch.cat([cache, self.fc(x)], 1))

    x = vectors(3, 4)
    qmodel = ready_with(Cached(), how(), x, x)
    assert quantized_tensors(qmodel) == {"fc: input", "fc: output", "cat: output", "out: output"}
    assert assert_every_bias_is_on_the_grid_of_its_input(trainable_torch.finalize(qmodel), x) == 2


def test_a_layer_that_no_graph_shows_gets_quantizers_on_both_sides():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x) if bool(x.sum() > 0) else self.fc(-x))

    qmodel = ready_with(Branches(), how(), vectors(3, 4))
    assert quantized_tensors(qmodel) == {"fc: input", "fc: output", "out: input", "out: output"}
    assert "functional operations" in trainable_torch.describe(qmodel).left_out
    assert assert_every_bias_is_on_the_grid_of_its_input(trainable_torch.finalize(qmodel), vectors(3, 4)) == 2


def test_a_layer_behind_several_quantizers_gets_one_grid():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.one(x)) + self.head(self.two(x))

    qmodel = ready_with(Shared(), how(), vectors(3, 4))
    assert trainable_torch.describe(qmodel).biases["head.bias"] == "head: input"
    assert assert_every_bias_is_on_the_grid_of_its_input(trainable_torch.finalize(qmodel), vectors(3, 4)) == 4
    float_bias = ready_with(Shared(), {**how(), "bias": "float"}, vectors(3, 4))
    assert "head: input" not in quantized_tensors(float_bias)


def test_a_skipped_layer_is_an_island_and_what_follows_gets_a_quantizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    qmodel = ready_with(model, how(rules=[{"match": {"name": "1"}, "skip": True}]), vectors(3, 4))
    assert quantized_tensors(qmodel) == {"0: input", "0: output", "2: input", "2: output"}
    assert trainable_torch.describe(qmodel).left_out == {"1": "skipped by a rule"}


def test_a_quantizer_of_an_input_follows_the_rules_for_its_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qmodel = ready_with(model, how(rules=[{"match": {"name": "0"}, "activations": {"n_bits": 4}}]), vectors(3, 4))
    bits = {
        f"{row.layer}: {row.tensor}": row.n_bits
        for row in trainable_torch.describe(qmodel).rows
        if row.target != "Weights"
    }
    assert bits == {"0: input": 4, "0: output": 4, "1: output": 8}


def test_attention_and_recurrent_layers_are_islands():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.rnn, self.fc = (
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.GRU(4, 4),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x)
            return self.fc(self.rnn(x + y)[0])

    rules = [{"match": {"op": op}, "bias": "float"} for op in ("attention", "recurrent")]
    qmodel = ready_with(Block(), how(rules=rules), vectors(2, 3, 4))
    described = trainable_torch.describe(qmodel)
    assert set(described.islands) == {"attention", "rnn"}
    assert described.biases == {"fc.bias": "rnn: output"}
    assert assert_every_bias_is_on_the_grid_of_its_input(trainable_torch.finalize(qmodel), vectors(2, 3, 4)) == 1


def test_nothing_but_an_input_and_a_result_is_float():
    """In evaluation, every tensor that a layer, an addition, a pooling or a concatenation is given is on a grid."""
    deployed = trainable_torch.finalize(ready_with(Residual(), how(), PICTURE))
    results = []
    for module in deployed.modules():
        if isinstance(module, ActivationQuantizationHolder):
            module.register_forward_hook(lambda module, _, output: results.append((module, output)))
    y = deployed(PICTURE)
    assert results[-1][1] is y  # the result is the last quantizer's
    assert results[0][1].shape == PICTURE.shape  # and the first one's is the input
    assert all(torch.equal(module.activation_holder_quantizer(output), output) for module, output in results)
