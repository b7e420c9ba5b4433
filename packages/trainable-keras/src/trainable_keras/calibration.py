"""From seen values to thresholds: what core's calibration loop needs of Keras, whichever Keras it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.state import WrappedState
from trainable_keras.parts import KerasHolder, KerasWrapper


class KerasCalibration(ModelCalibration):
    """The calibration of a wrapped Keras model; a backend writes `value_of` and `is_tensor`.

    Parameters
    ----------
    model : keras.Model
        What `wrap` returned.
    state : WrappedState
        What it knows about itself.
    layers : sequence of layer
        Its layers, the quantizers among them.
    """

    def __init__(self, model: Any, state: WrappedState, layers: Sequence[Any]) -> None:
        super().__init__(model, state)
        self.layers = layers

    @abstractmethod
    def value_of(self, variable: Any) -> NDArray[Any]:
        """Return a variable's value in its own dtype."""

    def calibrate(
        self,
        batches: Iterable[Any] | None,
        forward: Callable[[Any, Any], Any] | None,
        *,
        force: bool,
        progress: bool | None,
    ) -> None:
        """Run the calibration, with a progress bar; the arguments are those of the verb `calibrate`."""
        self.run(
            batches,
            forward,
            force=force,
            show_progress=lambda shown: tqdm(
                shown, desc="calibrate", disable=None if progress is None else not progress, leave=False
            ),
        )

    def quantizers(self) -> list[BaseTrainableQuantizer]:
        """Return the model's trainable quantizers."""
        return [layer for layer in self.layers if isinstance(layer, BaseTrainableQuantizer)]

    def holders(self) -> list[KerasHolder]:
        """Return the model's holders."""
        return [layer for layer in self.layers if isinstance(layer, KerasHolder)]

    def weights(self) -> Iterator[tuple[Any, Any]]:
        """Yield each quantized weight with its quantizer."""
        for wrapper in self._wrappers():
            for _, weight, quantizer in wrapper.get_weights_vars():
                yield weight, quantizer

    def to_numpy(self, weight: Any) -> NDArray[Any]:
        """Return a weight's values as float32."""
        return self.value_of(weight).astype(np.float32)

    def call(self, batch: Any) -> Any:
        """Call the model in inference mode with a batch's inputs."""
        return self.model(inputs_of(batch), training=False)

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer]) -> Iterator[None]:
        """Let the holders show what reaches them to the observers, with float weights."""
        wrappers = self._wrappers()
        try:
            for wrapper in wrappers:
                wrapper.keep(quantizes_weights=False)
            for holder, observer in observers.items():
                holder.keep(observer=observer)
            yield
        finally:
            for holder in observers:
                holder.keep(observer=None)
            for wrapper in wrappers:
                wrapper.keep(quantizes_weights=True)

    def _wrappers(self) -> list[KerasWrapper]:
        return [layer for layer in self.layers if isinstance(layer, KerasWrapper)]
