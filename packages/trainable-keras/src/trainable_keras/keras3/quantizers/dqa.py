"""DNN quantization with attention; defined by `trainable_core.reference.dqa`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops as keras_ops
from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.backend.dqa_options import (
    bit_cost,
    candidate_widths,
    selecting_logits,
    temperature_schedule,
)
from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod, VariableGroup
from trainable_core.errors import UnsupportedConfigError
from trainable_keras.keras3 import ops
from trainable_keras.keras3.annealing import KerasLinearAnnealingScheduler
from trainable_keras.keras3.engine import Tensor, read, to_numpy
from trainable_keras.keras3.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras3.quantizers.ste import METHODS

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


class DqaQuantizer(BaseKerasTrainableQuantizer):
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
    the largest logit, which is what `convert2inferable` deploys. Equal logits choose the smaller width. Each call with
    ``training=True`` counts as one step, and adds `regularization` to the layer's losses, which `fit` minimizes.
    """

    soft_training: ClassVar[bool] = True
    conformance_arguments: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "temperature": {"t_start": 0, "t_end": 3, "initial_val": 2.0, "target_val": 0.1},
            "bit_cost_weight": 0.25,
        },
    )

    logits: keras.Variable
    step: keras.Variable

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        temperature: Mapping[str, Any] | None = None,
        bit_cost_weight: float = 0.0,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        name = type(self).__name__
        self.temperature = temperature_schedule(KerasLinearAnnealingScheduler, temperature, name)
        self.bit_cost_weight = bit_cost(bit_cost_weight, name)

    @property
    def widths(self) -> tuple[int, ...]:
        """Candidate widths, ascending."""
        return candidate_widths(self.quantization_config)

    @property
    def selected_width(self) -> int:
        """Width with the largest logit."""
        return self.widths[int(np.argmax(to_numpy(_comparable(read(self.logits)))))]

    def select_width(self, width: int) -> None:
        """Give `width` the largest logit."""
        self.assign(self.get_quantizer_variable("logits"), selecting_logits(self.widths, width))

    @property
    def schedule_end(self) -> int:
        """Number of training steps after which training values are the deployed ones."""
        return math.floor(self.temperature.t_end) + 1

    def add_variables(self) -> None:
        """Add the attention's logits, all equal, and the schedule's step."""
        zeros = np.zeros(len(self.widths), np.float32)
        self.add_quantizer_variable("logits", zeros, VariableGroup.QPARAMS, trained=True)
        self.step = self.add_weight(
            name="step",
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )

    def advance(self) -> None:
        """Count one training step."""
        self.step.assign(self.step + 1)

    def get_arguments(self) -> dict[str, Any]:
        """Return temperature and bit cost weight."""
        return {"temperature": self.temperature.to_dict(), "bit_cost_weight": self.bit_cost_weight}

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from, the schedule's step included."""
        return {**super().get_config(), "step": int(to_numpy(self.step)) if self.variable_names else 0}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DqaQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on; see core's base class."""
        quantizer: Any = super().from_config(config)
        step = config.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UnsupportedConfigError(f"{cls.__name__}.from_config", f"not a quantizer's config: 'step' is {step!r}")
        if quantizer.variable_names:
            quantizer.step.assign(step)
        return quantizer  # type: ignore[no-any-return] # of the class it was called on

    def attention(self) -> Tensor:
        """Return the softmax over widths at the present temperature, float32, shape (K,)."""
        # the first training call is step 0 of the schedule; `advance` has counted it already
        step = keras_ops.maximum(read(self.step) - 1, 0)
        logits = read(self.logits) / self.temperature(step)
        # not keras.ops.softmax, which warns of a single width
        weights = keras_ops.exp(logits - keras_ops.stop_gradient(keras_ops.max(logits)))
        return weights / keras_ops.sum(weights)

    def regularization(self) -> Tensor | None:
        """Return ``bit_cost_weight`` times the expected bit width, or None for weight 0."""
        if not self.bit_cost_weight or not self.quantization_config.enabled:
            return None
        widths = keras_ops.convert_to_tensor(np.asarray(self.widths, np.float32))
        return self.bit_cost_weight * keras_ops.sum(self.attention() * widths)

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the mixture of the widths, or the winner."""
        ndim = len(x.shape)
        candidates = [ops.ste_fake_quantize(x, self.grid(ndim, width)) for width in self.widths]
        winner = keras_ops.argmax(_comparable(read(self.logits)))
        chosen = candidates[0]
        for index, candidate in enumerate(candidates[1:], start=1):
            chosen = keras_ops.where(winner == index, candidate, chosen)
        if not training:
            return chosen
        attention = self.attention()
        mixed = sum(attention[index] * candidate for index, candidate in enumerate(candidates))
        ended = read(self.step) > self.temperature.t_end
        return keras_ops.where(ended, chosen, mixed)


def _comparable(logits: Tensor) -> Tensor:
    """Return logits that every engine finds the same largest one of: NaN as infinity, subnormal numbers as zero."""
    held = keras_ops.where(keras_ops.isnan(logits), keras_ops.full_like(logits, np.inf), logits)
    return keras_ops.where(keras_ops.abs(held) < SMALLEST_NORMAL, keras_ops.zeros_like(held), held)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DQA)
class DqaWeightsQuantizer(DqaQuantizer):
    """DQA for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.DQA)
class DqaActivationQuantizer(DqaQuantizer):
    """DQA for activations."""
