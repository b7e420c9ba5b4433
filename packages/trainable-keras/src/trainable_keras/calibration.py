"""The framework-free part of a Keras backend's `calibrate`: what is seen where, then thresholds all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import feed, waiting_quantizers
from trainable_core.calibration.quantizers import Params, activation_params, set_all, weights_params
from trainable_core.errors import QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.state import WrappedState
from trainable_keras.parts import KerasHolder, KerasWrapper

Observers = Mapping[int, Observer]
"""Observers by the ``id`` of their holder."""


def calibrate_layers(
    model: str,
    state: WrappedState,
    layers: Sequence[Any],
    observe: Callable[[list[KerasHolder]], Observers],
    to_numpy: Callable[[Any], NDArray[Any]],
    *,
    force: bool,
) -> None:
    """Set the thresholds of a wrapped model's quantizers: of all that wait for them, or, when one can't, of none.

    Parameters
    ----------
    model : str
        What the model is called in errors.
    state : WrappedState
        What it knows of itself.
    layers : sequence of layer
        Its layers.
    observe : callable
        Shows batches to the holders it is given and returns what they saw; called only when some wait.
    to_numpy : callable
        Gives the value of a variable.
    force : bool
        Whether quantizers that have their numbers get new ones.

    Raises
    ------
    QuantizerStateError
        When the model is finalized, or every quantizer has its numbers and `force` is false.
    CalibrationError
        When a tensor was never seen, or values are not finite.
    """
    if state.finalized:
        raise QuantizerStateError(model, "it is finalized; its quantizers don't change any more")
    quantizers = [layer for layer in layers if isinstance(layer, BaseTrainableQuantizer)]
    waiting = waiting_quantizers(quantizers, model, force=force)
    spec = state.recipe.calibration
    new: list[tuple[BaseTrainableQuantizer, Params]] = []
    holders = [layer for layer in layers if isinstance(layer, KerasHolder) and id(layer.trainable_quantizer) in waiting]
    if holders:
        observers = observe(holders)
        for holder in holders:
            quantizer = holder.activation_holder_quantizer
            new.append((quantizer, activation_params(quantizer, observers[id(holder)], spec)))
    for wrapper in layers:
        if isinstance(wrapper, KerasWrapper):
            for _, weight, quantizer in wrapper.get_weights_vars():
                if id(quantizer) in waiting:
                    new.append((quantizer, weights_params(quantizer, to_numpy(weight).astype(np.float32), spec)))
    set_all(new)


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
