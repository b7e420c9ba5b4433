"""From a deployed model to one that is made of nothing but mct-quantizers' own classes.

mctq's wrapper and holder run on Keras 2. Each wrapped layer of a graph becomes mctq's `KerasQuantizationWrapper`, with
mctq's `KerasActivationQuantizationHolder` before or behind it where its input or output is quantized too.

mctq can't express everything, and computes some things otherwise. Whatever would be lost or differ is found before
anything is made: quantizers are run beside mctq's, weights on their values and activations on their whole grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def probe(quantizer: Any) -> NDArray[np.float32]:
    """Return values at and next to every code and every tie of a grid with one scale, and beyond its ends."""
    qparams = quantizer.qparams
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    low, high = qparams.quant_min - zero_point, qparams.quant_max - zero_point
    values = (np.arange(2 * low - 3, 2 * high + 4) / 2 * scale).astype(np.float32)
    up, down = np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))
    return np.concatenate([values, up, down, np.asarray([np.inf, -np.inf, 3e38, -3e38, 0.0], np.float32)])


def difference(quantizer: Any, values: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]) -> str:
    """Return where mctq's quantizer gives another code than ours, an empty string where it gives the same.

    Parameters
    ----------
    quantizer : KerasInferableQuantizer
        Ours.
    values, ours, theirs : arrays of one shape
        What was quantized, what ours made of it, and what mctq's made of it.

    Notes
    -----
    TensorFlow's kernels compute with a scale that they derive from the range once more, and multiply by its rounded
    inverse: four roundings of a value of up to ``2**n_bits`` steps. Values so near to a tie may get the next code, and
    a code's value may be as much off.
    """
    scale = quantizer.qparams.along(values.ndim).scale.astype(np.float64)
    rounding = 4 * 2.0**quantizer.num_bits * 2.0**-24
    with np.errstate(invalid="ignore"):
        steps, our_steps, their_steps = (each.astype(np.float64) / scale for each in (values, ours, theirs))
        our_codes, their_codes = np.rint(our_steps), np.rint(their_steps)
        near = np.abs(steps - np.floor(steps) - 0.5) <= rounding
        same = (our_codes == their_codes) | (near & (np.abs(our_codes - their_codes) <= 1))
        same &= np.abs(their_steps - their_codes) <= rounding
    wrong = ~(same | (np.isnan(ours) & np.isnan(theirs)))
    if not wrong.any():
        return ""
    place = tuple(np.argwhere(wrong)[0])
    count = int(wrong.sum())
    return f"{count} of {wrong.size} values differ; {values[place]} becomes {theirs[place]}, and {ours[place]} in ours"
