"""From seen values to thresholds: one pass over the batches, then all quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import check_batches, feed, inputs_of, waiting_quantizers
from trainable_core.calibration.quantizers import Params, activation_params, set_all, weights_params
from trainable_core.errors import QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper
from trainable_keras.training import forget_functions
from trainable_keras.wrapping import state_of, trainable_quantizers

Observers = Mapping[int, Observer]
"""Observers by the ``id`` of their holder."""


def calibrate(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Any:
    """Set the thresholds of a wrapped model's quantizers: of all that wait for them, or, when one can't, of none.

    See `trainable_keras.calibrate`.
    """
    state, layers, name = state_of(framework, qmodel), layers_within(qmodel), type(qmodel).__name__
    if state.finalized:
        raise QuantizerStateError(name, "it is finalized; its quantizers don't change any more")
    waiting = waiting_quantizers(trainable_quantizers(qmodel), name, force=force)
    spec = state.recipe.calibration
    new: list[tuple[BaseTrainableQuantizer, Params]] = []
    holders = [layer for layer in layers if isinstance(layer, KerasHolder) and id(layer.trainable_quantizer) in waiting]
    if holders:
        single = framework.functions.is_tensor(batches) or hasattr(batches, "__array__")
        check_batches(batches, forward, len(holders), single=single)
        shown = tqdm(batches, desc="calibrate", disable=None if progress is None else not progress, leave=False)
        with framework.eagerly():
            observers = observe_batches(layers, holders, shown, lambda batch: (forward or _call)(qmodel, batch))
        for holder in holders:
            quantizer = holder.activation_holder_quantizer
            new.append((quantizer, activation_params(quantizer, observers[id(holder)], spec)))
    for wrapper in layers:
        if isinstance(wrapper, KerasWrapper):
            for _, weight, quantizer in wrapper.get_weights_vars():
                if id(quantizer) in waiting:
                    values = framework.functions.to_numpy(weight).astype(np.float32)
                    new.append((quantizer, weights_params(quantizer, values, spec)))
    set_all(new)
    forget_functions(qmodel)
    return qmodel


def _call(model: Any, batch: Any) -> Any:
    return model(inputs_of(batch), training=False)


def observe_batches(
    layers: Sequence[Any], holders: Sequence[KerasHolder], batches: Iterable[Any], call: Callable[[Any], Any]
) -> dict[int, Observer]:
    """Return what holders saw of batches.

    Parameters
    ----------
    layers : sequence of layer
        The model's.
    holders : sequence of KerasHolder
        Those to watch.
    batches : iterable
        What `call` is called with, one by one.
    call : callable
        Calls the model.
    """
    observers = {id(holder): Observer() for holder in holders}
    with observing(layers, observers):
        feed(batches, call)
    return observers


@contextmanager
def observing(layers: Sequence[Any], observers: Observers) -> Iterator[None]:
    """Let holders see and pass on what comes, with float weights; everything is put back afterwards."""
    wrappers = [layer for layer in layers if isinstance(layer, KerasWrapper)]
    holders = [layer for layer in layers if isinstance(layer, KerasHolder)]
    try:
        for wrapper in wrappers:
            wrapper.keep(quantizes_weights=False)
        for holder in holders:
            holder.keep(observer=observers.get(id(holder), Observer()))
        yield
    finally:
        for holder in holders:
            holder.keep(observer=None)
        for wrapper in wrappers:
            wrapper.keep(quantizes_weights=True)
