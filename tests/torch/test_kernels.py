"""The fast kernels against the plain formula, bit for bit: sizes around the chunks, every memory layout and axis.

Every test runs on both tiers: on the loops that numba compiles, and on PyTorch's own operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.torch.strategies import assert_same_bits
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.kernels import eligible, native, tier

AXES = [None, 0, 1, 2, -1]
CHUNK = 256  # instead of native.CHUNK: the boundaries are at sizes that tests can afford
SIZES = [1, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17]


pytestmark = pytest.mark.skipif(tier.wanted() == tier.PLAIN, reason="the fast kernels are switched off")


@pytest.fixture(params=["native", "passes"], autouse=True)
def each_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the loops that numba compiles, or without them."""
    if request.param == "passes":
        monkeypatch.setattr(native, "compiled", lambda: None)
    elif native.compiled() is None:
        pytest.skip("there are no compiled loops")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CHUNK", CHUNK)


def grid_for(shape: tuple[int, ...], axis: int | None, *, uniform: bool, n_bits: int = 4) -> Grid:
    """Return a grid with scales and zero points that differ, as leaves that learn."""
    count = 1 if axis is None else shape[axis]
    sizes = [1] * len(shape)
    if axis is not None:
        sizes[axis] = -1
    scale = (0.1 + 0.05 * torch.arange(count)).reshape(() if axis is None else sizes)
    zero = (torch.arange(count) * 5 % 2**n_bits if uniform else torch.zeros(count)).float().reshape(scale.shape)
    if axis is None and uniform:
        zero = torch.tensor(7.0)
    ends = (0, 2**n_bits - 1) if uniform else (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
    return Grid(scale.requires_grad_(), zero.requires_grad_(), *ends, centered=not uniform)


def values(shape: tuple[int, ...], grid: Grid, special: bool = True) -> Tensor:
    """Return normal numbers with ties, ends of the range and their neighbours, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=generator)
    low, high = (torch.as_tensor(end) * grid.scale.detach() for end in grid.ends)
    which = torch.randint(0, 40, shape, generator=generator)
    for number, value in enumerate((low, high, torch.nextafter(low, -torch.ones(())), torch.nextafter(high, high + 1))):
        x = torch.where(which == number, value, x)
    x = torch.where(which == 4, grid.scale.detach() * 1.5, x)
    x = torch.where(which == 5, -0.0, x)
    if special:
        for number, value in enumerate((math.nan, math.inf, -math.inf, 1e-45), start=6):
            x = torch.where(which == number, value, x)
    return x


def both(x: Tensor, upstream: Tensor, grid: Grid, rule: str) -> list[list[Tensor | None]]:
    """Return value, input gradient and grid gradients: from the kernels, and from the plain expression."""
    found = []
    for fast in (True, False):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        grid.scale.grad = grid.zero_point.grad = None
        with pytest.MonkeyPatch.context() as patch:
            if not fast:
                patch.setattr(eligible, "fits", lambda *_: False)
            y = ops.ste_fake_quantize(leaf, grid) if rule == "ste" else ops.lsq_fake_quantize(leaf, grid, 0.25)
            y.backward(upstream)
        found.append([y.detach(), leaf.grad, grid.scale.grad, grid.zero_point.grad])
    return found


def check(x: Tensor, upstream: Tensor, grid: Grid, rule: str) -> None:
    fast, plain = both(x, upstream, grid, rule)
    assert_same_bits(fast[0], plain[0])
    assert fast[1].tolist() == plain[1].tolist()
    sharing = x.numel() / grid.scale.numel()
    for one, other in zip(fast[2:], plain[2:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            # Sums of the same terms in another order: n terms of at most 16 * |upstream|, float32.
            bound = sharing * 2.0**-24 * 16 * float(upstream.abs().max()) * sharing
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=bound)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
@pytest.mark.parametrize("size", SIZES)
def test_one_scale_at_sizes_around_the_chunks(size: int, rule: str, uniform: bool, threads: int) -> None:
    grid = grid_for((size,), None, uniform=uniform)
    for special in (True, False):  # NaN sends the sums to the plain expression, so both
        x = values((size,), grid, special)
        check(x, torch.randn(size), grid, rule)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (17, 16, 4), (40, 3, 33), (2, 300, 5), (1, 9, 64)])
def test_every_axis_at_sizes_around_the_chunks(
    shape: tuple[int, ...], axis: int | None, rule: str, uniform: bool
) -> None:
    grid = grid_for(shape, axis, uniform=uniform)
    for special in (True, False):
        check(values(shape, grid, special), torch.randn(shape), grid, rule)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("form", ["channels_last", "transposed", "strided", "expanded", "offset"])
def test_every_memory_layout(
    form: str, axis: int | None, rule: str, uniform: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(native, "CHUNK", CHUNK)
    shape = (4, 6, 5, 3)
    grid = grid_for(shape, axis, uniform=uniform)
    x = values(shape, grid, special=False)
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": lambda: torch.cat([x, x], 3)[..., ::2],
        "expanded": lambda: x[:, :, :1].expand(shape),
        "offset": lambda: torch.cat([x[:1], x])[1:],
    }[form]()
    for upstream in (torch.randn(shape), torch.ones(()).expand(shape), torch.randn(shape[::-1]).permute(3, 2, 1, 0)):
        check(x, upstream, grid, rule)


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 3 * 2**15 + 5, native.CHUNK + 65])
def test_nan_passes_no_gradient_however_the_threads_share_the_work(size: int, threads: int) -> None:
    """The sign bit of a NaN is set or not, and says nothing about the range; one alone must be seen as well."""
    grid = grid_for((size,), None, uniform=False)
    for value in (math.nan, -math.nan):
        x = torch.full((size,), value, requires_grad=True)
        ops.ste_fake_quantize(x, grid).sum().backward()
        assert not x.grad.any()
        alone = torch.zeros(size)
        alone[size // 2] = value
        ops.ste_fake_quantize(alone.requires_grad_(), grid).sum().backward()
        assert alone.grad.sum() == size - 1


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_ends_of_every_range_are_told_apart_from_their_neighbours(n_bits: int, rule: str) -> None:
    """Per channel, all zero points at once: one element is inside and the next float32 number is not."""
    zero = torch.arange(2.0**n_bits)[:, None]
    grid = Grid(torch.ones_like(zero), zero, 0, 2**n_bits - 1, centered=False)
    if n_bits == 1:
        grid = Grid(torch.ones(2, 1), torch.tensor([[0.0], [1.0]]), 0, 1, centered=False)
    points = []
    for end in grid.ends:
        up = down = end
        points.append(end)
        for _ in range(4):
            up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(-math.inf))
            points += [up, down]
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e-45, -1e-45, 2.0**-126, -(2.0**-126)])
    x = torch.cat([*points, special.expand(zero.shape[0], -1)], 1).requires_grad_()
    low, high = grid.ends
    learned = Grid(grid.scale.clone().requires_grad_(), zero, 0, 2**n_bits - 1, centered=False)
    y = ops.ste_fake_quantize(x, grid) if rule == "ste" else ops.lsq_fake_quantize(x, learned, 1.0)
    y.backward(torch.ones_like(x))
    inside = (x >= low) & (x <= high) if rule == "ste" else (x > low) & (x < high)
    assert torch.equal(x.grad != 0, inside)


@pytest.mark.parametrize("scale", [2.0**-116, 1e-30, 0.1, 1 / 3, 1.0, 1e20, 2.0**100])
@pytest.mark.parametrize("ends", [(-8, 7), (-1, 0), (0, 1), (0, 255), (-32768, 32767)])
@pytest.mark.parametrize("frozen", [False, True])
def test_ends_of_one_range_are_told_apart_from_their_neighbours(
    scale: float, ends: tuple[int, int], frozen: bool
) -> None:
    """For one scale the bounds are searched on the float32 numbers; frozen LSQ leaves its ends out."""
    grid = Grid(torch.tensor(scale), torch.tensor(0.0), *ends, centered=True)
    points = [torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan])]
    for end in ends:
        up = down = torch.tensor([float(end)]) * scale
        points.append(up)
        for _ in range(4):
            up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(-math.inf))
            points += [up, down]
    x = torch.cat(points).requires_grad_()
    y = ops.lsq_fake_quantize(x, grid, 1.0) if frozen else ops.ste_fake_quantize(x, grid)
    y.backward(torch.ones_like(x))
    steps = x.detach() * torch.tensor(scale).reciprocal()
    low, high = ends
    inside = (steps > low) & (steps < high) if frozen else (steps >= low) & (steps <= high)
    assert torch.equal(x.grad != 0, inside)


@pytest.mark.parametrize("rule", ["ste", "lsq"])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_backward_pass_can_be_differentiated_and_vectorized(rule: str, axis: int | None) -> None:
    grid = grid_for((4, 8), axis, uniform=True)
    x = values((4, 8), grid, special=False).requires_grad_()

    def quantized() -> Tensor:
        return ops.ste_fake_quantize(x, grid) if rule == "ste" else ops.lsq_fake_quantize(x, grid, 1.0)

    leaves = [x] if rule == "ste" else [x, grid.scale]
    first = torch.autograd.grad(quantized().pow(2).sum(), leaves, create_graph=True)
    plain = torch.autograd.grad(quantized().pow(2).sum(), leaves)
    assert all(torch.equal(one, other) or torch.allclose(one, other) for one, other in zip(first, plain, strict=True))
    second = torch.autograd.grad(sum(each.sum() for each in first), leaves, allow_unused=True)
    assert second[0] is not None
    rows = torch.eye(32).view(32, 4, 8)
    together = torch.autograd.grad(quantized(), x, rows, is_grads_batched=True)[0]
    each = torch.stack([torch.autograd.grad(quantized(), x, row)[0] for row in rows])
    assert torch.equal(together, each)
    upstream = torch.ones_like(x).requires_grad_()
    (d_x,) = torch.autograd.grad(quantized(), x, upstream, create_graph=True)
    (twice,) = torch.autograd.grad(d_x, upstream, rows, is_grads_batched=True)
    assert torch.equal(twice, each)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")  # mctq exports by it
def test_what_is_traced_or_transformed_is_left_to_the_plain_expression() -> None:
    assert eligible.fits(torch.ones(2))
    assert not eligible.fits(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not eligible.fits(torch.ones(2, device="meta"))
    seen = []
    torch.vmap(lambda x: seen.append(eligible.is_eager(x)) or x)(torch.ones(2))
    torch.jit.trace(lambda x: seen.append(eligible.is_eager(x)) or x * 1, torch.ones(2), check_trace=False)
    with torch._subclasses.FakeTensorMode():  # noqa: SLF001 - the public way is torch.export
        seen.append(eligible.is_eager(torch.ones(2)))
    assert len(seen) >= 3  # a trace may call it more than once
    assert not any(seen)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_what_is_kept_for_backward_is_the_input_alone(rule: str, axis: int | None) -> None:
    """Counted in bytes by the hooks that see whatever is saved; numbers of the grid are one per channel."""
    shape = (8, 16, 64)
    grid = grid_for(shape, axis, uniform=True)
    x = torch.randn(shape, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = ops.ste_fake_quantize(x, grid) if rule == "ste" else ops.lsq_fake_quantize(x, grid, 1.0)
    assert y.requires_grad
    others = sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != x.data_ptr())
    assert others <= 2 * grid.scale.nbytes
