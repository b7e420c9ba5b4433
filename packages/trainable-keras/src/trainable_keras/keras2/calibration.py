"""From seen values to thresholds: one pass over the batches, then all quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from trainable_core.calibration import Observer
from trainable_keras.calibration import KerasCalibration
from trainable_keras.keras2.engine import to_numpy
from trainable_keras.keras2.tracing import layers_within
from trainable_keras.keras2.training import forget_functions
from trainable_keras.keras2.wrapping import state_of


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
    state, layers = state_of(qmodel), layers_within(qmodel)
    Calibration(qmodel, state, layers).calibrate(batches, forward, force=force, progress=progress)
    forget_functions(qmodel)
    return qmodel


class Calibration(KerasCalibration):
    """What core's loop asks of Keras 2."""

    def value_of(self, variable: Any) -> NDArray[Any]:
        """Return a variable's value."""
        return to_numpy(variable)

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return bool(tf.is_tensor(batches) or hasattr(batches, "__array__"))

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer]) -> Iterator[None]:
        """Observe eagerly, so that a call that the user compiled shows its values too."""
        eager = tf.config.functions_run_eagerly()
        try:
            tf.config.run_functions_eagerly(run_eagerly=True)
            with super().observing(observers):
                yield
        finally:
            tf.config.run_functions_eagerly(eager)
