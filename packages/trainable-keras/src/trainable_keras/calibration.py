"""From seen values to thresholds: what core's calibration loop needs of Keras, whichever Keras it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.calibration.unseen import Sight, value_text
from trainable_core.errors import IntegerRangeError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, check_biases, told_of
from trainable_keras.training import forget_functions
from trainable_keras.wrapping import parts_of, state_of, trainable_quantizers


def calibrate(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    training: bool = False,
    progress: bool | None = None,
) -> Any:
    """Set the thresholds of a wrapped model's quantizers; see `trainable_keras.calibrate`."""
    with _biases_checked(framework, qmodel):
        KerasCalibration(framework, qmodel).run(
            batches,
            forward,
            force=force,
            training=training,
            show_progress=lambda shown: tqdm(
                shown, desc="calibrate", disable=None if progress is None else not progress, leave=False
            ),
        )
    forget_functions(qmodel)
    return qmodel


@contextmanager
def _biases_checked(framework: Framework, qmodel: Any) -> Iterator[None]:
    """Check the codes of int32 biases in the end; give quantizers back what they had before when one is refused."""
    parts, to_numpy = parts_of(qmodel), framework.functions.to_numpy
    if not any(isinstance(part, KerasWrapper) and part.bias_quantizer is not None for part in parts):
        yield
        return
    before = [
        (q, q.calibrated, q.quantization_config, q.signed, [(v, to_numpy(v)) for v in q.all_variables().values()])
        for q in trainable_quantizers(qmodel)
    ]
    yield
    try:
        check_biases(parts, to_numpy)
    except IntegerRangeError:
        for quantizer, calibrated, config, signed, variables in before:
            for variable, value in variables:
                framework.assign(variable, value)
            quantizer.signed = signed
            quantizer.calibrated, quantizer.quantization_config = calibrated, config
        raise


class KerasCalibration(ModelCalibration):
    """What core's loop asks of Keras.

    Parameters
    ----------
    framework : Framework
        The Keras that the model belongs to.
    qmodel : keras.Model
        What `wrap` returned.
    """

    training_forward = "forward=lambda qmodel, batch: qmodel(batch, training=True)"

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

    def call(self, batch: Any, *, training: bool = False) -> Any:
        """Call the model with a batch's inputs."""
        return self.model(inputs_of(batch), training=training)

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer], *, training: bool = False) -> Iterator[None]:
        """Let the holders show what reaches them to the observers, eagerly and with float weights."""
        wrappers = self._wrappers()
        try:
            for wrapper in wrappers:
                told_of(wrapper).quantizes_weights = False
            for holder, observer in observers.items():
                told_of(holder).observer = observer
            inferring = self.layers if training else ()
            with (
                self.framework.eagerly(),
                put_back(self.framework, self.model),
                in_inference(self.framework, inferring),
            ):
                yield
        finally:
            for holder in observers:
                told_of(holder).observer = None
            for wrapper in wrappers:
                told_of(wrapper).quantizes_weights = True

    @contextmanager
    def watching(self, sights: Mapping[Any, Sight], *, readers: bool = False) -> Iterator[None]:
        """Note what reaches each of some holders, how their layers are called, and if asked who reads the weights."""
        owners = {holder: wrapper for wrapper in self._wrappers() for holder in wrapper.holders}
        replaced = [(holder, partial(_value_noted, sight)) for holder, sight in sights.items()]
        replaced += [
            (owners[holder], partial(_call_noted, sight)) for holder, sight in sights.items() if holder in owners
        ]
        watched = {id(each): told_of(each) for each in owners.values()}.values() if readers else ()
        with calls_replaced(replaced):
            try:
                for holder, sight in sights.items():
                    if readers and holder in owners:
                        told_of(owners[holder]).sights.append(sight)
                yield
            finally:
                for told in watched:
                    told.sights.clear()

    def _wrappers(self) -> list[KerasWrapper]:
        return [layer for layer in self.layers if isinstance(layer, KerasWrapper)]


@contextmanager
def put_back(framework: Framework, model: Any) -> Iterator[None]:
    """Put back what a call may change in a model: statistics, counters, the states of random numbers."""
    variables = [each for each in model.non_trainable_variables if hasattr(each, "assign")]
    values = [np.array(framework.functions.to_numpy(each)) for each in variables]  # a copy on every engine
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


@contextmanager
def in_inference(framework: Framework, layers: Iterable[Any]) -> Iterator[None]:
    """Let dropout and batch norm among some layers do what they do in inference, whatever the model does."""
    kinds = tuple(getattr(framework.module.layers, name) for name in _DIFFERENT_IN_TRAINING)
    with calls_replaced([(layer, _inferring) for layer in layers if isinstance(layer, kinds)]):
        yield


_DIFFERENT_IN_TRAINING = (
    "BatchNormalization", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout",
    "GaussianNoise", "AlphaDropout",
)  # fmt: skip
"""Layer types that calibration calls as in inference, also where the model is called as in training."""

Method = Callable[..., Any]


@contextmanager
def calls_replaced(replaced: Sequence[tuple[Any, Callable[[Method], Method]]]) -> Iterator[None]:
    """Put functions made of them in the place of layers' `call`, one after the other where a layer comes again."""
    before: list[tuple[Any, Method | None]] = []
    try:
        for layer, made_of in replaced:
            before.append((layer, vars(layer).get("call")))
            object.__setattr__(layer, "call", made_of(layer.call))  # Keras would look into what it is set to
        yield
    finally:
        for layer, call in reversed(before):
            vars(layer).pop("call", None)
            if call is not None:
                object.__setattr__(layer, "call", call)


def _inferring(call: Method) -> Method:
    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{**kwargs, "training": False})

    return called


def _value_noted(sight: Sight, call: Method) -> Method:
    def called(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        dtype, shape = getattr(inputs, "dtype", None), getattr(inputs, "shape", None)
        if dtype is None or shape is None:
            sight.reached(f"an object of type {type(inputs).__name__}")
        else:
            name = getattr(dtype, "name", str(dtype).removeprefix("torch."))
            sight.reached(value_text(name, math.prod(shape), floating="float" in name))
        return call(inputs, *args, **kwargs)

    return called


def _call_noted(sight: Sight, call: Method) -> Method:
    def called(*args: Any, **kwargs: Any) -> Any:
        sight.called(len(args), [name for name in kwargs if name != "training"])
        return call(*args, **kwargs)

    return called
