"""The loops that numba compiles: when there are none, and that threads and processes change nothing."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trainable_torch
from trainable_core.validation import MAX_THRESHOLD
from trainable_torch import ops
from trainable_torch.grid import Form, SymmetricScale, UniformGrid
from trainable_torch.kernels import memory, native, tier

numba = pytest.importorskip("numba", reason="numba is not installed")

loops = pytest.importorskip("trainable_torch.kernels.loops", reason="numba is not installed")

pytestmark = [
    pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="numba is told not to compile"),
    pytest.mark.skipif(tier.wanted() not in {None, tier.NATIVE}, reason="another tier of kernels is asked for"),
]

ROOT = Path(__file__).parents[2]
RECIPE = {"activations": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "STE"}}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def snapped(x, grid, shape, *, marking=False):
    """Return a tensor that the loops snapped to a grid whose scale has the shape, and the marks."""
    x, where = native.lines(x, shape)
    return native.snap(x, grid, where, marking=marking)


def passed(x, upstream, grid, shape, *, closed, reuse=False, marks=None):
    """Return the gradient that the loops pass inside of the range."""
    x, where = native.lines(x, shape)
    return native.pass_inside(x, upstream, grid, where, closed=closed, reuse=reuse, marks=marks)


def learned(x, upstream, grid, shape, *, outside, reuse=False):
    """Return the input's gradient and the sums of each line."""
    x, where = native.lines(x, shape)
    return native.learned(x, upstream, grid, where, outside=outside, reuse=reuse)


def symmetric(threshold, shape, power_of_two=False, steps=8.0):
    """Return a signed grid of 4 bits."""
    return native.grid_of(Form(SymmetricScale, (LOW, steps, power_of_two), -8, 7, centered=True), [threshold], shape)


def found_anew():
    """Return the loops as a new process finds them."""
    return native.compiled.__wrapped__()


def test_with_numba_there_are_loops():
    """Else every other test of them would be one of PyTorch's kernels."""
    assert native.compiled() is not None


def test_the_loops_are_compiled_to_vector_instructions():
    """Without them a single pass is slower than PyTorch's several."""
    pointers, numbers = [numba.types.voidptr] * 7, [numba.int64] * 7
    code = numba.cfunc(numba.void(*pointers, *numbers))(loops.snap).inspect_llvm()
    assert "x float> @llvm.rint" in code or "x float> @llvm.nearbyint" in code or "x float> @llvm.roundeven" in code


@pytest.mark.parametrize("error", [ImportError("no numba"), SystemError("numba wants another llvmlite")])
def test_without_numba_or_with_a_broken_one_there_are_none(error, monkeypatch):
    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                raise error

    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    assert found_anew() is None


def test_numba_told_not_to_compile_is_as_good_as_none(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert found_anew() is None


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError(28, "No space left on device")])
def test_they_are_compiled_where_nothing_can_be_kept(error, monkeypatch):
    compiling = numba.cfunc

    def cfunc(signature, cache=False):
        if cache:
            raise error
        return compiling(signature)

    monkeypatch.setattr(numba, "cfunc", cfunc)
    found = found_anew()
    monkeypatch.setattr(native, "_loops", lambda: found)
    x = torch.tensor([0.24, 0.26, -9.0])
    assert ops.snap(x, torch.tensor(0.5), -8, 7).tolist() == [0.0, 0.5, -4.0]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_threads_share_large_tensors_and_change_no_bit(axis):
    shape = (6, 5, native.SHARE // 6 + 17)
    x, upstream = torch.randn(shape), torch.randn(shape)
    sizes = [size if index == axis else 1 for index, size in enumerate(shape)]
    count = [] if axis is None else sizes
    scale = torch.linspace(0.1, 0.2, 1 if axis is None else shape[axis]).view(count)
    zero_point = torch.arange(float(scale.numel())).view(count)
    grid = native.given(scale, -zero_point, 15 - zero_point)
    found = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        gradients = learned(x, upstream, grid, scale.shape, outside=True)
        values, _ = snapped(x, grid, scale.shape)
        found.append([values, passed(x, upstream, grid, scale.shape, closed=True), *gradients])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_a_sum_over_many_lines_is_close_to_the_exact_one():
    n = 3 * native.CHUNK + 17
    x, upstream = torch.randn(n), torch.rand(n)
    grid = native.given(torch.tensor(0.1), -8, 7)
    _, sums = learned(x, upstream, grid, (), outside=False)
    found = native.total(sums, native.lines(x, ())[1])
    steps = x * torch.tensor(0.1).reciprocal()
    inside = (steps > -8) & (steps < 7)
    slope = torch.where(inside, steps.round() - steps, steps.clamp(-8, 7).round())
    terms = (upstream * slope).double()
    # A term passes at most CHUNK / BLOCK = 512 additions one after the other, 8 more in halves, each of relative
    # error 2**-24 of a partial sum that is at most the sum of magnitudes; the lines are added in float64, rounded once.
    assert abs(float(found) - float(terms.sum())) <= 521 * 2.0**-24 * float(terms.abs().sum())


def test_views_that_negate_are_read_as_what_they_mean():
    x = torch.complex(torch.zeros(9), torch.linspace(-2, 2, 9)).conj().imag
    assert x.is_neg()
    grid = torch.tensor(0.5), -2, 1
    plain = x.clone().contiguous().resolve_neg()
    assert torch.equal(ops.snap(x, *grid), ops.snap(plain, *grid))
    for closed in (True, False):
        found = passed(plain, x, native.given(*grid), (), closed=closed)
        assert torch.equal(found, passed(plain, plain, native.given(*grid), (), closed=closed))


LOW = 2.0**-16
NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, LOW, LOW / 2, 1e-45, -1e-45, 3e38, -3e38]
NUMBERS += [MAX_THRESHOLD, MAX_THRESHOLD / 2, -MAX_THRESHOLD / 2, 2.0**-126, 1 / 3, 127.0]


