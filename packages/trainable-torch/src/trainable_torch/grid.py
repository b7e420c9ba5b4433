"""From a quantizer's variables to the grid, on tensors: the same float32 operations as `trainable_core.qparams`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_core import qparams
from trainable_core.backend import grid as tensor_grid
from trainable_core.enums import QuantizationMethod
from trainable_core.validation import MAX_THRESHOLD
from trainable_torch.kernels import native, passes
from trainable_torch.kernels import numbers as scalars
from trainable_torch.kernels.numbers import Numbers


class Grid(tensor_grid.GridNumbers):
    """The numbers a tensor is fake-quantized with; see `trainable_core.backend.grid.GridNumbers`."""

    @property
    def ends(self) -> tuple[Tensor, Tensor] | tuple[int, int]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        if self.centered:
            return self.quant_min, self.quant_max
        zero_point = self.zero_point.detach()
        return self.quant_min - zero_point, self.quant_max - zero_point

    @functools.cached_property
    def numbers(self) -> Numbers:
        """What the eager CPU kernels need of the grid, outside the autograd graph."""
        zero_point = 0.0 if self.centered else self.zero_point.detach()
        return Numbers.of(self.scale.detach(), zero_point, self.quant_min, self.quant_max)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to from here: scale and zero point."""
        return self.scale, self.zero_point

    @property
    def served(self) -> bool:
        """Whether the eager CPU kernels may take the grid."""
        return passes.serves(*self.leaves)

    def leaf_gradients(
        self,
        leaves: Sequence[Tensor],
        made: tuple[Any, Any],  # noqa: ARG002
        d_grid: Sequence[float | Tensor | None],
    ) -> Sequence[Tensor | None]:
        """Return the gradients of `leaves`.

        Parameters
        ----------
        leaves : sequence of Tensor
            As they were in the forward.
        made : pair of Tensor or float
            Scale and zero point that were made of them.
        d_grid : pair of Tensor or float
            Gradients of scale and zero point, the latter None on a centered grid; float32, numbers where one scale
            serves all elements.
        """
        return [_tensor(each, leaves[0]) for each in d_grid]

    def tensors(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scale and zero point in the graph of `leaves`."""
        scale, zero_point = leaves
        return scale, zero_point


def _tensor(gradient: float | Tensor | None, leaf: Tensor) -> Tensor | None:
    """Return a leaf's gradient as a tensor of its shape."""
    if isinstance(gradient, float):
        return torch.full_like(leaf, gradient)
    return gradient if gradient is None or gradient.shape == leaf.shape else gradient.view(leaf.shape)


def _held(variable: Tensor, gradient: Tensor, low: float, high: float) -> Tensor:
    """Return the gradient where the variable is in bounds or a descent step leads back in; see the core's module."""
    # Clamped by two open ways, each open when the variable has not passed the bound that it leads to; NaN has none.
    down = torch.where(variable >= low, math.inf, 0.0)
    up = torch.where(variable <= high, -math.inf, 0.0)
    return torch.nan_to_num(gradient, 0.0, 0.0, 0.0).clamp(up, down)


def _bound(threshold: Tensor, low: float) -> Tensor:
    return torch.nan_to_num(threshold, low, MAX_THRESHOLD, low).clamp(low, MAX_THRESHOLD)


def _hold_zero(range_min: Tensor, range_max: Tensor) -> tuple[Tensor, Tensor]:
    """Return finite range ends with ``first <= 0 <= last``; NaN counts as zero."""
    limit = MAX_THRESHOLD / 2
    first = range_min.nan_to_num(0.0, limit, -limit).clamp(-limit, 0.0)
    return first, range_max.nan_to_num(0.0, limit, -limit).clamp(0.0, limit)


class SymmetricScale(torch.autograd.Function):
    """Threshold to scale; see `trainable_core.qparams.from_variables` and `variable_gradients`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(threshold: Tensor, low: float, steps: float, power_of_two: bool) -> Tensor:  # noqa: FBT001
        """Return ``threshold / steps`` after bounding and rounding up to a power of two."""
        bounded = _bound(threshold, low)
        if power_of_two:
            bounded = ((bounded.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
        return bounded * (1.0 / steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        threshold, ctx.low, ctx.steps, ctx.power_of_two = inputs
        ctx.save_for_backward(threshold, output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the threshold's gradient."""
        threshold, scale = ctx.saved_tensors
        gradient = SymmetricScale.gradient(threshold, scale, upstream, ctx.low, ctx.steps, ctx.power_of_two)
        return gradient, None, None, None

    @staticmethod
    def gradient(
        threshold: Tensor,
        scale: Any,
        upstream: Tensor,
        low: float,
        steps: float,
        power_of_two: bool,  # noqa: FBT001 - as in `forward`
    ) -> Tensor:
        """Return the threshold's gradient from the scale's."""
        gradient = upstream * (1.0 / steps)
        if power_of_two:
            gradient = gradient * (scale * steps / _bound(threshold, low))
        return _held(threshold, gradient, low, MAX_THRESHOLD)


class UniformGrid(torch.autograd.Function):
    """Range ends to scale and zero point; see `trainable_core.qparams.from_variables` and `variable_gradients`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(range_min: Tensor, range_max: Tensor, low: float, n_bits: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the range widened to hold zero."""
        quant_max = 2**n_bits - 1
        first, last = _hold_zero(range_min, range_max)
        width = _bound(last - first, low)
        # by a tensor: CUDA multiplies by the inverse of a plain number, which is another float32 number
        scale = width / torch.full_like(width, quant_max)
        scale = ((scale.view(torch.int32) + quant_max) & ~quant_max).view(torch.float32)
        return scale, (-first / scale).round().clamp(0, quant_max)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the gradient needs."""
        range_min, range_max, ctx.low, ctx.n_bits = inputs
        ctx.save_for_backward(range_min, range_max, *output)

    @staticmethod
    def backward(ctx: Any, d_scale: Tensor, d_zero: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the range's ends."""
        range_min, range_max, scale, zero_point = ctx.saved_tensors
        d_grid, grid = (d_scale, d_zero), (scale, zero_point)
        return *UniformGrid.gradients((range_min, range_max), grid, d_grid, ctx.low, ctx.n_bits), None, None

    @staticmethod
    def gradients(
        ends: tuple[Tensor, Tensor],
        grid: tuple[Any, Any],
        d_grid: tuple[Tensor, Tensor],
        low: float,
        n_bits: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the range's ends from those of scale and zero point."""
        (range_min, range_max), (scale, zero_point), (d_scale, d_zero) = ends, grid, d_grid
        limit = MAX_THRESHOLD / 2
        first, last = _hold_zero(range_min, range_max)
        through_width = _held(
            last - first, (d_scale - d_zero * zero_point / scale) / (2**n_bits - 1), low, MAX_THRESHOLD
        )
        d_min = _held(range_min, -through_width - d_zero / scale, -limit, 0.0)
        return d_min, _held(range_max, through_width, 0.0, limit)


class Form(NamedTuple):
    """What makes grids of a quantizer's variables.

    Parameters
    ----------
    function : type
        `SymmetricScale` or `UniformGrid`.
    arguments : tuple
        The function's arguments besides the variables.
    quant_min, quant_max : int
        First and last code.
    centered : bool
        Whether every zero point is 0.
    """

    function: type[SymmetricScale | UniformGrid]
    arguments: tuple[Any, ...]
    quant_min: int
    quant_max: int
    centered: bool

    def grid(self, variables: tuple[Tensor, ...], shape: tuple[int, ...]) -> Grid:
        """Return the grid of a threshold, or of a range's two ends, whose scale has the shape."""
        if passes.serves(*variables):
            return VariableGrid(self, variables, shape)
        return Grid(*self.tensors(variables, shape), self.quant_min, self.quant_max, self.centered)

    def tensors(self, variables: Sequence[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return scale and zero point in the graph of variables."""
        shaped = [each if each.shape == shape else each.view(shape) for each in variables]
        made: Any = self.function.apply(*shaped, *self.arguments)  # type: ignore[no-untyped-call] # torch leaves it so
        return (made, torch.zeros_like(made)) if self.centered else made


class VariableGrid(Grid):
    """A grid that makes its tensors in the autograd graph when they are asked for; the eager kernels never ask.

    Parameters
    ----------
    form : Form
        What makes it.
    variables : tuple of Tensor
        A threshold, or a range's two ends; plain tensors.
    shape : tuple of int
        That of the scale.
    """

    form: Form
    variables: tuple[Tensor, ...]
    shape: tuple[int, ...]

    def __init__(self, form: Form, variables: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
        state = self.__dict__
        state["form"], state["variables"], state["shape"] = form, variables, shape
        state["quant_min"], state["quant_max"] = form.quant_min, form.quant_max
        state["centered"] = form.centered

    @functools.cached_property
    def _made(self) -> tuple[Tensor, Tensor]:
        return self.tensors(self.variables)

    @property
    def scale(self) -> Tensor:
        """Step between grid points."""
        return self._made[0]

    @property
    def zero_point(self) -> Tensor:
        """Code of real 0.0."""
        return self._made[1]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The variables."""
        return self.variables

    @property
    def served(self) -> bool:
        """Whether the eager CPU kernels may take the grid: it is made of plain variables."""
        return True

    @functools.cached_property
    def numbers(self) -> Numbers:
        """What the eager CPU kernels need of the grid."""
        variables, form = self.variables, self.form
        if native.serves(*variables):
            natively: Any = native.symmetric if self.centered else native.uniform
            ends = ((form.quant_min, form.quant_max),) if self.centered else ()
            block: Numbers = natively(*variables, *form.arguments, *ends, self.shape)
            return block
        made: Any
        if variables[0].dim() == 0:
            numbers = [float(variable.detach()) for variable in variables]
            if self.centered:
                low, steps, power_of_two = form.arguments
                made = scalars.symmetric_scale(numbers[0], low, steps, power_of_two=power_of_two)
            else:
                made = scalars.uniform_grid(numbers[0], numbers[1], *form.arguments)
        else:
            forward: Any = form.function.forward
            with torch.no_grad():
                made = forward(*(variable.view(self.shape) for variable in variables), *form.arguments)
        scale, zero_point = (made, 0.0) if self.centered else made
        return Numbers.of(scale, zero_point, form.quant_min, form.quant_max)

    def line_gradients(self, leaves: Sequence[Tensor], sums: Tensor, gradient_scale: float) -> Sequence[Tensor]:
        """Return the gradients of the variables from what `native.learned` returned; zero what is not finite."""
        numbers, arguments = self.numbers, self.form.arguments
        if self.centered:
            return native.symmetric_gradients(sums, numbers, leaves[0], gradient_scale, *arguments)
        return native.uniform_gradients(sums, numbers, (leaves[0], leaves[1]), gradient_scale, *arguments)

    def leaf_gradients(
        self, leaves: Sequence[Tensor], made: tuple[Any, Any], d_grid: Sequence[float | Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the variables; see the base."""
        arguments = self.form.arguments
        if isinstance(made[0], float) and leaves[0].dim() == 0:
            d_numbers = [0.0 if each is None else float(each) for each in d_grid]
            return [_tensor(each, leaves[0]) for each in self._number_gradients(leaves, made, d_numbers)]
        shape = leaves[0].shape
        scale, zero_point = (
            each.view(shape) if isinstance(each, Tensor) and each.shape != shape else each for each in made
        )
        d_scale, d_zero = (_tensor(each, leaves[0]) for each in d_grid)
        assert d_scale is not None  # noqa: S101 - the eager functions give both to a grid that is made of variables
        if d_zero is None:
            return (SymmetricScale.gradient(leaves[0], scale, d_scale, *arguments),)
        return UniformGrid.gradients((leaves[0], leaves[1]), (scale, zero_point), (d_scale, d_zero), *arguments)

    def _number_gradients(
        self, leaves: Sequence[Tensor], made: tuple[float, float], d_grid: Sequence[float]
    ) -> Sequence[float]:
        variables, (d_scale, d_zero), arguments = [float(leaf) for leaf in leaves], d_grid, self.form.arguments
        if self.centered:
            low, steps, power_of_two = arguments
            return [scalars.symmetric_gradient(variables[0], made[0], d_scale, low, steps, power_of_two=power_of_two)]
        return scalars.uniform_gradients((variables[0], variables[1]), made, (d_scale, d_zero), *arguments)

    def tensors(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scale and zero point in the graph of variables."""
        return self.form.tensors(leaves, self.shape)


def form(method: QuantizationMethod, n_bits: int, *, signed: bool, min_threshold: float) -> Form:
    """Return what makes the grids of a quantization method."""
    low = float(qparams.lower_bound(min_threshold))
    if method is QuantizationMethod.UNIFORM:
        return Form(UniformGrid, (low, n_bits), 0, 2**n_bits - 1, centered=False)
    ends = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    power_of_two = method is QuantizationMethod.POWER_OF_TWO
    return Form(SymmetricScale, (low, 2.0 ** (n_bits - int(signed)), power_of_two), ends[0], ends[1], centered=True)
