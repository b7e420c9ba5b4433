"""mctq's PyTorch inferable quantizers, mended: one class per target and grid, each still an instance of mctq's.

Faults of mctq 1.7 that are corrected here (`docs/design/0004-corrected-mctq-pytorch-classes.md` has the measurements):

- the numbers are buffers, so the deployed model moves between devices and its state dict is complete;
- the forward is `trainable_torch.ops.snap`, the formula that trained: infinities saturate to their own side, NaN stays
  NaN, float64 and half-precision inputs are computed in float32;
- the input's ``requires_grad`` is left alone, and gradients pass through an activation's quantizer
  (`docs/design/0065-gradients-pass-deployed-activations.md`); weights are constants;
- scale and zero point are the grid's own, not derived once more from a range.

While a TorchScript trace with ``enable_custom_impl()`` runs, mctq's own path is taken: that is how mctq exports to
ONNX.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from mct_quantizers.pytorch import quantizers as mctq
from torch import Tensor, nn

from trainable_core.backend.inferable import by_grid, target_and_method
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.granularity import Blocks
from trainable_core.qparams import QParams, inferable_params
from trainable_core.validation import MAX_THRESHOLD
from trainable_torch import kernels, ops
from trainable_torch.grid import Grid
from trainable_torch.kernels import eligible
from trainable_torch.kernels.cache import Dependencies
from trainable_torch.kernels.plain import Ste

F32_TINY = torch.finfo(torch.float32).tiny  # the inverse of less may be infinite


class _Mended(nn.Module):
    """What every mended inferable quantizer shares.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers.
    n_bits : int
        Width of the codes.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    """

    grid_scale: Tensor
    grid_low: Tensor
    grid_high: Tensor
    quantization_target: Any
    quantization_method: Any
    num_bits: int
    blocks: Blocks | None = None
    """What shares a scale where it is finer than channels, as only `trainable_torch.granularity` has it."""
    _use_custom_impl: bool

    def __init__(self, qparams: QParams, n_bits: int, ndim: int) -> None:
        nn.Module.__init__(self)
        self._channels_axis = qparams.channels_axis
        self._ndim = ndim
        along = qparams.along(ndim)
        self.register_buffer("grid_scale", torch.tensor(along.scale))
        self.register_buffer("grid_low", torch.tensor(qparams.quant_min - along.zero_point, dtype=torch.float32))
        self.register_buffer("grid_high", torch.tensor(qparams.quant_max - along.zero_point, dtype=torch.float32))
        self._tell_mctq(n_bits)

    def _tell_mctq(self, n_bits: int) -> None:
        """Set mctq's own attributes from the grid."""
        super(nn.Module, self).__init__(**self.mctq_arguments(n_bits))
        for name in ("scales", "zero_points"):
            if isinstance(getattr(self, name, None), Tensor):
                setattr(self, name, getattr(self, name).cpu())  # mctq puts them on a GPU when there is one

    def mctq_arguments(self, n_bits: int) -> dict[str, Any]:
        """Return the arguments that build mctq's stock quantizer of the grid."""
        params = self.params
        signed = params.pop(SIGNED, None)
        listed = {key: value if isinstance(value, list) else [value] for key, value in params.items()}
        names = {THRESHOLD: "threshold", RANGE_MIN: "min_range", RANGE_MAX: "max_range"}
        arguments: dict[str, Any] = {"num_bits": n_bits, **{names[key]: value for key, value in listed.items()}}
        if self.quantization_target.name == QuantizationTarget.Weights.name:
            axis = self._channels_axis
            arguments["per_channel"] = axis is not None
            arguments["channel_axis"] = None if axis is None else axis % self._ndim
        elif signed is not None:
            arguments["signed"] = signed
        return arguments

    def to_mctq(self) -> Any:
        """Return mctq's stock inferable quantizer with the same numbers.

        It computes by mctq's formulas, which differ from ours for some grids and values;
        `trainable_torch.to_mctq` converts a whole model, and refuses what differs.
        """
        return getattr(mctq, type(self).__name__)(**self.mctq_arguments(self.num_bits))

    @property
    def qparams(self) -> QParams:
        """The grid's numbers, from the buffers."""
        shape = () if self._channels_axis is None else (-1,)
        scale, low, high = (
            b.detach().cpu().numpy().reshape(shape) for b in (self.grid_scale, self.grid_low, self.grid_high)
        )
        uniform = self.quantization_method[0].name == QuantizationMethod.UNIFORM.name
        quant_min = 0 if uniform else int(low.reshape(-1)[0])
        zero_point = np.asarray(quant_min - low).astype(np.int32)
        quant_max = int((high + zero_point).reshape(-1)[0])
        return QParams(scale, zero_point, quant_min, quant_max, self._channels_axis)

    @property
    def params(self) -> dict[str, Any]:
        """Threshold or nudged range, as in the configs."""
        return inferable_params(self.qparams, target_and_method(type(self))[1])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.grid_scale.is_meta:
            return
        if self._is_grid():
            qparams = self.qparams
            self._tell_mctq((qparams.quant_max - qparams.quant_min + 1).bit_length() - 1)
        else:
            args[-1].append(f"{prefix}grid_scale, grid_low and grid_high: their values are no grid")

    def _is_grid(self) -> bool:
        """Return whether the buffers hold a positive finite scale and codes that zero is among."""
        scale, low, high = self.grid_scale, self.grid_low, self.grid_high
        codes = high - low + 1
        widths = torch.as_tensor([2.0**n_bits for n_bits in range(1, 17)], device=codes.device)
        whole = (low == low.round()) & (low <= 0) & (high >= 0) & torch.isin(codes, widths)
        return bool(((scale >= F32_TINY) & (scale <= MAX_THRESHOLD / codes) & whole & (codes == codes.amax())).all())

    def _apply(self, fn: Any, recurse: bool = True) -> _Mended:  # noqa: FBT001, FBT002 - torch's signature
        """Move the numbers; they stay float32 whatever dtype the model is cast to."""
        return cast("_Mended", super()._apply(lambda tensor: keep_float32(fn, tensor), recurse))  # type: ignore[no-untyped-call] # torch leaves it so

    def dependencies(self) -> Dependencies | None:
        """Return what the values depend on besides the input: the buffers; None for a class or forward of others."""
        fields: Any = self.__dict__
        get = fields["_buffers"].get
        scale, low, high = get("grid_scale"), get("grid_low"), get("grid_high")
        if type(self) not in _OURS or "forward" in fields or scale is None or low is None or high is None:
            return None
        return None, (scale, low, high)

    def snapping(self, _x: Tensor) -> kernels.Snapping:
        """Return what snaps tensors to the grid as it is now."""
        return kernels.Snapping(self.grid_scale, self.grid_low, self.grid_high)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype."""
        if self._use_custom_impl and eligible.is_tracing():
            stock: Any = super(nn.Module, self)  # mctq's class
            return cast("Tensor", stock.__call__(inputs))
        with torch.no_grad():
            return kernels.snap(inputs.float(), self.grid_scale, self.grid_low, self.grid_high).to(inputs.dtype)


class _Activation(_Mended):
    """What every mended inferable quantizer of activations shares."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; its gradient is that of `reference.ste`."""
        if not eligible.is_differentiated(inputs):
            return super().forward(inputs)
        # counted from the lowest code, so that the ends counted from zero are the buffers
        grid = Grid(self.grid_scale, -self.grid_low, 0, 2**self.num_bits - 1, centered=False)
        return kernels.fake_quantize(inputs.float(), grid, Ste()).to(inputs.dtype)


