"""One tensor's fake quantization in eager mode: an object that knows its grid and its rule, and one autograd node.

Here the tier is chosen: `native` where it is there and the tensor suits it, else `passes`. What neither may take is
left to `plain`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_torch.grid import Form, Grid
from trainable_torch.kernels import eligible, native, passes, plain
from trainable_torch.kernels.passes import Numbers
from trainable_torch.kernels.plain import Lsq, Rule, Ste

End = Tensor | float
Gradients = Sequence[Tensor | None]


class Explicit(NamedTuple):
    """Stands for a `Form` where scale and zero point are given, and are themselves what learns.

    Parameters
    ----------
    quant_min, quant_max, centered
        As in `Grid`.
    """

    quant_min: int
    quant_max: int
    centered: bool

    def grid(self, leaves: Sequence[Tensor], _shape: tuple[int, ...]) -> Grid:
        """Return the grid."""
        return Grid(leaves[0], leaves[1], self.quant_min, self.quant_max, self.centered)

    def numbers(self, leaves: Sequence[Tensor], _shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point outside of the graph; no zero point where every one is 0."""
        return leaves[0].detach(), None if self.centered else leaves[1].detach()

    def gradients(self, _leaves: Any, _numbers: Any, d_grid: tuple[Tensor, Tensor | None]) -> Gradients:
        """Return the gradients of scale and zero point."""
        return d_grid


