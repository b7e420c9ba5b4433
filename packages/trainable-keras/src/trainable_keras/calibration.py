"""From seen values to thresholds: what core's calibration loop needs of Keras, whichever Keras it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, told_of
from trainable_keras.training import forget_functions
from trainable_keras.wrapping import state_of, trainable_quantizers


def calibrate(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Any:
    """Set the thresholds of a wrapped model's quantizers; see `trainable_keras.calibrate`."""
    KerasCalibration(framework, qmodel).run(
        batches,
        forward,
        force=force,
        show_progress=lambda shown: tqdm(
            shown, desc="calibrate", disable=None if progress is None else not progress, leave=False
        ),
    )
    forget_functions(qmodel)
    return qmodel


class KerasCalibration(ModelCalibration):
    """What core's loop asks of Keras.

    Parameters
    ----------
    framework : Framework
        The Keras that the model belongs to.
    qmodel : keras.Model
        What `wrap` returned.
    """

    def __init__(self, framework: Framework, qmodel: Any) -> None:
        super().__init__(qmodel, state_of(framework, qmodel))
        self.framework = framework
        self.layers = layers_within(qmodel)

    def quantizers(self) -> Iterable[BaseTrainableQuantizer]:
        """Return the model's trainable quantizers."""
        return trainable_quantizers(self.model)

    def holders(self) -> list[KerasHolder]:
        """Return the model's holders."""
        return [layer for layer in self.layers if isinstance(layer, KerasHolder)]

    def weights(self) -> Iterator[tuple[Any, Any]]:
        """Yield each quantized weight with its quantizer."""
        for wrapper in self._wrappers():
            for _, weight, quantizer in wrapper.get_weights_vars():
                yield weight, quantizer

    def to_numpy(self, weight: Any) -> NDArray[Any]:
        """Return a weight's values."""
        return self.framework.functions.to_numpy(weight).astype(np.float32)

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return bool(self.framework.functions.is_tensor(batches)) or hasattr(batches, "__array__")

    def call(self, batch: Any) -> Any:
        """Call the model in inference mode with a batch's inputs."""
        return self.model(inputs_of(batch), training=False)

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer]) -> Iterator[None]:
        """Let the holders show what reaches them to the observers, eagerly and with float weights."""
        wrappers = self._wrappers()
        try:
            for wrapper in wrappers:
                told_of(wrapper).quantizes_weights = False
            for holder, observer in observers.items():
                told_of(holder).observer = observer
            with self.framework.eagerly():
                yield
        finally:
            for holder in observers:
                told_of(holder).observer = None
            for wrapper in wrappers:
                told_of(wrapper).quantizes_weights = True

    def _wrappers(self) -> list[KerasWrapper]:
        return [layer for layer in self.layers if isinstance(layer, KerasWrapper)]
