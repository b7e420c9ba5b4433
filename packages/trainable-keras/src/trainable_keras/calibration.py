"""From seen values to thresholds: one pass over the batches, then all quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from keras import ops
from tqdm.auto import tqdm

from trainable_core.calibrating import check_batches, feed, inputs_of, waiting_quantizers
from trainable_core.calibration import Observer
from trainable_core.errors import QuantizerStateError
from trainable_core.thresholds import Params, activation_params, weights_params
from trainable_keras.engine import to_numpy
from trainable_keras.holder import ActivationQuantizationHolder
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.tracing import layers_within
from trainable_keras.training import forget_functions
from trainable_keras.wrapper import QuantizationWrapper
from trainable_keras.wrapping import state_of, trainable_quantizers


def calibrate(
    qmodel: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Any:
    """Set the thresholds of a wrapped model from its weights and from what its activations look like.

    Parameters
    ----------
    qmodel : keras.Model
        What `wrap` returned; changed in place, and only when everything went well.
    batches : iterable, optional
        What the model is called with; needed when activations are quantized. Of a tuple or list only the first item is
        passed (a dataset's inputs without its labels), anything else as it is; a mapping too, for models with named
        inputs.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    force : bool
        Overwrite thresholds that are already set, trained ones included.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    keras.Model
        `qmodel`.

    Raises
    ------
    QuantizerStateError
        When every quantizer has its numbers and `force` is false, or when the model is finalized.
    CalibrationError
        When there are no batches, a quantized tensor was never seen, or values are not finite.

    Notes
    -----
    Activations are seen in inference mode, with float weights. Quantizers that already have numbers (from a config, or
    from a former calibration) keep them unless forced.
    """
    state = state_of(qmodel)
    if state.finalized:
        raise QuantizerStateError(type(qmodel).__name__, "it is finalized; its quantizers don't change any more")
    waiting = waiting_quantizers(trainable_quantizers(qmodel), type(qmodel).__name__, force=force)
    spec = state.recipe.calibration
    new: list[tuple[BaseKerasTrainableQuantizer, Params]] = []
    holders = [
        layer
        for layer in layers_within(qmodel)
        if isinstance(layer, ActivationQuantizationHolder) and id(layer.activation_holder_quantizer) in waiting
    ]
    if holders:
        observers = _observe(qmodel, holders, batches, forward, progress=progress)
        for holder, observer in zip(holders, observers, strict=True):
            quantizer = holder.activation_holder_quantizer
            new.append((quantizer, activation_params(quantizer, observer, spec)))
    for layer in layers_within(qmodel):
        if isinstance(layer, QuantizationWrapper):
            for _, weight, quantizer in layer.get_weights_vars():
                if id(quantizer) in waiting:
                    new.append((quantizer, weights_params(quantizer, to_numpy(weight).astype("float32"), spec)))
    for quantizer, params in new:
        quantizer.set_quantization_params(params)
    forget_functions(qmodel)
    return qmodel


def _observe(
    qmodel: Any,
    holders: list[ActivationQuantizationHolder],
    batches: Any,
    forward: Callable[[Any, Any], Any] | None,
    *,
    progress: bool | None,
) -> list[Observer]:
    single = ops.is_tensor(batches) or hasattr(batches, "__array__")
    check_batches(batches, forward, len(holders), single=single)
    observers = [Observer() for _ in holders]
    with observing(qmodel, {id(holder): observer for holder, observer in zip(holders, observers, strict=True)}):
        shown = tqdm(batches, desc="calibrate", disable=None if progress is None else not progress, leave=False)
        feed(shown, lambda batch: (forward or _call)(qmodel, batch))
    return observers


def _call(model: Any, batch: Any) -> Any:
    return model(inputs_of(batch), training=False)


@contextmanager
def observing(qmodel: Any, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Let holders see and pass on what comes, with float weights; everything is put back afterwards."""
    layers = layers_within(qmodel)
    wrappers = [layer for layer in layers if isinstance(layer, QuantizationWrapper)]
    holders = [layer for layer in layers if isinstance(layer, ActivationQuantizationHolder)]
    try:
        for wrapper in wrappers:
            wrapper.quantizes_weights = False
        for holder in holders:
            holder.observer = observers.get(id(holder), Observer())
        yield
    finally:
        for holder in holders:
            holder.observer = None
        for wrapper in wrappers:
            wrapper.quantizes_weights = True
