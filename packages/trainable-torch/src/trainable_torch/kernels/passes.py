"""The formula in few passes over memory, by PyTorch's own operations in place; the tier ``passes``.

`torch.where` and comparisons take several times as long as arithmetic, because they branch or convert. So gradients are
masked by bits: the sign bits of two differences say whether a number lies inside of the range. The values are those of
`trainable_torch.kernels.plain`, and so are the sums.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_torch.kernels import plain

SIGN = 31
"""Place of a float32 number's sign bit; shifted down by so much, it fills an integer with ones or zeros."""


class Numbers(NamedTuple):
    """A grid outside of the autograd graph.

    Parameters
    ----------
    scale : Tensor, float32, broadcastable to the input
        Step between grid points.
    low, high : float, or Tensor broadcastable to the input
        The grid's ends counted from zero.
    inverse : Tensor
        Reciprocal of the scale.
    """

    scale: Tensor
    low: float | Tensor
    high: float | Tensor
    inverse: Tensor


def snap(x: Tensor, grid: Numbers) -> Tensor:
    """Return `x` snapped to the grid."""
    codes = _clamp((x * grid.inverse).round_(), grid)
    return codes.add_(0.0).mul_(grid.scale)  # -0.0 + 0.0 is +0.0


def pass_inside(x: Tensor, upstream: Tensor, grid: Numbers, *, closed: bool) -> Tensor:
    """Return `upstream` where `x` is inside the range, `closed`: or at its ends; 0 elsewhere."""
    steps = _steps(x, grid)
    if not math.isfinite(steps.sum()):  # the sign of a NaN says nothing
        low, high = grid.low, grid.high
        inside = (steps >= low) & (steps <= high) if closed else (steps > low) & (steps < high)
        return torch.where(inside, upstream, 0.0)
    return _inside(steps, grid, closed=closed).bitwise_and_(_bits(upstream)).view(torch.float32)


def learned(x: Tensor, upstream: Tensor, grid: Numbers, *, outside: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of `x`, scale and, if its part `outside` of the range is asked for, zero point.

    As `plain.lsq_gradients` does, which is called where a sum is not finite: a NaN then counts as zero or stands for a
    gradient that is not finite, and signs don't tell these apart.
    """
    steps = _steps(x, grid)
    mask = _inside(steps, grid, closed=False)
    d_x = (mask & _bits(upstream)).view(torch.float32)
    inside = mask.bitwise_and_(_bits(steps)).view(torch.float32)
    slope = _clamp(steps.round_(), grid).sub_(inside).mul_(upstream).sum_to_size(grid.scale.shape)
    beyond = (upstream - d_x).sum_to_size(grid.scale.shape) if outside else None
    if math.isfinite(slope.sum()) and (beyond is None or math.isfinite(beyond.sum())):
        return d_x, slope, None if beyond is None else -(beyond * grid.scale)
    found: Any = plain.lsq_gradients(upstream, x, grid.scale, grid.low, grid.high, (True, True, outside))
    return found  # type: ignore[no-any-return] # the first two were asked for


def _steps(x: Tensor, grid: Numbers) -> Tensor:
    """Return ``x / scale``; where an end may be 0 without negative zeros, whose difference to 0 has a sign."""
    steps = x * grid.inverse
    return steps if not isinstance(grid.low, Tensor) and grid.low * grid.high else steps.add_(0.0)


def _inside(steps: Tensor, grid: Numbers, *, closed: bool) -> Tensor:
    """Return an integer of ones where a number lies inside of the range, of zeros elsewhere; NaN anything."""
    if closed:
        outside = _bits(steps - grid.low).bitwise_or_(_bits(torch.rsub(steps, grid.high)))
        return outside.bitwise_right_shift_(SIGN).bitwise_not_()
    return _bits(steps - grid.high).bitwise_and_(_bits(torch.rsub(steps, grid.low))).bitwise_right_shift_(SIGN)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().view(torch.int32)


def _clamp(codes: Tensor, grid: Numbers) -> Tensor:
    """Clamp in place; to tensors in two passes, because ``clamp_`` with tensors is not vectorized."""
    low, high = grid.low, grid.high
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        torch.maximum(codes, low, out=codes)
        return torch.minimum(codes, high, out=codes)
    return codes.clamp_(low, high)  # type: ignore[arg-type] # both are numbers
