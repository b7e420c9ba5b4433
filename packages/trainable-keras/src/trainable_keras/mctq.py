"""From a deployed model to one that is made of nothing but mct-quantizers' own classes.

mctq's wrapper and holder run on Keras 2. Each wrapped layer of a graph becomes mctq's `KerasQuantizationWrapper`, with
mctq's `KerasActivationQuantizationHolder` before or behind it where its input or output is quantized too.

mctq can't express everything, and computes some things otherwise. Whatever would be lost or differ is found before
anything is made: quantizers are run beside mctq's, weights on their values and activations on their whole grid.
"""

from __future__ import annotations

from typing import Any

from trainable_core.errors import QuantizerStateError, UnsupportedConfigError
from trainable_keras.framework import Framework
from trainable_keras.wrapping import state_of, trainable_quantizers


def to_mctq(framework: Framework, model: Any) -> Any:
    """Return a new model of mctq's own classes; see `trainable_keras.to_mctq`."""
    if framework.stock_copy is None:
        raise UnsupportedConfigError(
            "to_mctq",
            "mct-quantizers' own wrapper and holder can't be built on Keras 3: they pass the name of a weight by "
            "position, ask for keras.backend.learning_phase, and replace a kernel that is a property there",
            "build the model with Keras 2 (TF_USE_LEGACY_KERAS=1 and tf-keras) for mct-quantizers' classes, or save "
            "this one as a .keras file.",
        )
    state_of(framework, model)
    waiting = [quantizer for quantizer in trainable_quantizers(model) if quantizer.quantization_config.enabled]
    if waiting:
        raise QuantizerStateError(
            type(model).__name__, f"{waiting[0].subject} is still trainable", "to_mctq(finalize(qmodel))."
        )
    return framework.stock_copy(framework, model)
