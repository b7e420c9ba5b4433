"""DNN quantization with attention; defined by `trainable_core.reference.dqa`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops as keras_ops
from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod, VariableGroup
from trainable_core.errors import UnsupportedConfigError
from trainable_core.reference import dqa
from trainable_keras import ops
from trainable_keras.annealing import KerasLinearAnnealingScheduler
from trainable_keras.engine import Tensor, read, to_numpy
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.quantizers.ste import METHODS

TEMPERATURE = {"t_start": 0, "t_end": 1000, "initial_val": 1.0, "target_val": 0.02}
"""Default schedule: from an even mixture to a clear choice within 1000 training steps."""

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
        self.temperature_arguments = dict(TEMPERATURE if temperature is None else temperature)
        try:
            self.temperature = KerasLinearAnnealingScheduler(**self.temperature_arguments)
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
        return self.widths[int(np.argmax(to_numpy(_comparable(read(self.logits)))))]

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
        return {"temperature": dict(self.temperature_arguments), "bit_cost_weight": self.bit_cost_weight}

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
