"""Deployed quantizers that mct-quantizers lacks: of weights in blocks, and of activations with scales of their own.

They stand where mctq's inferable quantizers stand, in the same wrappers and holders. The recipe's target ``native``
allows them; `trainable_torch.to_mctq` refuses them.
"""

from __future__ import annotations

from typing import Any

import torch
from mct_quantizers import QuantizationMethod as MctqMethod
from mct_quantizers import QuantizationTarget as MctqTarget
from mct_quantizers import mark_quantizer
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer, QuantizerID
from torch import Tensor, nn

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import UnsupportedConfigError
from trainable_core.granularity import Blocks
from trainable_core.qparams import QParams
from trainable_core.reference import dynamic
from trainable_torch import grid as grids
from trainable_torch import kernels, ops
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.kernels import eligible

ROWS_NDIM = 2
"""Number of dimensions of a tensor that is laid out with one block per row."""


def rows_of(x: Tensor, blocks: Blocks) -> Tensor:
    """Return a tensor laid out with one row per block, contiguous: so sums do not depend on how it lies in memory."""
    layout = blocks.layout(tuple(x.shape))
    return x.reshape(layout.split).permute(layout.order).reshape(layout.rows).contiguous()


def tensor_of(rows: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of a shape that `rows_of` was called on."""
    layout = blocks.layout(shape)
    return rows.reshape(layout.permuted).permute(layout.back).reshape(layout.shape)


class BlocksInferableQuantizer(InferableQuantizer, metaclass=UnlistedSubclass, of=BaseInferableQuantizer):
    """Deployed weights with one scale per block.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers, one per block along axis 0.
    n_bits : int
        Width of the codes.
    blocks : Blocks
        Which elements share a scale.
    """

    def __init__(self, qparams: QParams, n_bits: int, blocks: Blocks) -> None:
        super().__init__(qparams, n_bits, ROWS_NDIM)
        self.blocks = blocks

    def _tell_mctq(self, n_bits: int) -> None:
        """Note the width; mctq has no quantizer that could be told more."""
        self.num_bits = n_bits

    def to_mctq(self) -> Any:
        """Refuse.

        Raises
        ------
        UnsupportedConfigError
            Always: mctq has no scales for blocks.
        """
        raise UnsupportedConfigError(type(self).__name__, "mctq has no scales for groups of weights, nor for experts")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype."""
        assert self.blocks is not None  # noqa: S101 - set by the constructor
        with torch.no_grad():
            rows = rows_of(inputs.float(), self.blocks)
            snapped = kernels.snap(rows, self.grid_scale, self.grid_low, self.grid_high)
            return tensor_of(snapped, self.blocks, tuple(inputs.shape)).to(inputs.dtype)

    def extra_repr(self) -> str:
        """Return width and blocks."""
        return f"num_bits={self.num_bits}, {self.blocks}"


def _marked(cls: Any, target: MctqTarget, method: QuantizationMethod) -> Any:
    return mark_quantizer(target, [MctqMethod[method.name]], QuantizerID.INFERABLE)(cls)


class WeightsSymmetricBlocksInferableQuantizer(BlocksInferableQuantizer):
    """Deployed SYMMETRIC weights with one scale per block."""


class WeightsPOTBlocksInferableQuantizer(BlocksInferableQuantizer):
    """Deployed POWER_OF_TWO weights with one scale per block."""


class WeightsUniformBlocksInferableQuantizer(BlocksInferableQuantizer):
    """Deployed UNIFORM weights with one scale per block."""


_BLOCKS: dict[QuantizationMethod, type[BlocksInferableQuantizer]] = {
    method: _marked(cls, MctqTarget.Weights, method)
    for method, cls in (
        (QuantizationMethod.SYMMETRIC, WeightsSymmetricBlocksInferableQuantizer),
        (QuantizationMethod.POWER_OF_TWO, WeightsPOTBlocksInferableQuantizer),
        (QuantizationMethod.UNIFORM, WeightsUniformBlocksInferableQuantizer),
    )
}


def build_blocks(method: QuantizationMethod, n_bits: int, qparams: QParams, blocks: Blocks) -> BlocksInferableQuantizer:
    """Return the deployed quantizer of weights in blocks."""
    return _BLOCKS[method](qparams, n_bits, blocks)


# ---- grids that are computed from the tensor itself -----------------------------------------------------------------


@torch.no_grad()
def snapped_to_itself(x: Tensor, form: grids.Form, granularity: str) -> Tensor:
    """Return a float32 tensor on the grid that it has for itself, outside of the graph.

    Parameters
    ----------
    x : Tensor, float32, any shape
        What is quantized; see `trainable_core.reference.dynamic`.
    form : Form
        How numbers become a grid.
    granularity : {"token", "tensor"}
        What has a scale of its own.
    """
    if not x.numel():
        return x.clone()
    # one vector per row: the kernels know grids with one scale per index of one axis
    vectors = x.reshape(-1, x.shape[-1]) if granularity == dynamic.TOKEN and x.dim() else x.reshape(1, -1)
    seen = vectors.nan_to_num(0.0, torch.inf, -torch.inf)
    arguments, quant_min, quant_max = form.constants()
    if form.centered:
        largest = (seen.abs() if quant_min < 0 else seen.clamp_min(0.0)).amax(1, keepdim=True)
        numbers = [largest * dynamic.headroom(quant_min, quant_max)]
    else:
        numbers = [seen.amin(1, keepdim=True), seen.amax(1, keepdim=True)]
    make: Any = form.function.forward  # outside of the graph: compilers have nothing to differentiate here
    scale, zero_point = (make(*numbers, *arguments), 0.0) if form.centered else make(*numbers, *arguments)
    low, high = (torch.full_like(scale, end) - zero_point for end in (quant_min, quant_max))
    return kernels.snap(vectors, scale, low, high).reshape(x.shape)


class DynamicInferableQuantizer(nn.Module, metaclass=UnlistedSubclass, of=BaseInferableQuantizer):
    """Deployed activations whose scales are computed from the tensor itself.

    Parameters
    ----------
    n_bits : int
        Width of the codes.
    signed : bool
        Whether a symmetric grid reaches below zero.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    granularity : {"token", "tensor"}
        What has a scale of its own.
    """

    quantization_target: Any
    quantization_method: Any

    def __init__(self, n_bits: int, *, signed: bool, min_threshold: float, granularity: str) -> None:
        super().__init__()
        self.num_bits, self.granularity = n_bits, granularity
        method = QuantizationMethod[self.quantization_method[0].name]
        self._form = grids.form(method, n_bits, signed=signed, min_threshold=min_threshold)

    @property
    def params(self) -> dict[str, Any]:
        """Nothing: no number is kept."""
        return {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to its own grid, in the input's dtype; the gradient passes, as in training."""
        x = inputs.float()
        values = snapped_to_itself(x.detach(), self._form, self.granularity)
        if eligible.is_differentiated(inputs):
            values = ops.straight_through(values, x)
        return values.to(inputs.dtype)

    def extra_repr(self) -> str:
        """Return width and granularity."""
        return f"num_bits={self.num_bits}, per {self.granularity}"


class ActivationSymmetricDynamicInferableQuantizer(DynamicInferableQuantizer):
    """Deployed SYMMETRIC activations with scales of their own."""


class ActivationPOTDynamicInferableQuantizer(DynamicInferableQuantizer):
    """Deployed POWER_OF_TWO activations with scales of their own."""


class ActivationUniformDynamicInferableQuantizer(DynamicInferableQuantizer):
    """Deployed UNIFORM activations with scales of their own."""


_DYNAMIC: dict[QuantizationMethod, type[DynamicInferableQuantizer]] = {
    method: _marked(cls, MctqTarget.Activation, method)
    for method, cls in (
        (QuantizationMethod.SYMMETRIC, ActivationSymmetricDynamicInferableQuantizer),
        (QuantizationMethod.POWER_OF_TWO, ActivationPOTDynamicInferableQuantizer),
        (QuantizationMethod.UNIFORM, ActivationUniformDynamicInferableQuantizer),
    )
}


def build_dynamic(
    method: QuantizationMethod, n_bits: int, *, signed: bool, min_threshold: float, granularity: str
) -> DynamicInferableQuantizer:
    """Return the deployed quantizer of activations with scales of their own."""
    return _DYNAMIC[method](n_bits, signed=signed, min_threshold=min_threshold, granularity=granularity)
