"""Dynamic activations; defined by `trainable_core.reference.dynamic`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.backend.options import DynamicOptions
from trainable_core.enums import TrainingMethod
from trainable_core.reference import dynamic
from trainable_torch import granularity, ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.DYNAMIC)
class DynamicActivationQuantizer(DynamicOptions, BasePytorchTrainableQuantizer):
    """Scales are computed from the tensor itself; see `trainable_core.reference.dynamic`.

    Its arguments are those of `trainable_core.backend.options.DynamicOptions`.
    """

    declaration = dynamic.METHOD

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid that it has for itself, in training as in evaluation."""
        values = granularity.snapped_to_itself(x.detach(), self._forms[self.selected_width], self.granularity)
        return ops.straight_through(values, x)

    def convert2inferable(self) -> granularity.DynamicInferableQuantizer:
        """Return the deployed quantizer, which computes its scales as this one does.

        Raises
        ------
        QuantizerStateError
            When the quantizer is not initialized, or its config switches quantization off.
        """
        self.require_deployable()
        config = self.quantization_config
        made = granularity.build_dynamic(
            config.quantization_method,
            config.n_bits,
            signed=self.signed,
            min_threshold=config.min_threshold,
            granularity=self.granularity,
        )
        return made.train(self.training)
