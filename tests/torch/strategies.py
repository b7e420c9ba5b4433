"""What the PyTorch tests draw from beside what every backend's do: this backend's quantizers, and tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.strategies import Kinds, inputs
from trainable_core.qparams import QParams

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

KINDS = Kinds("torch")
every_kind, kinds_of = KINDS.every, KINDS.of
every_device = pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


def end_schedule(quantizer: Any) -> None:
    """Lead a quantizer with a schedule to its end."""
    if hasattr(quantizer, "temperature"):
        quantizer.step.fill_(int(quantizer.temperature.t_end) + 1)


@st.composite
def tensors(draw: Any, grid: QParams, shape: tuple[int, ...], dtype: torch.dtype, **kinds: bool) -> torch.Tensor:
    """Return `inputs` as a tensor; float64 ones also lie between two float32 numbers."""
    x = torch.from_numpy(draw(inputs(grid, shape, **kinds))).to(dtype)
    if dtype is torch.float64:
        between = draw(st.sampled_from([0.0, 2.0**-26, -(2.0**-25)]))
        x = x * (1.0 + between)
    return x


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check dtype, device, shape and every bit; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    actual, expected = (value.detach().masked_fill(nan, 0.0) for value in (actual, expected))
    assert torch.equal(actual, expected), (actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit()), "the sign of a zero differs"
