"""No fast path is visible but by its speed: what is done with a layer and its output gives what the plain tier gives.

Every layer is called with all fast paths on, and again with all of them off, by the switch that users have. The outputs
must have the same bits, each gradient must be the same, and what raises must raise the same kind of error.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import trainable_torch
from tests.torch.models import spec
from trainable_torch.kernels import native, tier
from trainable_torch.training import quantizers_of

pytestmark = pytest.mark.skipif(tier.wanted() == tier.PLAIN, reason="there are no fast paths")

UNIT = 2.0**-24  # relative error of one float32 operation
ROUNDING = 2**12 * UNIT
"""Sums over at most some thousand terms, added in another order, of which the largest may cancel."""


@contextmanager
def plain() -> Iterator[None]:
    """Switch every fast path off, as the environment variable does for a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tier, "wanted", lambda: tier.PLAIN)
        patch.setattr(native, "compiled", lambda: None)
        yield


# ---- layers ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, as a model with one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    """A recurrent layer, as a model with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def one(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

LAYERS: dict[str, Case] = {
    "linear": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(5, 8)),
    "linear without bias, 3-D": (lambda: one(nn.Linear(8, 6, bias=False)), lambda: torch.randn(3, 5, 8)),
    "linear, 4-D": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(2, 3, 2, 8)),
    "linear, 1-D": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(8)),
    "linear, strided": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(8, 5).t()),
    "linear, expanded": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(1, 8).expand(5, 8)),
    "linear, empty batch": (lambda: one(nn.Linear(8, 6)), lambda: torch.randn(0, 8)),
    "conv1d": (lambda: one(nn.Conv1d(4, 6, 3, padding=1)), lambda: torch.randn(2, 4, 9)),
    "conv1d, unbatched": (lambda: one(nn.Conv1d(4, 6, 3)), lambda: torch.randn(4, 9)),
    "conv2d, grouped": (lambda: one(nn.Conv2d(4, 6, 3, stride=2, groups=2)), lambda: torch.randn(2, 4, 9, 8)),
    "conv2d, channels last": (
        lambda: one(nn.Conv2d(4, 6, 3, bias=False)).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last),
    ),
    "conv2d, same": (lambda: one(nn.Conv2d(4, 6, 3, padding="same")), lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: one(nn.Conv3d(2, 3, 2)), lambda: torch.randn(2, 2, 4, 5, 3)),
    "transposed": (lambda: one(nn.ConvTranspose2d(4, 6, 3)), lambda: torch.randn(2, 4, 5, 5)),
    "attention": (Attention, lambda: torch.randn(2, 5, 8)),
    "recurrent": (Recurrent, lambda: torch.randn(5, 2, 8)),
    "embedding": (lambda: one(nn.Embedding(9, 6)), lambda: torch.arange(12).view(3, 4) % 9),
}

STATES = "trained", "evaluated", "deployed"

RECIPES: dict[str, dict[str, Any]] = {
    "LSQ": {"weights": {**spec("LSQ"), "per_channel": True}, "activations": spec("LSQ")},
    "STE, outputs": {
        "weights": spec("STE", "UNIFORM"),
        "activations": {**spec("STE", "UNIFORM"), "placement": "outputs"},
    },
}


@functools.cache
def made(layer: str, recipe: str, state: str) -> tuple[nn.Module, Tensor]:
    """Return a model of one quantized layer and an input; the same ones at every call."""
    torch.manual_seed(0)
    build, batch = LAYERS[layer]
    module, x = build(), batch()
    seen = x if x.numel() else torch.randn(5, *x.shape[1:])
    how = {**RECIPES[recipe], "fold_batch_norm": False}
    model = trainable_torch.calibrate(trainable_torch.wrap(module, how), [seen])
    model = trainable_torch.finalize(model) if state == "deployed" else model
    return model.train(state == "trained"), x


# ---- what is done with them -----------------------------------------------------------------------------------------


def leaf(x: Tensor) -> Tensor:
    """Return a copy that lies in memory as the tensor does, and needs a gradient where it can."""
    if not x.is_floating_point():
        return x
    base = x.detach().clone(memory_format=torch.preserve_format)
    return base.requires_grad_()


