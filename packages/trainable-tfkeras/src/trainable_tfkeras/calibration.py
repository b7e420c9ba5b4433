"""From seen values to thresholds: one pass over the batches, then all quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tqdm.auto import tqdm

from trainable_core.calibrating import check_batches, feed, inputs_of, waiting_quantizers
from trainable_core.calibration import Observer
from trainable_core.errors import QuantizerStateError
from trainable_core.thresholds import Params, activation_params, weights_params
from trainable_tfkeras.engine import to_numpy, untracked
from trainable_tfkeras.holder import ActivationQuantizationHolder
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_tfkeras.tracing import layers_within
from trainable_tfkeras.training import forget_functions
from trainable_tfkeras.wrapper import QuantizationWrapper
from trainable_tfkeras.wrapping import state_of, trainable_quantizers


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
    qmodel : tf.keras.Model
        What `wrap` returned; changed in place, and only when everything went well.
    batches : iterable, optional
        What the model is called with, a ``tf.data.Dataset`` for example; needed when activations are quantized. Of a
        tuple or list only the first item is passed (a dataset's inputs without its labels), anything else as it is; a
        mapping too, for models with named inputs.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    force : bool
        Overwrite thresholds that are already set, trained ones included.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    tf.keras.Model
        `qmodel`.

    Raises
    ------
    QuantizerStateError
        When every quantizer has its numbers and `force` is false, or when the model is finalized.
    CalibrationError
        When there are no batches, a quantized tensor was never seen, or values are not finite.

    Notes
    -----
    Activations are seen in inference mode and eagerly, with float weights. Quantizers that already have numbers (from a
    config, or from a former calibration) keep them unless forced.
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
        single = tf.is_tensor(batches) or hasattr(batches, "__array__")
        check_batches(batches, forward, len(holders), single=single)
        observers = {id(holder): Observer() for holder in holders}
        bar = tqdm(batches, desc="calibrate", disable=None if progress is None else not progress, leave=False)
        with observing(qmodel, observers):
            feed(bar, lambda batch: (forward or _call)(qmodel, batch))
        for holder in holders:
            quantizer = holder.activation_holder_quantizer
            new.append((quantizer, activation_params(quantizer, observers[id(holder)], spec)))
    for layer in layers_within(qmodel):
        if isinstance(layer, QuantizationWrapper):
            for _, weight, quantizer in layer.get_weights_vars():
                if id(quantizer) in waiting:
                    new.append((quantizer, weights_params(quantizer, to_numpy(weight).astype("float32"), spec)))
    for quantizer, params in new:
        quantizer.set_quantization_params(params)
    forget_functions(qmodel)
    return qmodel


def _call(model: Any, batch: Any) -> Any:
    return model(inputs_of(batch), training=False)


@contextmanager
def observing(qmodel: Any, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Let holders see and pass on what comes, with float weights; everything is put back afterwards."""
    layers = layers_within(qmodel)
    wrappers = [layer for layer in layers if isinstance(layer, QuantizationWrapper)]
    holders = [layer for layer in layers if isinstance(layer, ActivationQuantizationHolder)]
    eager = tf.config.functions_run_eagerly()
    try:
        tf.config.run_functions_eagerly(run_eagerly=True)  # a call that the user compiled shows its values too
        for wrapper in wrappers:
            with untracked(wrapper):
                wrapper.quantizes_weights = False
        for holder in holders:
            with untracked(holder):
                holder.observer = observers.get(id(holder), Observer())
        yield
    finally:
        tf.config.run_functions_eagerly(eager)
        for holder in holders:
            with untracked(holder):
                holder.observer = None
        for wrapper in wrappers:
            with untracked(wrapper):
                wrapper.quantizes_weights = True
