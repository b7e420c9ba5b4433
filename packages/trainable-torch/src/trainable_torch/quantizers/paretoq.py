"""ParetoQ's levels of 1 and 2 bits; defined by `trainable_core.reference.paretoq`."""

from __future__ import annotations

from typing import Any

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod
from trainable_core.reference import paretoq
from trainable_torch.quantizers.table import METHODS, TableQuantizer


class ParetoqQuantizer(TableQuantizer):
    """Binary, ternary or stretched levels, the threshold learns; see `trainable_core.reference.paretoq`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    ternary : bool
        With 2 bits: three levels instead of four.
    """

    declaration = paretoq.METHOD

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        ternary: bool = False,  # noqa: FBT001, FBT002 - a recipe gives it by name
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        paretoq.levels(quantization_config.n_bits, type(self).__name__, ternary=ternary)  # refuses what does not fit
        self.ternary = ternary

    @property
    def levels(self) -> tuple[int, ...]:
        """The table."""
        return paretoq.levels(self.quantization_config.n_bits, self.subject, ternary=self.ternary)

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"ternary": self.ternary}


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.PARETOQ)
class ParetoqWeightsQuantizer(ParetoqQuantizer):
    """ParetoQ for weights."""
