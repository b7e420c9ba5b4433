"""DNN quantization with attention; defined by `trainable_core.reference.dqa`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod, VariableGroup
from trainable_core.errors import UnsupportedConfigError
from trainable_core.reference import dqa
from trainable_torch import ops
from trainable_torch.annealing import PytorchLinearAnnealingScheduler
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS

TEMPERATURE = {"t_start": 0, "t_end": 1000, "initial_val": 1.0, "target_val": 0.02}
"""Default schedule: from an even mixture to a clear choice within 1000 training steps."""


class DqaQuantizer(BasePytorchTrainableQuantizer):
    """Attention over bit widths, annealed to one of them; see `trainable_core.reference.dqa`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class. The config's candidates are the widths; without candidates n, 2n and 4n, at most 16.
    temperature : mapping, optional
        Arguments of `LinearAnnealingScheduler`; the target must be positive. Steps are counted by `advance`.
    bit_cost_weight : float
        Factor of the expected bit width in `regularization`.

    Notes
    -----
    While training, the output is the mixture; in eval mode, and from the end of the schedule on, it is the width with
    the largest logit, which is what `convert2inferable` deploys. Equal logits choose the smaller width.
    """

    logits: Tensor
    step: Tensor

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        temperature: Mapping[str, Any] | None = None,
        bit_cost_weight: float = 0.0,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.temperature_arguments = dict(TEMPERATURE if temperature is None else temperature)
        try:
            self.temperature = PytorchLinearAnnealingScheduler(**self.temperature_arguments)
        except TypeError as error:
            raise UnsupportedConfigError(
                f"{type(self).__name__}: temperature", str(error), f"give {', '.join(TEMPERATURE)}."
            ) from None
        if not (self.temperature.initial_val > 0 and self.temperature.target_val > 0):
            raise UnsupportedConfigError(f"{type(self).__name__}: temperature", "its values must be positive")
        if (
            isinstance(bit_cost_weight, bool)
            or not isinstance(bit_cost_weight, int | float)
            or not bit_cost_weight >= 0
        ):
            raise UnsupportedConfigError(
                f"{type(self).__name__}: bit_cost_weight", f"must be >= 0, got {bit_cost_weight!r}"
            )
        self.bit_cost_weight = float(bit_cost_weight)

    @property
    def widths(self) -> tuple[int, ...]:
        """Candidate widths, ascending."""
        candidates = self.quantization_config.candidates
        if candidates is None:
            return tuple(dqa.default_widths(self.quantization_config.n_bits))
        return tuple(sorted({candidate.n_bits for candidate in candidates}))

    @property
    def selected_width(self) -> int:
        """Width with the largest logit."""
        return self.widths[int(self.logits.detach().argmax())]

    def add_variables(self) -> None:
        """Add the attention's logits, all equal, and the schedule's step."""
        self.add_quantizer_variable("logits", torch.zeros(len(self.widths)), VariableGroup.QPARAMS, trained=True)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def advance(self) -> None:
        """Count one training step."""
        self.step += 1

    def get_arguments(self) -> dict[str, Any]:
        """Return temperature and bit cost weight."""
        return {"temperature": self.temperature_arguments, "bit_cost_weight": self.bit_cost_weight}

    def attention(self) -> Tensor:
        """Return the softmax over widths at the present temperature, float32, shape (K,)."""
        # the first training forward is step 0 of the schedule; `advance` has counted it already
        temperature = self.temperature((self.step - 1).clamp_min(0))
        return torch.softmax(self.logits / torch.as_tensor(temperature).to(torch.float32), 0)

    def regularization(self) -> Tensor | None:
        """Return ``bit_cost_weight`` times the expected bit width, or None for weight 0."""
        if not self.bit_cost_weight or not self.quantization_config.enabled:
            return None
        widths = torch.tensor(self.widths, dtype=torch.float32, device=self.logits.device)
        return self.bit_cost_weight * (self.attention() * widths).sum()

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the mixture of the widths, or the winner."""
        if not training and not torch.compiler.is_compiling():
            return ops.ste_fake_quantize(x, self.grid(x.dim()))
        candidates = [ops.ste_fake_quantize(x, self.grid(x.dim(), width)) for width in self.widths]
        winner = self.logits.detach().argmax()
        chosen = candidates[0]
        for index, candidate in enumerate(candidates[1:], start=1):
            chosen = torch.where(winner == index, candidate, chosen)
        if not training:
            return chosen
        mixed = sum(weight * candidate for weight, candidate in zip(self.attention(), candidates, strict=True))
        return torch.where(self.step > self.temperature.t_end, chosen, mixed)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DQA)
class DqaWeightsQuantizer(DqaQuantizer):
    """DQA for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.DQA)
class DqaActivationQuantizer(DqaQuantizer):
    """DQA for activations."""