class FakeQuantization:
    """How one tensor is fake-quantized: on which grid, and how gradients come back.

    Made for one forward, and kept for its backward. The grid's numbers are made once, outside of the graph.

    Parameters
    ----------
    form : Form or Explicit
        How the grid is made.
    variables : sequence of Tensor
        What it is made of; plain float32 CPU tensors.
    shape : tuple of int
        Shape of the scale, broadcastable to the tensor.
    rule : Ste or Lsq
        How gradients come back.
    """

    __slots__ = ("_block", "_numbers", "_table", "form", "leaves", "rule", "shape", "variables")

    def __init__(self, form: Form | Explicit, variables: Sequence[Tensor], shape: tuple[int, ...], rule: Rule) -> None:
        self.form, self.variables, self.shape, self.rule = form, variables, shape, rule
        self.leaves: Sequence[Tensor] = variables if isinstance(rule, Lsq) else ()
        self._block: native.Block | native.Given | None = None
        self._numbers: Numbers | None = None
        self._table: tuple[array[int], int] | None = None

    def fits(self, x: Tensor) -> bool:
        """Return whether the fast kernels may take a tensor and the grid's variables."""
        return eligible.fits(x, *self.variables) and x.numel() > 0

    # ---- the grid's numbers -----------------------------------------------------------------------------------------

    def numbers(self) -> Numbers:
        """Return the grid's numbers for expressions of tensors."""
        if self._numbers is None:
            if self._block is None and self._table is not None:
                self.block()
            if isinstance(self._block, native.Block):
                self._numbers = self._block.numbers()
                return self._numbers
            scale, zero_point = self.form.numbers(self.variables, self.shape)
            low: End = self.form.quant_min
            high: End = self.form.quant_max
            if zero_point is not None:
                low, high = low - zero_point, high - zero_point
            self._numbers = Numbers(scale, low, high, scale.reciprocal())
        return self._numbers

    def block(self) -> native.Block | native.Given:
        """Return the grid's numbers for the native loops."""
        if self._block is None:
            if self._table is not None and isinstance(self.form, Form):
                self._block = native.block_of(self.form, *self._table, self.shape)
            elif isinstance(self.form, Form):
                self._block = native.grid_of(self.form, self.variables, self.shape)
            else:
                scale, low, high, _ = self.numbers()
                self._block = native.given(scale, low, high)
        return self._block

    def plain(self, x: Tensor, *leaves: Tensor) -> Tensor:
        """Return `x` snapped to the grid by the formula, in the graph of `x` and of leaves that learn."""
        return plain.fake_quantize(x, self.form.grid(leaves or self.variables, self.shape), self.rule)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def snap(self, x: Tensor) -> Tensor:
        """Return `x` snapped to the grid, outside of the graph."""
        return self.snap_for_backward(x, marking=False)[0]

    def snap_for_backward(self, x: Tensor, *, marking: bool = True) -> tuple[Tensor, native.Marks]:
        """Return `x` snapped to the grid, and what helps `gradients`; nothing the size of the tensor."""
        if native.compiled() is not None:
            x, where = native.lines(x, self.shape)
            if where is not None:
                return native.snap(x, self.block(), where, marking=marking and isinstance(self.rule, Ste))
        return passes.snap(x, self.numbers()), None

    def forward_table(self, x: Tensor) -> tuple[Tensor, array[int]] | None:
        """Return where a small tensor is snapped to, and the loops' table; None where it is not for them."""
        form, rule, variables = self.form, self.rule, self.variables
        if type(form) is not Form or x.is_neg():
            return None
        part = native.part(
            form, self.shape, x.shape, x.stride(), rule.gradient_scale if isinstance(rule, Lsq) else None
        )
        if part is None:
            return None
        for each in variables:
            if not each.is_contiguous() or each.is_neg():
                return None
        y, table = torch.empty_like(x), part.table[:]
        table[native.X], table[native.Y] = x.data_ptr(), y.data_ptr()
        table[native.FIRST], table[native.LAST] = variables[0].data_ptr(), variables[-1].data_ptr()
        self._table = table, part.channels
        return y, table

    def apply(self, x: Tensor) -> Tensor:
        """Return a tensor fake-quantized, in the graph where anything needs a gradient."""
        if not records(x, *self.leaves):
            return self.snap(x)
        y: Tensor = _Quantize.apply(x, self, *self.leaves)  # type: ignore[no-untyped-call] # torch leaves it so
        return y

    # ---- backward ---------------------------------------------------------------------------------------------------

    def backward_table(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Gradients, array[int]] | None:
        """Return where the gradients of a small tensor go, and the loops' table; None where it is not for them.

        The input's gradient takes the place of `upstream`; other parameters are those of `gradients`.
        """
        if self._table is None or upstream.stride() != x.stride() or upstream.numel() != x.numel() or upstream.is_neg():
            return None
        table = self._table[0][:]  # the graph may be used again, by another thread
        table[native.X], table[native.Y] = x.data_ptr(), upstream.data_ptr()
        if not leaves:
            return (upstream,), table
        if True not in needs[1:]:
            return (upstream, *[None for _ in leaves]), table
        found = [torch.empty_like(each) for each in leaves]
        table[native.FIRST], table[native.LAST] = leaves[0].data_ptr(), leaves[-1].data_ptr()
        table[native.D_FIRST], table[native.D_LAST] = found[0].data_ptr(), found[-1].data_ptr()
        table[native.LEARNS] = 1
        return (upstream, *found), table

    def gradients(
        self,
        x: Tensor,
        upstream: Tensor,
        leaves: Sequence[Tensor],
        needs: Sequence[bool],
        *,
        reuse: bool = False,
        marks: native.Marks = None,
    ) -> Gradients:
        """Return the gradients of input and leaves.

        Parameters
        ----------
        x : Tensor
            The input.
        upstream : Tensor, shape of `x`
            Gradient of the fake-quantized tensor.
        leaves : sequence of Tensor
            As they were in the forward.
        needs : sequence of bool
            Whether the input and each of the leaves needs a gradient.
        reuse : bool
            Whether the input's gradient may take the place of `upstream`, which nobody else must have.
        marks : object
            What `snap_for_backward` returned besides.
        """
        if isinstance(self.rule, Ste) or True not in needs[1:]:
            return self.pass_inside(x, upstream, reuse=reuse, marks=marks), *[None for _ in leaves]
        where = None
        if native.compiled() is not None:
            x, where = native.lines(x, self.shape)
        outside = len(leaves) > 1  # a threshold has no part in the zero point
        if where is None:
            d_x, d_scale, d_zero = passes.learned(x, upstream, self.numbers(), outside=outside)
            return d_x, *self._of_grid(leaves, d_scale, d_zero)
        block = self.block()
        d_x, sums = native.learned(x, upstream, block, where, outside=outside, reuse=reuse)
        if isinstance(block, native.Block):
            return d_x, *native.gradients(self.form, leaves, block, sums, self.rule.gradient_scale)
        return d_x, *self.leaf_gradients(leaves, [each.view(self.shape) for each in native.total(sums, where)])

    def pass_inside(self, x: Tensor, upstream: Tensor, *, reuse: bool = False, marks: native.Marks = None) -> Tensor:
        """Return the gradient of the input alone, which passes inside the range; parameters as in `gradients`."""
        closed = isinstance(self.rule, Ste)
        if native.compiled() is not None:
            x, where = native.lines(x, self.shape)
            if where is not None:
                return native.pass_inside(x, upstream, self.block(), where, closed=closed, reuse=reuse, marks=marks)
        return passes.pass_inside(x, upstream, self.numbers(), closed=closed)

    def gradients_in_graph(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """Return the gradients that are needed, in the autograd graph of upstream gradient, input and leaves.

        That of the input passes or not: whether it does, changes nowhere continuously. Those of the leaves are
        expressions of tensors.
        """
        passed: Any = _PassInside.apply(upstream, x.detach(), self) if needs[0] else None  # type: ignore[no-untyped-call]
        if isinstance(self.rule, Ste) or True not in needs[1:]:
            return passed, *[None for _ in leaves]
        grid = self.form.grid(leaves, self.shape)
        low, high = grid.ends
        learned = False, True, not grid.centered
        _, d_scale, d_zero = plain.lsq_gradients(upstream, x, grid.scale, low, high, learned)
        d_scale, d_zero = (None if each is None else each * self.rule.gradient_scale for each in (d_scale, d_zero))
        zero_point = None if grid.centered else grid.zero_point
        of_leaves = self.form.gradients(leaves, (grid.scale, zero_point), (d_scale, d_zero))  # type: ignore[arg-type] # asked for
        return passed, *[each if need else None for each, need in zip(of_leaves, needs[1:], strict=True)]

    def directions(self, x: Tensor) -> Sequence[Tensor]:
        """Return the derivative by the scale and, where it learns, that by the zero point over the negative scale."""
        grid = self.numbers()
        slope, outside = plain.slopes(x * grid.inverse, grid.low, grid.high)
        return (slope,) if len(self.leaves) == 1 else (slope, outside.to(x.dtype))

    def leaf_gradients(self, leaves: Sequence[Tensor], sums: Sequence[Tensor]) -> Gradients:
        """Return the gradients of the leaves from those along the `directions`."""
        return self._of_grid(leaves, sums[0], -sums[1] * self.numbers().scale if len(sums) > 1 else None)

    def _of_grid(self, leaves: Sequence[Tensor], d_scale: Tensor, d_zero: Tensor | None) -> Gradients:
        assert isinstance(self.rule, Lsq)  # noqa: S101 - the other rule has no leaves
        factor, grid = self.rule.gradient_scale, self.numbers()
        zero_point = None if self.form.centered else self.form.quant_min - grid.low
        d_grid = d_scale * factor, None if d_zero is None else d_zero * factor
        return self.form.gradients(leaves, (grid.scale, zero_point), d_grid)  # type: ignore[arg-type] # not centered: a tensor


def snap_together(parts: Sequence[tuple[FakeQuantization | None, Tensor]]) -> list[tuple[Tensor, native.Marks]]:
    """Return what `FakeQuantization.snap_for_backward` does of some tensors, of small ones in one call."""
    snapped: list[tuple[Tensor, native.Marks]] = []
    tables: list[array[int]] = []
    loops = native.compiled()
    for made, x in parts:
        if made is None:
            snapped.append((x, None))
            continue
        found = None if loops is None else made.forward_table(x)
        if found is None:
            snapped.append(made.snap_for_backward(x))
            continue
        snapped.append((found[0], None))  # its marks are in the table
        tables.append(found[1])
    if loops is not None and tables:
        loops.forward(tables[0].buffer_info()[0], tables[-1].buffer_info()[0], len(tables))
    return snapped


Asked = tuple[FakeQuantization | None, Tensor, Tensor | None, Sequence[Tensor], Sequence[bool], native.Marks]
"""A fake quantization, and the arguments of its `gradients`: input, upstream gradient, leaves, needs and marks."""


def gradients_together(asked: Sequence[Asked]) -> list[Gradients]:
    """Return what `FakeQuantization.gradients` does of some tensors, in the places of their upstream gradients."""
    found: list[Gradients] = []
    tables: list[array[int]] = []
    for made, x, upstream, leaves, needs, marks in asked:
        if made is None or upstream is None:
            found.append((upstream, *[None for _ in leaves]))
            continue
        table = made.backward_table(x, upstream, leaves, needs)
        if table is None:
            found.append(made.gradients(x, upstream, leaves, needs, reuse=True, marks=marks))
            continue
        gradients, packed = table
        found.append(gradients)
        tables.append(packed)
    loops = native.compiled()
    if loops is not None and tables:
        loops.backward(tables[0].buffer_info()[0], tables[-1].buffer_info()[0], len(tables))
    return found


class _Quantize(torch.autograd.Function):
    """A fake quantization as one node, the grid's own function included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: FakeQuantization, *leaves: Tensor) -> Tensor:
        """Return `x` snapped to the grid; keep `x` and the leaves."""
        ctx.made = made
        ctx.save_for_backward(x, *leaves)
        y, ctx.marks = made.snap_for_backward(x, marking=False)
        ctx.version = eligible.version(y)
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that the rule defines."""
        needs_x, _, *needs = ctx.needs_input_grad
        needed = needs_x, *needs
        if eligible.fits_backward(upstream):
            x, *leaves = ctx.saved_tensors
            if torch.is_grad_enabled():
                d_x, *d_leaves = ctx.made.gradients_in_graph(x, upstream, leaves, eligible.wanted(ctx, needed))
            else:
                d_x, *d_leaves = ctx.made.gradients(x, upstream, leaves, needed)
        else:
            d_x, *d_leaves = by_autograd(ctx.made.plain, ctx.saved_tensors, needed, upstream)
        return d_x, None, *d_leaves


class _PassInside(torch.autograd.Function):
    """The gradient of a fake quantization's input as a function of the upstream one: linear, and its own derivative."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, x: Tensor, made: FakeQuantization) -> Tensor:
        """Return `upstream` where `x` is inside the range."""
        ctx.made = made
        ctx.save_for_backward(x)
        return made.pass_inside(x, upstream)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        """Return the same of the gradient that comes."""
        (x,) = ctx.saved_tensors
        if not eligible.fits_backward(upstream):
            given = x.detach().requires_grad_()  # it was kept outside of the graph
            found = by_autograd(lambda each: ctx.made.plain(each, *ctx.made.leaves), [given], [True], upstream)
            return found[0], None, None
        if torch.is_grad_enabled():
            return _PassInside.apply(upstream, x, ctx.made), None, None  # type: ignore[no-untyped-call]
        return ctx.made.pass_inside(x, upstream), None, None


def by_autograd(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """Return gradients through plain expressions, where a backward pass is itself differentiated or vectorized."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: else the gradient of a weight would count what the input owes to it
        given = [None if each is None else each.view_as(each) for each in tensors]
        y = function(*given)
        wanted = [each for each, need in zip(given, needed, strict=True) if need and each is not None]
        found = iter(torch.autograd.grad(y, wanted, upstream, create_graph=differentiated, allow_unused=True))
    return [next(found) if need else None for need in needed]


_NODE: Any = eligible.node_class(_Quantize)


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor is what a node here returned, as it was then.

    The node keeps the float tensor first, and has the `FakeQuantization` as `made` and the tensor's `version`.
    """
    node: Any = tensor.grad_fn
    return _NODE is not None and type(node) is _NODE and eligible.version(tensor) == node.version


def records(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done with these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def fake_quantize(x: Tensor, grid: Grid, rule: Rule) -> Tensor:
    """Return `x` snapped to a grid of tensors, with a rule's gradients; float32."""
    leaves = grid.scale, grid.zero_point
    if not eligible.fits(x, *leaves) or x.numel() == 0:
        return plain.fake_quantize(x, grid, rule)
    form = Explicit(grid.quant_min, grid.quant_max, grid.centered)
    return FakeQuantization(form, leaves, tuple(grid.scale.shape), rule).apply(x)


def snap(x: Tensor, scale: Tensor, low: End, high: End) -> Tensor:
    """Return `x` snapped to a grid; float32 in, float32 out, no gradient defined.

    Parameters
    ----------
    x : Tensor, float32
        Real values.
    scale : Tensor, float32, broadcastable to `x`
        Step between grid points.
    low, high : int, or Tensor broadcastable to `x`
        The grid's ends counted from zero.
    """
    if not eligible.fits(x, scale) or x.numel() == 0:
        return plain.snap(x, scale, low, high)
    return Snapping(scale, low, high)(x)


class Snapping:
    """Snaps tensors to a grid that is given by its numbers; what the loops need is made once.

    Parameters
    ----------
    scale, low, high
        As `snap` takes them; plain CPU tensors.
    """

    __slots__ = ("_block", "_numbers", "_shape")

    def __init__(self, scale: Tensor, low: End, high: End) -> None:
        self._shape = scale.shape
        self._block = None if native.compiled() is None else native.given(scale, low, high)
        self._numbers = Numbers(scale, low, high, scale.reciprocal() if self._block is None else self._block.tensors[0])

    @classmethod
    def of(cls, form: Form, variables: Sequence[Tensor], shape: tuple[int, ...]) -> Snapping:
        """Return what snaps tensors to a grid as its variables make it now; plain float32 CPU tensors."""
        scale, low, high, _ = FakeQuantization(form, variables, shape, Ste()).numbers()
        return cls(scale, low, high)

    def __call__(self, x: Tensor) -> Tensor:
        """Return a tensor that `eligible.fits` and is not empty, snapped."""
        if self._block is not None:
            if not self._shape and x.is_contiguous() and x.numel() < native.SHARE and not x.is_neg():
                return native.snap_one_line(x, self._block)
            x, where = native.lines(x, self._shape)
            if where is not None:
                return native.snap(x, self._block, where)[0]
        return passes.snap(x.detach(), self._numbers)
