"""DNN quantization with attention; defined by `trainable_core.reference.dqa`."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.backend.options import DqaOptions
from trainable_core.enums import VariableGroup
from trainable_core.reference import dqa
from trainable_keras.functions import Tensor
from trainable_keras.quantizers.base import KerasQuantizer

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


class DqaQuantizer(DqaOptions, KerasQuantizer):
    """Attention over bit widths, annealed to one of them; see `trainable_core.reference.dqa`.

    Its arguments are those of `trainable_core.backend.options.DqaOptions`.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is the mixture. In every later one, and in eval mode, it is
    that of the width with the largest logit, which is what `convert2inferable` deploys. Equal logits choose the smaller
    width. A wrapped layer's call with ``training=True`` counts as one step, and adds `regularization` to the layer's
    losses, which `fit` minimizes.
    """

    declaration = dqa.METHOD

    logits: Any

    @property
    def selected_width(self) -> int:
        """Width with the largest logit."""
        return self.structure.widths[int(np.argmax(self.to_numpy(self._comparable_logits())))]

    def select_width(self, width: int) -> None:
        """Give `width` the largest logit."""
        self.assign(self.get_quantizer_variable("logits"), dqa.selecting_logits(self.structure.widths, width))

    def add_variables(self) -> None:
        """Add the attention's logits, all equal."""
        zeros = np.zeros(len(self.structure.widths), np.float32)
        self.add_quantizer_variable("logits", zeros, VariableGroup.QPARAMS, trained=True)

    def attention(self) -> Tensor:
        """Return the softmax over widths at the present temperature, float32, shape (K,)."""
        f = self.functions
        return f.softmax(self._value_of(self.logits) / f.cast(self.temperature(self.current_step), "float32"))

    def regularization(self) -> Tensor | None:
        """Return ``bit_cost_weight`` times the expected bit width, or None for weight 0."""
        if not self.bit_cost_weight or not self.quantization_config.enabled:
            return None
        return self.bit_cost_weight * self.functions.sum(
            self.attention() * self.functions.floats(self.structure.widths)
        )

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the mixture of the widths, or the winner."""
        f = self.functions
        candidates = [self.ops.ste_fake_quantize(x, self.grid(f.rank(x), width)) for width in self.structure.widths]
        winner = f.argmax(self._comparable_logits())
        chosen = candidates[0]
        for index, candidate in enumerate(candidates[1:], start=1):
            chosen = f.where(winner == index, candidate, chosen)
        chosen = f.show_shape(chosen, x)
        if not training:
            return chosen
        attention = self.attention()
        mixed = f.show_shape(sum(attention[index] * candidate for index, candidate in enumerate(candidates)), x)
        return self.until(dqa.schedule_end(self.temperature), mixed, chosen)

    def _comparable_logits(self) -> Tensor:
        """Return logits of which the same one is largest everywhere: NaN as infinity, subnormal numbers as zero."""
        f, logits = self.functions, self._value_of(self.logits)
        held = f.where(f.isnan(logits), f.number(np.inf), logits)
        return f.where(f.abs(held) < SMALLEST_NORMAL, f.zeros_like(held), held)