def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Return the output and all gradients of a loss."""
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach(), x.grad, *[each.grad for each in model.parameters()]]


EDITS: dict[str, Callable[[nn.Module, Tensor], list[Tensor | None]]] = {}


def edit(function: Any) -> Any:
    """Take a function of model and input among those that every layer is tried with."""
    EDITS[function.__name__] = function
    return function


@edit
def nothing(model, x):
    return step(model, x, model(x))


@edit
def input_without_gradient(model, x):
    return step(model, x.detach(), model(x.detach()))


@edit
def non_leaf_input(model, x):
    return step(model, x, model(x * 2 if x.is_floating_point() else x))


@edit
def relu_in_place(model, x):
    return step(model, x, torch.relu_(model(x)))


@edit
def add_in_place(model, x):
    return step(model, x, model(x).add_(1.0))


@edit
def view_in_place(model, x):
    y = model(x)
    y[..., ::2].mul_(2.0)
    return step(model, x, y)


@edit
def flat_view_in_place(model, x):
    y = model(x)
    y.view(-1).add_(1.0)
    return step(model, x, y)


@edit
def element_set(model, x):
    y = model(x)
    y[..., 0] = 3.0
    return step(model, x, y)


@edit
def written_as_out(model, x):
    y = model(x)
    torch.add(y, 1.0, out=y)
    return step(model, x, y)


@edit
def reshaped_in_place(model, x):
    return step(model, x, model(x).unsqueeze_(0))


@edit
def detached_in_place(model, x):
    return step(model, x, model(x).detach_())


@edit
def tensor_hook(model, x):
    y = model(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return step(model, x, y)


@edit
def retained_gradient(model, x):
    y = model(x)
    if not y.requires_grad:
        return [y]
    y.retain_grad()
    return [*step(model, x, y), y.grad]


@edit
def parameter_hooks(model, x):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * 3)
    return step(model, x, model(x))


def wrapped(model):
    """Return the modules of a model that have weights to quantize, and the holders and quantizers."""
    return [each for each in model.modules() if each is not model and not isinstance(each, nn.ModuleDict)]


@edit
def forward_hooks(model, x):
    for module in wrapped(model):
        module.register_forward_hook(lambda _m, _i, y: y * 1.5 if isinstance(y, Tensor) else y)
    return step(model, x, model(x))


@edit
def forward_pre_hooks(model, x):
    for module in wrapped(model):
        module.register_forward_pre_hook(
            lambda _, given: tuple(
                each * 0.5 if isinstance(each, Tensor) and each.is_floating_point() else each for each in given
            )
        )
    return step(model, x, model(x))


@edit
def backward_hooks(model, x):
    for module in wrapped(model):
        module.register_full_backward_hook(
            lambda _m, given, _o: tuple(None if each is None else each * 2 for each in given)
        )
    return step(model, x, model(x))


@edit
def backward_pre_hooks(model, x):
    for module in wrapped(model):
        module.register_full_backward_pre_hook(
            lambda _, given: tuple(None if each is None else each * 2 for each in given)
        )
    return step(model, x, model(x))


@edit
def forward_of_a_holder_replaced(model, x):
    for module in wrapped(model):
        if isinstance(module, trainable_torch.ActivationQuantizationHolder):
            module.forward = lambda value: value * 0.25
    return step(model, x, model(x))


@edit
def retained_graph(model, x):
    y = model(x)
    if y.requires_grad:
        y.square().sum().backward(retain_graph=True)
    return step(model, x, y)


@edit
def two_forwards(model, x):
    first, second = model(x), model(x * 2 if x.is_floating_point() else x)
    return [first.detach(), *step(model, x, first * second)]


@edit
def differentiated_twice(model, x):
    y = model(x)
    wanted = [each for each in (x, *model.parameters()) if each.requires_grad]
    if not y.requires_grad:
        return [y]
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)
    total = sum(each.square().sum() for each in first if each is not None)
    second = torch.autograd.grad(total, wanted, allow_unused=True)
    return [y.detach(), *first, *second]


@edit
def differentiated_twice_by_the_input(model, x):
    y = model(x)
    if not y.requires_grad or not x.requires_grad:
        return [y]
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True, allow_unused=True)
    return [first, *step(model, x, y if first is None else first)]


@edit
def differentiated_thrice(model, x):
    if not x.requires_grad:
        return [x]
    y = torch.tanh(model(x)).sum()
    for _ in range(2):
        if not y.requires_grad:
            return [y]
        (found,) = torch.autograd.grad(y, x, create_graph=True, allow_unused=True)
        if found is None:
            return [None]
        y = found.sum()
    return step(model, x, y)


@edit
def rows_of_a_jacobian(model, x):
    y = model(x)
    if not y.requires_grad or not x.requires_grad:
        return [y]
    rows = torch.ones(2, *y.shape) * torch.tensor([1.0, 2.0]).view(2, *[1] * y.dim())
    return list(torch.autograd.grad(y, x, rows, is_grads_batched=True, allow_unused=True))


@edit
def checkpointed(model, x):
    return step(model, x, checkpoint(model, x, use_reentrant=False))


@edit
def checkpointed_reentrantly(model, x):
    return step(model, x, checkpoint(model, x, use_reentrant=True))


@edit
def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    return step(model, x, y)


@edit
def saved_tensors_hooks(model, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t):
        y = model(x)
    return step(model, x, y)


@edit
def inference_mode(model, x):
    with torch.inference_mode():
        y = [model(x) for _ in range(2)]
    return [*y, *step(model, x, model(x))]


@edit
def without_gradients(model, x):
    with torch.no_grad():
        y = [model(x) for _ in range(2)]
    return [*y, *step(model, x, model(x))]


@edit
def written_without_gradients(model, x):
    with torch.no_grad():
        model(x).zero_()
        return [model(x)]


@edit
def weights_edited_before_backward(model, x):
    y = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name and "quantizers" not in name:
                parameter.mul_(2)
    return step(model, x, y)


@edit
def thresholds_edited_before_backward(model, x):
    y = model(x)
    with torch.no_grad():
        for quantizer in quantizers_of(model).values():
            for name in quantizer.variable_names:
                quantizer.get_quantizer_variable(name).mul_(2)
    return step(model, x, y)


@edit
def input_edited_before_backward(model, x):
    given = x * 1 if x.is_floating_point() else x.clone()
    y = model(given)
    with torch.no_grad():
        given.mul_(0)
    return step(model, x, y)


@edit
def output_edited_before_backward(model, x):
    y = model(x)
    with torch.no_grad():
        y.mul_(0.5)
    return step(model, x, y)


@edit
def weights_and_thresholds_edited_between_forwards(model, x):
    results = []
    for factor in (1.0, 1.5, 0.5):
        with torch.no_grad():
            results.append(model(x))
            for each in model.state_dict().values():
                if each.is_floating_point():
                    each.data.mul_(factor)  # what no counter sees
            results.append(model(x))
    return results


@edit
def functional_call(model, x):
    weights = {name: each * 0.5 for name, each in model.named_parameters()}
    return [model(x), torch.func.functional_call(model, weights, (x,)), model(x)]


@edit
def copied_after_a_forward(model, x):
    model(x)
    copied = copy.deepcopy(model)
    return [*step(copied, x, copied(x)), *step(model, x, model(x))]


@edit
def vectorized(model, x):
    if not x.dim():
        return [x]
    with torch.no_grad():
        return [torch.vmap(model, in_dims=0, randomness="same")(torch.stack([x, x]))]


@edit
def threads(model, x):
    found: list[Any] = [None] * 4

    def run(index):
        with torch.no_grad():
            found[index] = [model(x) for _ in range(5)]

    running = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return [each for results in found for each in results]


# ---- the law --------------------------------------------------------------------------------------------------------


def tried(function, model, x) -> Any:
    """Return what a function gives, or the kind of error that it raises."""
    copied = copy.deepcopy(model)
    given = leaf(x)
    if x.dim() > 1 and x.stride(0) == 0:
        given = leaf(x[:1]).expand(x.shape)
        given.retain_grad()
    try:
        return function(copied, given)
    except Exception as error:  # noqa: BLE001 - both ways must raise the same
        return type(error)


def assert_same(found: Any, expected: Any, which: str) -> None:
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected, f"{which}: {found}, not {expected}"
        return
    assert len(found) == len(expected)
    for index, (one_, other) in enumerate(zip(found, expected, strict=True)):
        assert (one_ is None) == (other is None), f"{which}, result {index}: {one_}, not {other}"
        if one_ is None or torch.equal(one_, other):
            continue
        assert index > 0, f"{which}: other bits"  # the first result is the output, all others are gradients
        assert (one_.shape, one_.dtype, one_.requires_grad) == (other.shape, other.dtype, other.requires_grad)
        largest = float(other.detach().abs().max())
        assert torch.allclose(one_, other, rtol=ROUNDING, atol=ROUNDING * largest), f"{which}, result {index}"


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, where it loops
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of checkpoints
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_fast_path_can_be_told_from_the_plain_tier(layer: str, name: str) -> None:
    for recipe, state in itertools.product(RECIPES, STATES):
        model, x = made(layer, recipe, state)
        found = tried(EDITS[name], model, x)
        with plain():
            expected = tried(EDITS[name], model, x)
        assert_same(found, expected, f"{recipe}, {state}")


# ---- second derivatives ---------------------------------------------------------------------------------------------


def test_second_derivatives_are_differences_of_the_first_where_these_are_smooth() -> None:
    """Between two ties the gradient of a threshold is linear in the input; all numbers here are exact in binary."""
    how = {"activations": spec("LSQ"), "fold_batch_norm": False}
    model = trainable_torch.calibrate(trainable_torch.wrap(one(nn.Linear(4, 3)), how), [torch.randn(5, 4)]).train()
    (quantizer,) = quantizers_of(model).values()
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.25, 1.0, 1.0, -1.0], [2.0, 0.5, -0.5, 1.0]])
    with torch.no_grad():
        quantizer.threshold.fill_(4.0)  # steps of 0.5 at 4 bits
        model[0].weight.copy_(weight)
    x = torch.tensor([[0.125, -1.375, 2.625, 9.0], [-0.875, 0.625, -9.0, 1.125]])

    def first(x: Tensor, *, create_graph: bool = False) -> Tensor:
        return torch.autograd.grad(model(x).sum(), quantizer.threshold, create_graph=create_graph)[0]

    given = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(first(given, create_graph=True), given)
    width = 2.0**-6  # no element passes a tie
    for row, column in itertools.product(range(2), range(4)):
        offset = torch.zeros_like(x)
        offset[row, column] = width
        difference = float(first(x + offset) - first(x - offset)) / (2 * width)
        # A first derivative is below 2**3 (8 terms of at most 5.5 * 8 codes, times 1/8 and LSQ's 0.13) and comes by
        # fewer than 2**3 rounded operations; half the sum of two such errors is left of the difference.
        assert abs(float(found[row, column]) - difference) <= 2**3 * UNIT * 2**3 / width
    assert found.count_nonzero() == 6  # the elements inside of the range


# ---- what a deployed layer is made of -------------------------------------------------------------------------------


def parts(model: nn.Module) -> tuple[Any, Any, Any]:
    """Return a layer, the quantizer of its weight, and that of its input."""
    layer = model[0]  # type: ignore[index]
    (holder,) = layer.input_holders.values()
    return layer, layer.weights_quantizers["weight"], holder.activation_holder_quantizer


CHANGES: dict[str, Callable[[nn.Module, Any, Any, Any], object]] = {
    "weight in place": lambda _, layer, *__: layer.weight.detach().mul_(1.5),
    "weight's data": lambda _, layer, *__: layer.weight.data.mul_(1.5),
    "new data": lambda _, layer, *__: setattr(layer.weight, "data", layer.weight.data * 1.5),
    "transposed data": lambda _, layer, *__: setattr(layer.weight, "data", layer.weight.data.t()),
    "transposed in place": lambda _, layer, *__: layer.weight.t_(),
    "one element": lambda _, layer, *__: layer.weight.data.view(-1)[5:6].neg_(),
    "through NumPy": lambda _, layer, *__: layer.weight.detach().numpy().__imul__(1.5),
    "new parameter": lambda _, layer, *__: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 1.5)),
    "bias": lambda _, layer, *__: layer.bias.data.add_(1.0),
    "scale of the weight": lambda *given: given[2].grid_scale.mul_(2.0),
    "scale of the weight through NumPy": lambda *given: given[2].grid_scale.numpy().__imul__(2.0),
    "end of the weight": lambda *given: given[2].grid_high.data.fill_(1.0),
    "new buffer": lambda *given: setattr(given[2], "grid_scale", given[2].grid_scale * 2.0),
    "scale of the input": lambda *given: given[3].grid_scale.data.mul_(2.0),
    "end of the input": lambda *given: given[3].grid_low.data.fill_(-1.0),
    "new scale of the input": lambda *given: setattr(given[3].grid_scale, "data", given[3].grid_scale * 2.0),
    "loaded": lambda model, *_: model.load_state_dict(
        {name: each * 0.5 for name, each in floats(model).items()}, strict=False
    ),
    "assigned": lambda model, *_: model.load_state_dict(
        {name: each * 0.5 for name, each in floats(model).items()}, strict=False, assign=True
    ),
    "half precision and back": lambda model, *_: model.to(torch.bfloat16).to(torch.float32),
    "another quantizer": lambda _, layer, of_weight, __: layer.weights_quantizers.__setitem__(
        "weight", coarser(of_weight)
    ),
    "another quantizer of the input": lambda *given: setattr(
        next(iter(given[1].input_holders.values())), "activation_holder_quantizer", coarser(given[3])
    ),
    "hook on a quantizer": lambda *given: given[2].register_forward_hook(lambda _m, _i, y: y * 2),
    "hook on the input's quantizer": lambda *given: given[3].register_forward_hook(lambda _m, _i, y: y * 2),
    "forward of a quantizer": lambda *given: setattr(given[2], "forward", lambda weight: weight * 0.5),
    "pruned": lambda _, layer, *__: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda _, layer, *__: parametrize.register_parametrization(layer, "weight", Halved()),
}


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def floats(model: nn.Module) -> dict[str, Tensor]:
    """Return the float weights of a model's state."""
    return {name: each for name, each in copy.deepcopy(model.state_dict()).items() if name.endswith(("weight", "bias"))}


