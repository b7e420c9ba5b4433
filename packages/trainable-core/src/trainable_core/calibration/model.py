"""The loop of every backend's `calibrate`: one pass over the batches, then the params of all quantizers at once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from numpy.typing import NDArray

from trainable_core.calibration.batches import check_batches, explained, feed
from trainable_core.calibration.observer import Observer
from trainable_core.calibration.quantizers import Params, activation_params, set_all, weights_params
from trainable_core.calibration.unseen import Sight, only_read, reason
from trainable_core.errors import QuantizerStateError, ThresholdsKeptWarning, UnseenTensorsError
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

    training_forward: ClassVar[str]
    """How a call in training mode is written in the backend, for a hint."""

    def __init__(self, model: Any, state: WrappedState) -> None:
        self.model = model
        self.state = state
        self._example: Any = None

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
    def observing(self, observers: Mapping[Any, Observer], *, training: bool = False) -> AbstractContextManager[None]:
        """Let each holder show what reaches it to its observer and pass it on unchanged.

        Inside, the model runs with float weights and without gradients, as in inference or, with `training`, as in
        training; afterwards, also after an error, everything is as it was, what a training step keeps in the model
        included. `observers` has one for every holder of the model.
        """

    @abstractmethod
    def watching(self, sights: Mapping[Any, Sight], *, readers: bool = False) -> AbstractContextManager[None]:
        """Note what reaches each of some holders, and how their layers are called.

        With `readers`, also which functions read the weights of their layers, where the backend can tell.
        """

    @property
    def may_try(self) -> bool:
        """Whether the model may be called once more to find out why a holder saw nothing."""
        return True

    @abstractmethod
    def call(self, batch: Any, *, training: bool = False) -> Any:
        """Call the model with a batch; `calibration.batches.inputs_of` leaves the labels out."""

    # ---- what is the same in every backend --------------------------------------------------------------------------

    def observe(
        self, holders: Sequence[Any], batches: Iterable[Any], call: Callable[[Any, bool], Any], *, training: bool
    ) -> Sequence[Observer]:
        """Return what each of some holders sees while the model is called with the batches.

        With `training`, every batch is also passed in training mode, and a holder that sees nothing in evaluation mode
        has seen that. A backend overrides it where other processes see batches of their own.
        """
        evaluated, trained = ({holder: Observer() for holder in self.holders()} for _ in range(2))
        if not training:
            with self.observing(evaluated):
                feed(self._remembered(batches), lambda batch: call(batch, False))  # noqa: FBT003 - the mode
        else:
            feed(self._remembered(batches), lambda batch: self._in_both_modes(batch, call, evaluated, trained))
        return [trained[holder] if evaluated[holder].empty else evaluated[holder] for holder in holders]

    def _in_both_modes(
        self,
        batch: Any,
        call: Callable[[Any, bool], Any],
        evaluated: Mapping[Any, Observer],
        trained: Mapping[Any, Observer],
    ) -> None:
        for observers, training in ((evaluated, False), (trained, True)):
            with self.observing(observers, training=training):
                call(batch, training)

    def _remembered(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches, and keep the first."""
        for index, batch in enumerate(batches):
            if not index:
                self._example = batch
            yield batch

    def run(
        self,
        batches: Iterable[Any] | None,
        forward: Callable[[Any, Any], Any] | None,
        *,
        force: bool,
        training: bool = False,
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
        training : bool
            Whether what evaluation mode doesn't reach is looked at in training mode.
        show_progress : callable
            Returns an iterable of the same batches that shows how far the iteration is.

        Raises
        ------
        QuantizerStateError
            When the model is finalized, or every quantizer has params and `force` is false.
        CalibrationError
            When there are no batches, or values are not finite.
        UnseenTensorsError
            When quantized tensors that have no params were never seen; names all of them. Those that have params keep
            them, with a warning.

        Notes
        -----
        Where a layer is never called because other code reads its weights and computes with them, its weights are
        quantized and its inputs can't be: their quantizers are switched off, which the state's `left_out` tells.
        """
        waiting = self._waiting(force=force)
        section = self.state.recipe.calibration
        new: list[tuple[BaseTrainableQuantizer, Params]] = []
        reasons: dict[Any, str] = {}
        out_of_reach: dict[Any, str] = {}
        holders = [holder for holder in self.holders() if id(holder.trainable_quantizer) in waiting]
        if holders:
            check_batches(batches, forward, len(holders))
            assert batches is not None  # noqa: S101 - checked in the line above

            def call(batch: Any, training: bool) -> Any:  # noqa: FBT001 - the mode
                if forward is not None:
                    return forward(self.model, batch)
                return explained(batch, lambda: self.call(batch, training=training))

            sights = {holder: Sight() for holder in holders}
            with self.watching(sights):
                observers = self.observe(holders, show_progress(batches), call, training=training)
            unseen = [holder for holder, observer in zip(holders, observers, strict=True) if observer.empty]
            if unseen:
                trained = self._look_again({holder: sights[holder] for holder in unseen}, call)
                for holder in unseen:
                    subject, last = holder.trainable_quantizer.subject, trained.get(holder)
                    why = reason(subject.rpartition(": ")[2], sights[holder], last, looked_in_training=training)
                    (out_of_reach if only_read(sights[holder], last) else reasons)[holder] = why
                self._tell_unseen(reasons)
            for holder, observer in zip(holders, observers, strict=True):
                if not observer.empty:
                    quantizer = holder.trainable_quantizer
                    new.append((quantizer, activation_params(quantizer, observer, section)))
        for weight, quantizer in self.weights():
            if id(quantizer) in waiting:
                waiting.discard(id(quantizer))  # tied weights share one quantizer
                new.append((quantizer, weights_params(quantizer, self.to_numpy(weight), section)))
        set_all(new)
        for holder, why in out_of_reach.items():
            quantizer = holder.trainable_quantizer
            quantizer.switch_off()
            self.state.left_out[quantizer.subject] = f"{why}; the weights are quantized"

    def _look_again(self, sights: Mapping[Any, Sight], call: Callable[[Any, bool], Any]) -> dict[Any, Sight]:
        """Find out why holders saw nothing: call the model once more in each mode; return what training showed."""
        if not self.may_try:
            return {}
        trained = {holder: Sight() for holder in sights}
        observers = {holder: Observer() for holder in self.holders()}
        try:
            with self.watching(sights, readers=True), self.observing(observers):
                call(self._example, False)  # noqa: FBT003 - the mode
            with self.watching(trained, readers=True), self.observing(observers, training=True):
                call(self._example, True)  # noqa: FBT003 - the mode
        except Exception:  # noqa: BLE001 - a model may raise anything in training, and the reason is still due
            return {}
        return trained

    def _tell_unseen(self, reasons: Mapping[Any, str]) -> None:
        """Raise for holders that have no params to keep; warn of those that do: a merged adapter runs no more."""
        waiting = [holder for holder in reasons if not holder.trainable_quantizer.calibrated]
        if waiting:
            told = {holder.trainable_quantizer.subject: reasons[holder] for holder in waiting}
            raise UnseenTensorsError(told, self._ways_out(waiting))
        if reasons:
            told = {holder.trainable_quantizer.subject: why for holder, why in reasons.items()}
            warnings.warn(ThresholdsKeptWarning(told), stacklevel=4)

    def _ways_out(self, unseen: Sequence[Any]) -> list[str]:
        layer = unseen[0].trainable_quantizer.subject.rpartition(": ")[0]
        rule = f'{{"match": {{"name": "{layer}"}}, '
        return [
            "batches that reach the layer",
            f"forward=, which calls the model in another way, as in {self.training_forward}",
            "training=True, which also looks at what runs only in training mode",
            f'a rule {rule}"activations": {{"enabled": false}}}}, which leaves its activations in float',
            f'a rule {rule}"skip": true}}, which leaves the whole layer in float',
            "register_layer(..., inputs=(...)), which says which arguments of a layer type are quantized",
        ]

    def _waiting(self, *, force: bool) -> set[int]:
        """Return the ``id`` of each quantizer that is to be calibrated.

        Those that are switched off don't count, nor those that compute their grids from the tensor itself.
        """
        name = type(self.model).__name__
        if self.state.finalized:
            raise QuantizerStateError(name, "it is finalized; its quantizers don't change any more")
        enabled = [quantizer for quantizer in self.quantizers() if quantizer.quantization_config.enabled]
        found = [quantizer for quantizer in enabled if not quantizer.computes_grid]
        waiting = {id(quantizer) for quantizer in found if force or not quantizer.calibrated}
        if found and not waiting:
            raise QuantizerStateError(
                name,
                f"its {len(found)} quantizers have their thresholds already, trained ones perhaps",
                "pass force=True to overwrite them.",
            )
        return waiting