def pairs():
    """Return every pair of special numbers, then random ones of many magnitudes."""
    first, second = (each.reshape(-1) for each in torch.meshgrid(*[torch.tensor(NUMBERS)] * 2, indexing="ij"))
    some = torch.randn(2, 5000) * torch.exp2(torch.randint(-30, 30, (2, 5000)).float())
    return torch.cat([first, some[0]]), torch.cat([second, some[1]])


def assert_same_numbers(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))


def assert_numbers(found, scale, zero_point, quant_min, quant_max):
    """Assert that the loops make what the functions of tensors do, and what follows from it."""
    low, high = quant_min - zero_point, quant_max - zero_point
    for row, expected in zip(found.rows, (scale.reciprocal(), scale, low, high), strict=True):
        assert torch.equal(row, torch.as_tensor(expected).expand(row.shape))
    assert found.numbers().scale.shape == scale.shape


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("steps", [1.0, 8.0, 32768.0])
def test_symmetric_grids_are_those_of_tensors(power_of_two, steps):
    thresholds, upstreams = pairs()
    arguments = LOW, steps, power_of_two
    form = Form(SymmetricScale, arguments, -8, 7, centered=True)
    scale, _ = form.numbers([thresholds], thresholds.shape)
    grid = native.grid_of(form, [thresholds], thresholds.shape)
    assert_numbers(grid, scale, 0.0, -8, 7)
    sums = upstreams.double()[None]  # one line each; as if all were upstream gradients of the scale
    (found,) = native.gradients(form, [thresholds], grid, sums, 0.25)
    assert_same_numbers([found], form.gradients([thresholds], (scale, None), (upstreams * 0.25, None)))
    assert found.any()
    for threshold in thresholds[:: len(thresholds) // 50]:
        one = native.grid_of(form, [threshold], ())
        assert_numbers(one, SymmetricScale.forward(threshold, *arguments), 0.0, -8, 7)


@pytest.mark.parametrize("n_bits", [1, 2, 8, 16])
def test_uniform_grids_are_those_of_tensors(n_bits):
    ends = pairs()
    form = Form(UniformGrid, (LOW, n_bits), 0, 2**n_bits - 1, centered=False)
    scale, zero_point = form.numbers(ends, ends[0].shape)
    grid = native.grid_of(form, ends, ends[0].shape)
    assert_numbers(grid, scale, zero_point, 0, 2**n_bits - 1)
    for slopes, outside in (pairs()[::-1], tuple(torch.randn(2, ends[0].numel()))):
        found = native.gradients(form, ends, grid, torch.stack([slopes, outside]).double(), 0.25)
        d_grid = slopes * 0.25, -outside * scale * 0.25
        assert_same_numbers(found, form.gradients(ends, (scale, zero_point), d_grid))
        assert all(each.any() for each in found)


def test_the_sums_of_a_channels_lines_are_added_exactly():
    """Three channels, four lines each: float64, rounded once."""
    sums = torch.tensor([[2.0**30, 1.0, 0.0, 1.0, 2.0**-30, 0.5, -(2.0**30), 1.0, 0.5, 2.0**-20, 0.0, 0.0]]).double()
    form = Form(SymmetricScale, (LOW, 8.0, False), -8, 7, centered=True)
    grid = native.grid_of(form, [torch.ones(3)], (3,))
    (found,) = native.gradients(form, [torch.ones(3)], grid, sums, 8.0)
    assert found.tolist() == [1.0 + 2.0**-20, 2.0, 1.0]
    total = native.total(sums, native.Lines(12, 1, 3, 12))
    assert total.tolist() == [found.tolist()]


def test_an_input_gradient_may_take_the_place_of_the_upstream_one():
    """The loops read what they overwrite, also where threads share a tensor."""
    x, upstream = torch.randn(2 * native.SHARE + 5), torch.randn(2 * native.SHARE + 5)
    grid = symmetric(torch.tensor(1.5), ())
    torch.set_num_threads(2)
    y, marks = snapped(x, grid, (), marking=True)
    assert torch.equal(y, snapped(x, grid, ())[0])
    place = upstream.clone()
    passed(x, place, grid, (), closed=True, reuse=True, marks=marks)
    assert torch.equal(place, passed(x, upstream, grid, (), closed=True))
    for closed in (True, False):
        expected = passed(x, upstream, grid, (), closed=closed)
        place = upstream.clone()
        assert passed(x, place, grid, (), closed=closed, reuse=True) is place
        assert torch.equal(place, expected)
    for outside in (True, False):
        expected, sums = learned(x, upstream, grid, (), outside=outside)
        place = upstream.clone()
        found, same = learned(x, place, grid, (), outside=outside, reuse=True)
        assert found is place
        assert torch.equal(place, expected)
        assert torch.equal(same, sums)
        strided = upstream.repeat_interleave(2)[::2]  # which lies otherwise: a place of its own
        other, _ = learned(x, strided, grid, (), outside=outside, reuse=True)
        assert torch.equal(other, expected)
        assert torch.equal(strided, upstream)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_parts_with_nothing_outside_are_left_alone_and_no_other(axis):
    """Elements at the ends and beside them, NaN and infinities, each alone in its part; lines of odd lengths."""
    shape = (3, 2, 2 * memory.PART + 70)
    sizes = [size if index == axis else 1 for index, size in enumerate(shape)]
    threshold = torch.linspace(1.0, 1.5, 1 if axis is None else shape[axis]).reshape(() if axis is None else -1)
    scale_shape = () if axis is None else tuple(sizes)
    grid = symmetric(threshold, scale_shape)
    numbers = grid.numbers()
    ends = numbers.low * numbers.scale, numbers.high * numbers.scale
    clean = torch.rand(shape) * 0.8
    assert not any(snapped(clean, grid, scale_shape, marking=True)[1])
    beyond = [torch.nextafter(ends[0], torch.tensor(-9.0)), torch.nextafter(ends[1], torch.tensor(9.0))]
    special = [*ends, *beyond, *map(torch.tensor, (math.nan, math.inf, -math.inf, -0.0))]
    for where, value in itertools.product((0, memory.PART - 1, memory.PART, shape[-1] - 1), special):
        x = clean.clone()
        x[1, 1, where] = value.expand(shape)[1, 1, where]
        y, marks = snapped(x, grid, scale_shape, marking=True)
        upstream = torch.randn(shape)
        assert torch.equal(y.nan_to_num(), snapped(x, grid, scale_shape)[0].nan_to_num())
        expected = passed(x, upstream, grid, scale_shape, closed=True)
        place = upstream.clone()
        assert torch.equal(passed(x, place, grid, scale_shape, closed=True, reuse=True, marks=marks), expected)
        assert sum(map(bool, marks)) == int(expected[1, 1, where] != upstream[1, 1, where])
        # where marks are not for it, they are not asked
        unmarked = type(marks)()
        assert torch.equal(passed(x, upstream, grid, scale_shape, closed=True, marks=unmarked), expected)
        open_range = passed(x, upstream, grid, scale_shape, closed=False)
        place = upstream.clone()
        assert torch.equal(passed(x, place, grid, scale_shape, closed=False, reuse=True, marks=marks), open_range)


FORK = """
import os, sys, torch
from trainable_torch import ops
from trainable_torch.kernels import native
torch.set_num_threads(2)
x, grid = torch.randn(4 * native.SHARE), (torch.tensor(0.1), -8, 7)
expected = ops.snap(x, *grid)
child = os.fork()
torch.set_num_threads(2)
good = torch.equal(ops.snap(x, *grid), expected)
if child == 0:
    os._exit(0 if good else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not good)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    """As a worker that loads data has: its parent's threads are not there, and waiting for them would be for ever."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], env=environment, timeout=120, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- small layers ---------------------------------------------------------------------------------------------------


def table_for(x, scale_shape=(), gradient_scale=None):
    """Return what is constant about quantizing tensors like `x` to a signed grid of 4 bits."""
    form = Form(SymmetricScale, (LOW, 8.0, False), -8, 7, centered=True)
    return native.part(form, scale_shape, x.shape, x.stride(), gradient_scale)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2 * native.SHARE),  # worth a second thread
        torch.randn(4, 6)[:, ::2],
        torch.randn(1, 6).expand(4, 6),
    ],
    ids=["large", "with holes", "overlapping"],
)
def test_what_is_large_or_not_dense_is_not_for_the_tables(x):
    assert table_for(x) is None


def test_too_short_lines_are_not_for_the_tables():
    assert table_for(torch.randn(6, 4), (4,)) is None
    assert table_for(torch.randn(2, 6, 4), (6, 1)) is None
    assert table_for(torch.randn(2, 6, 8), (6, 1)) is not None


def test_a_table_is_kept_for_its_shape_and_rule_and_is_never_written_into():
    x = torch.randn(4, 8)
    table = table_for(x)
    assert table is table_for(torch.randn(4, 8))
    assert table is not table_for(torch.randn(8, 4))
    assert table is not table_for(x.t())
    assert table is not table_for(x, gradient_scale=0.5)
    before = table.table[:]
    model = trainable_torch.wrap(torch.nn.Sequential(torch.nn.Linear(8, 4)), RECIPE)
    trainable_torch.calibrate(model, [x]).train()(x).sum().backward()
    assert table.table == before