def coarser(quantizer: Any) -> Any:
    """Return a copy of a deployed quantizer with steps twice as wide."""
    copied = copy.deepcopy(quantizer)
    copied.grid_scale.mul_(2.0)
    return copied


@pytest.mark.parametrize("size", [8, 96])  # a weight that is compared by content, and one that is not
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_deployed_layer_sees_every_change(name: str, size: int) -> None:
    torch.manual_seed(0)
    how = {**RECIPES["LSQ"], "fold_batch_norm": False}
    x = torch.randn(5, size)
    model = trainable_torch.calibrate(trainable_torch.wrap(one(nn.Linear(size, size)), how), [x])
    model = trainable_torch.finalize(model).eval()
    model(x)
    before = model(x)
    CHANGES[name](model, *parts(model))
    after = model(x)
    with plain():
        assert torch.equal(after, model(x))
    assert not torch.equal(after, before)
    assert torch.equal(after, model(x))


# ---- layers that write into their input -----------------------------------------------------------------------------


class Residual(nn.Module):
    """Reads a tensor after an activation was computed in its place."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(8, 8), activation, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.activation(hidden))


class Scaled(nn.ReLU):
    """Writes into its input, and no attribute says so."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        return input.mul_(0.5)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "make",
    [lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True), lambda: nn.ELU(inplace=True), Scaled],
    ids=["relu", "silu", "elu", "unsaid"],
)
def test_what_a_layer_writes_into_its_input_is_read_there(make: Callable[[], nn.Module], state: str) -> None:
    torch.manual_seed(0)
    model, x = Residual(make()), torch.randn(5, 8)
    how = {"activations": spec("LSQ"), "rules": [{"match": {"op": "activation"}, "activations": spec("LSQ")}]}
    qmodel: Any = trainable_torch.calibrate(trainable_torch.wrap(model, how), [x])
    qmodel = trainable_torch.finalize(qmodel) if state == "deployed" else qmodel
    qmodel.train(state == "trained")

    def by_hand(x: Tensor) -> Tensor:
        """Compute what the float model says, with the activation's input quantized: the sum of two equal tensors."""
        (holder,) = qmodel.activation.input_holders.values()
        result = make()(holder(qmodel.first(x)))
        return qmodel.last(result + result)

    for _ in range(2):
        found, expected = (
            step(each, leaf(x), forward(leaf(x)))
            for each, forward in ((qmodel, qmodel), (qmodel, by_hand))
            if each.zero_grad() is None
        )
        assert torch.equal(found[0], expected[0])
        for one_, other in zip(found[2:], expected[2:], strict=True):
            assert (one_ is None) == (other is None)
            assert one_ is None or torch.allclose(one_, other, rtol=ROUNDING, atol=ROUNDING * float(other.abs().max()))
    with torch.inference_mode():
        assert torch.equal(qmodel(x), by_hand(x))
