"""Additive powers of two; defined by `trainable_core.reference.apot`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod
from trainable_core.reference import apot
from trainable_torch.quantizers.table import METHODS, TableQuantizer


class ApotQuantizer(TableQuantizer):
    """Levels are sums of powers of two, the threshold learns; see `trainable_core.reference.apot`."""

    declaration = apot.METHOD

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        super().__init__(quantization_config, freeze_quant_params)
        apot.levels(quantization_config.n_bits, type(self).__name__)  # refuses the width

    @property
    def levels(self) -> tuple[int, ...]:
        """The table."""
        return apot.levels(self.quantization_config.n_bits, self.subject)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.APOT)
class ApotWeightsQuantizer(ApotQuantizer):
    """APoT for weights."""
