"""Biases as integers, in training and after; defined by `trainable_core.reference.bias`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainable_core.errors import QuantizerStateError
from trainable_core.reference import bias as reference
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.kernels import eligible
from trainable_torch.kernels.cache import Dependencies, dependencies_of
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

CODE_MIN, CODE_MAX = reference.CODE_MIN, reference.CODE_MAX


class BiasQuantizer(nn.Module):
    """Puts the bias of a layer on the grid of the layer's sums of products.

    Parameters
    ----------
    source : ActivationQuantizationHolder
        The holder whose quantizer makes what the layer is given.
    of_weights : mapping of str to quantizer
        The layer's quantizers of weights. They and the source's quantizer may be exchanged later, as `finalize` does.
    attribute : str
        Which of them is that of the weight that the bias is added to the products with.
    groups : int
        How often the weight's channels are repeated along the output.
    subject : str
        Layer and attribute, for errors.

    Notes
    -----
    It has no variables of its own: its scale is made of those of the input and the weight, as they are at each call. It
    refers to their quantizers without owning them, so a state dict has the bias under its own name, and nothing else.
    """

    def __init__(
        self, source: ActivationQuantizationHolder, of_weights: Any, attribute: str, groups: int, subject: str
    ) -> None:
        super().__init__()
        self._refers_to = (source, of_weights)  # in a tuple, where PyTorch does not look for children
        self.attribute, self.groups, self.subject = attribute, groups, subject

    @property
    def source(self) -> ActivationQuantizationHolder:
        """The holder whose quantizer makes what the layer is given."""
        return self._refers_to[0]

    @property
    def _quantizers(self) -> tuple[Any, Any]:
        source, of_weights = self._refers_to
        return source.activation_holder_quantizer, of_weights[self.attribute]

    @property
    def is_switched_off(self) -> bool:
        """Whether the bias stays float, because the quantizer of the input or of the weight is switched off."""
        return any(
            isinstance(each, BasePytorchTrainableQuantizer) and each.is_switched_off for each in self._quantizers
        )

    @torch.no_grad()
    def scale(self) -> Tensor:
        """Return the real width of one unit of the bias.

        Returns
        -------
        Tensor, float32, () or (C,)
            One for each channel where the weight has one for each.

        Raises
        ------
        QuantizerStateError
            When a quantizer is not calibrated, or is none of this library's.
        """
        of_x, of_weight = (_scale_of(each, self.subject) for each in self._quantizers)
        scale: Tensor = of_x.to(of_weight.device) * of_weight
        return scale.repeat(self.groups) if self.groups > 1 and scale.dim() else scale

    def integers(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return a bias as int32 codes, and their scale as it is used.

        Raises
        ------
        IntegerRangeError
            When int32 does not hold a code.
        """
        scale = self.scale()
        reference.check_bias(self.subject, bias.detach().float().cpu().numpy(), scale.cpu().numpy())
        return _codes(bias.detach().float(), scale).to(torch.int32), scale

    def check(self, bias: Tensor) -> None:
        """Raise IntegerRangeError when int32 does not hold a code of the bias."""
        if not self.is_switched_off:
            self.integers(bias)

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias on the grid, in its own dtype."""
        is_trained = [isinstance(each, BasePytorchTrainableQuantizer) for each in self._quantizers]
        if True in is_trained and self.is_switched_off:
            return bias
        values = bias if bias.dtype == torch.float32 else bias.float()
        scale = self.scale()
        scale = scale if scale.device == values.device else scale.to(values.device)  # of a replica on another device
        if True in is_trained:
            apply = _apply if eligible.is_eager(values, scale) else _Snap.apply
            on_grid: Tensor = apply(values, scale)
        else:  # deployed: as weights, without a gradient
            with torch.no_grad():
                on_grid = _codes(values, scale) * scale
        return on_grid if on_grid.dtype == bias.dtype else on_grid.to(bias.dtype)

    def dependencies(self) -> Dependencies | None:
        """Return what the values depend on besides the bias: what the values of both quantizers depend on."""
        (settings_x, of_x), (settings_w, of_weight) = map(dependencies_of, self._quantizers)
        return (self.groups, settings_x, settings_w), [*of_x, *of_weight]

    def extra_repr(self) -> str:
        """Return what it is in a few words."""
        return "int32"


def _scale_of(quantizer: Any, subject: str) -> Tensor:
    """Return the scale of a quantizer's grid, without dimensions or along the channels."""
    if isinstance(quantizer, BasePytorchTrainableQuantizer):
        return quantizer.deployed_scale()
    if isinstance(quantizer, InferableQuantizer):
        scale = quantizer.grid_scale.detach()
    else:
        problem = f"its bias needs the scale of a {type(quantizer).__name__}, which is none of trainable_torch's"
        raise QuantizerStateError(subject, problem)
    return scale.reshape(-1) if scale.dim() else scale


def _codes(bias: Tensor, scale: Tensor) -> Tensor:
    codes: Tensor = torch.round(bias / scale).clamp(CODE_MIN, CODE_MAX)
    return codes


class _Snap(torch.autograd.Function):
    """A bias on its grid; the gradient passes to the float bias as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bias: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest grid points."""
        return _codes(bias, scale) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the bias, and none of the scale."""
        return upstream, None


# what `apply` does where no function transform is active, without looking up the arguments' names by `inspect`
_apply: Any = super(torch.autograd.Function, _Snap).apply