def keep_float32(fn: Any, tensor: Tensor) -> Tensor:
    """Return ``fn(tensor)``, but in the dtype that the tensor had: for ``nn.Module._apply`` of a quantizer."""
    moved: Tensor = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class WeightsSymmetricInferableQuantizer(
    _Mended, metaclass=UnlistedSubclass, of=mctq.WeightsSymmetricInferableQuantizer
):
    """Deployed SYMMETRIC weights."""


class WeightsPOTInferableQuantizer(_Mended, metaclass=UnlistedSubclass, of=mctq.WeightsPOTInferableQuantizer):
    """Deployed POWER_OF_TWO weights."""


class WeightsUniformInferableQuantizer(_Mended, metaclass=UnlistedSubclass, of=mctq.WeightsUniformInferableQuantizer):
    """Deployed UNIFORM weights."""


class ActivationSymmetricInferableQuantizer(
    _Activation, metaclass=UnlistedSubclass, of=mctq.ActivationSymmetricInferableQuantizer
):
    """Deployed SYMMETRIC activations."""


class ActivationPOTInferableQuantizer(_Activation, metaclass=UnlistedSubclass, of=mctq.ActivationPOTInferableQuantizer):
    """Deployed POWER_OF_TWO activations."""


class ActivationUniformInferableQuantizer(
    _Activation, metaclass=UnlistedSubclass, of=mctq.ActivationUniformInferableQuantizer
):
    """Deployed UNIFORM activations."""


