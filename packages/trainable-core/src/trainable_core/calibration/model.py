"""The loop of every backend's `calibrate`: one pass over the batches, then the params of all quantizers at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from numpy.typing import NDArray

from trainable_core.calibration.batches import check_batches, feed
from trainable_core.calibration.observer import Observer
from trainable_core.calibration.quantizers import Params, activation_params, set_all, weights_params
from trainable_core.errors import QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.state import WrappedState


class ModelCalibration(ABC):
    """The calibration of one wrapped model; a backend subclasses it and writes what only its framework can do.

    Parameters
    ----------
    model : model
        What `wrap` returned.
    state : WrappedState
        What it knows about itself.

    Notes
    -----
    A holder is whatever the backend's `holders` returns, as long as it is hashable and its ``trainable_quantizer`` is
    the activation quantizer, or None once that is inferable.
    """

    def __init__(self, model: Any, state: WrappedState) -> None:
        self.model = model
        self.state = state

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def quantizers(self) -> Iterable[BaseTrainableQuantizer]:
        """Return the model's trainable quantizers, those that are switched off included."""

    @abstractmethod
    def holders(self) -> Sequence[Any]:
        """Return the model's activation holders, in an order that is the same on every machine."""

    @abstractmethod
    def weights(self) -> Iterable[tuple[Any, Any]]:
        """Return each quantized weight, as a float variable of the framework, with its quantizer."""

    @abstractmethod
    def to_numpy(self, weight: Any) -> NDArray[Any]:
        """Return a weight's values as float32."""

    @abstractmethod
    def observing(self, observers: Mapping[Any, Observer]) -> AbstractContextManager[None]:
        """Let each holder show what reaches it to its observer and pass it on unchanged.

        Inside, the model runs as in inference, with float weights and without gradients; afterwards, also after an
        error, everything is as it was. `observers` has one for every holder of the model.
        """

    @abstractmethod
    def is_tensor(self, batches: Any) -> bool:
        """Return whether `batches` is itself a tensor: one batch, which the user forgot to put into a list."""

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """Call the model with a batch; `calibration.batches.inputs_of` leaves the labels out."""

    # ---- what is the same in every backend --------------------------------------------------------------------------

    def observe(self, holders: Sequence[Any], batches: Iterable[Any], call: Callable[[Any], Any]) -> Sequence[Observer]:
        """Return what each of some holders sees while the model is called with the batches.

        A backend overrides it where other processes see batches of their own.
        """
        observers = {holder: Observer() for holder in self.holders()}
        with self.observing(observers):
            feed(batches, call)
        return [observers[holder] for holder in holders]

    def run(
        self,
        batches: Iterable[Any] | None,
        forward: Callable[[Any, Any], Any] | None,
        *,
        force: bool,
        show_progress: Callable[[Iterable[Any]], Iterable[Any]],
    ) -> None:
        """Give params to the quantizers that wait for them: to all of them or, when that fails, to none.

        Parameters
        ----------
        batches : iterable or None
            What the model is called with; needed when activation quantizers wait.
        forward : callable or None
            ``forward(model, batch)``, called instead of `call`.
        force : bool
            Whether quantizers that have params get new ones.
        show_progress : callable
            Returns an iterable of the same batches that shows how far the iteration is.

        Raises
        ------
        QuantizerStateError
            When the model is finalized, or every quantizer has params and `force` is false.
        CalibrationError
            When there are no batches, a quantized tensor was never seen, or values are not finite.
        """
        waiting = self._waiting(force=force)
        section = self.state.recipe.calibration
        new: list[tuple[BaseTrainableQuantizer, Params]] = []
        holders = [holder for holder in self.holders() if id(holder.trainable_quantizer) in waiting]
        if holders:
            check_batches(batches, forward, len(holders), single=self.is_tensor(batches))
            assert batches is not None  # noqa: S101 - checked in the line above
            call = self.call if forward is None else lambda batch: forward(self.model, batch)
            observers = self.observe(holders, show_progress(batches), call)
            for holder, observer in zip(holders, observers, strict=True):
                quantizer = holder.trainable_quantizer
                new.append((quantizer, activation_params(quantizer, observer, section)))
        for weight, quantizer in self.weights():
            if id(quantizer) in waiting:
                waiting.discard(id(quantizer))  # tied weights share one quantizer
                new.append((quantizer, weights_params(quantizer, self.to_numpy(weight), section)))
        set_all(new)

    def _waiting(self, *, force: bool) -> set[int]:
        """Return the ``id`` of each quantizer that is to be calibrated; those that are switched off don't count."""
        name = type(self.model).__name__
        if self.state.finalized:
            raise QuantizerStateError(name, "it is finalized; its quantizers don't change any more")
        found = [quantizer for quantizer in self.quantizers() if quantizer.quantization_config.enabled]
        waiting = {id(quantizer) for quantizer in found if force or not quantizer.calibrated}
        if found and not waiting:
            raise QuantizerStateError(
                name,
                f"its {len(found)} quantizers have their thresholds already, trained ones perhaps",
                "pass force=True to overwrite them.",
            )
        return waiting