class _Table(_Mended):
    """What the look-up tables share: levels beside the numbers of the grid that they are codes of."""

    grid_levels: Tensor
    moved_by_mctq: tuple[str, ...] = ("_threshold_torch", "_lut_values_torch")
    """Tensors that mctq's class puts on a GPU when there is one."""

    def __init__(self, qparams: QParams, n_bits: int, ndim: int) -> None:
        self._table, self._reaches_below = qparams.levels, qparams.signed
        super().__init__(qparams, n_bits, ndim)
        self.register_buffer("grid_levels", torch.tensor(qparams.levels, dtype=torch.float32))

    def _tell_mctq(self, n_bits: int) -> None:
        """Set mctq's own attributes; of a grid that was loaded the width is the same as before."""
        if "grid_levels" in self._buffers:
            n_bits, self._table = self.num_bits, tuple(int(level) for level in self.grid_levels)
            self._reaches_below = super().qparams.signed
        super()._tell_mctq(n_bits)
        for name in self.moved_by_mctq:
            setattr(self, name, getattr(self, name).cpu())

    def mctq_arguments(self, n_bits: int) -> dict[str, Any]:
        """Return the arguments that build mctq's stock quantizer; its `eps` is left out, which moves ties."""
        params, axis = self.params, self._channels_axis
        threshold = params[THRESHOLD]
        return {
            "num_bits": n_bits,
            "lut_values": [float(level) for level in params[LUT_VALUES]],
            "threshold": threshold if isinstance(threshold, list) else [threshold],
            "per_channel": axis is not None,
            "channel_axis": None if axis is None else axis % self._ndim,
            "input_rank": self._ndim,
            "eps": 0.0,
        }

    @property
    def qparams(self) -> QParams:
        """The grid's numbers, from the buffers."""
        return replace(super().qparams, levels=self._table)

    def _is_grid(self) -> bool:
        """Return whether the buffers hold a positive finite scale and levels among the codes."""
        levels = self.grid_levels
        ends = self.grid_low.reshape(-1)[:1], self.grid_high.reshape(-1)[:1]
        whole = (levels == levels.round()) & (levels >= ends[0]) & (levels <= ends[1])
        return super()._is_grid() and bool(whole.all()) and bool((levels.diff() > 0).all())

    def dependencies(self) -> Dependencies | None:
        """Return None: the kernels know no tables."""
        return None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input on the levels, in the input's dtype."""
        if self._use_custom_impl and eligible.is_tracing():
            stock: Any = super(nn.Module, self)  # mctq's class
            return cast("Tensor", stock.__call__(inputs))
        with torch.no_grad():
            values = ops.snap_to_levels(inputs.float(), self.grid_scale, self._table, signed=self._reaches_below)
            return values.to(inputs.dtype)


class WeightsLUTSymmetricInferableQuantizer(
    _Table, metaclass=UnlistedSubclass, of=mctq.WeightsLUTSymmetricInferableQuantizer
):
    """Deployed LUT_SYM_QUANTIZER weights."""


class WeightsLUTPOTInferableQuantizer(_Table, metaclass=UnlistedSubclass, of=mctq.WeightsLUTPOTInferableQuantizer):
    """Deployed LUT_POT_QUANTIZER weights."""


class ActivationLutPOTInferableQuantizer(
    _Table, metaclass=UnlistedSubclass, of=mctq.ActivationLutPOTInferableQuantizer
):
    """Deployed LUT_POT_QUANTIZER activations."""

    moved_by_mctq = ("lut_values",)

    def mctq_arguments(self, n_bits: int) -> dict[str, Any]:
        """Return the arguments that build mctq's stock quantizer; its `eps` is left out, which moves ties."""
        params = self.params
        return {
            "num_bits": n_bits,
            "lut_values": [float(level) for level in params[LUT_VALUES]],
            "threshold": [params[THRESHOLD]],
            "signed": params[SIGNED],
            "eps": 0.0,
        }

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the input on the levels, in its dtype; the gradient passes within the range of the codes."""
        if not eligible.is_differentiated(inputs):
            return super().forward(inputs)
        values = ops.snap_to_levels_passing(inputs.float(), self.grid_scale, self._table, signed=self._reaches_below)
        return values.to(inputs.dtype)


InferableQuantizer = _Mended

_CLASSES = by_grid(
    WeightsSymmetricInferableQuantizer,
    WeightsPOTInferableQuantizer,
    WeightsUniformInferableQuantizer,
    ActivationSymmetricInferableQuantizer,
    ActivationPOTInferableQuantizer,
    ActivationUniformInferableQuantizer,
    WeightsLUTSymmetricInferableQuantizer,
    WeightsLUTPOTInferableQuantizer,
    ActivationLutPOTInferableQuantizer,
)

_OURS = frozenset(_CLASSES.values())


def build(target: QuantizationTarget, method: QuantizationMethod, n_bits: int, qparams: QParams, ndim: int) -> _Mended:
    """Return the inferable quantizer of a grid.

    Parameters
    ----------
    target, method
        Which class.
    n_bits : int
        Width of the codes.
    qparams : QParams
        The grid's numbers.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    """
    return _CLASSES[target, method](qparams, n_bits, ndim)
