"""Roundings learned by layers or blocks against the float model; see `trainable_core.reference.adaround`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.reconstruction import (
    SUBJECT,
    ReconstructedLayer,
    Reconstruction,
    check_blocks,
    check_request,
)
from trainable_core.calibration.batches import inputs_of
from trainable_core.errors import ModelError
from trainable_core.reference import adaround
from trainable_keras.calibration import calls_replaced
from trainable_keras.distillation import main_output
from trainable_keras.folding import named_layers
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, plan_of, told_of
from trainable_keras.quantizers.adaround import AdaroundQuantizer
from trainable_keras.wrapping import state_of, trainable_quantizers


@dataclass(frozen=True)
class _Part:
    """What learns at once: a layer, or a block with the quantized layers in it that learn."""

    name: str
    module: Any
    layers: list[Any]


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the arguments of a call."""

    index: int


@dataclass(frozen=True)
class _Call:
    """A call: its arguments with slots in the places of tensors, these tensors, and the output."""

    arguments: Any
    tensors: list[Any]
    output: Any


def reconstruct(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None,
    learning_rate: float,
    blocks: Collection[str] | None,
    progress: bool | None,
) -> Reconstruction:
    """Learn the roundings of a model's weights by layers or blocks; see `trainable_keras.reconstruct`."""
    state_of(framework, qmodel)
    layers = [each for each in layers_within(qmodel) if isinstance(each, KerasWrapper) and _learners(each)]
    listed = check_request(layers, batches, forward)
    parts = _parts(framework, qmodel, layers, blocks)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")

    def run() -> None:
        with framework.eagerly():
            for batch in listed:
                if forward is not None:
                    forward(qmodel, batch)
                else:
                    qmodel(inputs_of(batch), training=False)

    names = {id(layer): plan_of(layer).layer.name for layer in layers}
    names |= {key: part.name for key, part in parts.items()}
    with _looked_at(framework, layers, parts) as seen:
        run()
    missed = [name for key, name in names.items() if key not in seen]
    if missed:
        hint = "" if all(key in seen for key in parts) else "a block is a layer that the model calls."
        raise ModelError(f"{SUBJECT}: no batch reached {', '.join(missed)}", hint)
    order = [parts[key] for key in seen if key in parts]
    shown = tqdm(order, desc=SUBJECT, disable=None if progress is None else not progress, leave=False)
    return Reconstruction(tuple(_learn(framework, part, run, qmodel, learning_rate) for part in shown))


def _parts(framework: Framework, qmodel: Any, layers: list[Any], blocks: Collection[str] | None) -> dict[int, _Part]:
    """Return what learns at once, by the ``id`` of its layer: blocks, and the layers in none of them."""
    by_id = {id(layer): layer for layer in layers}
    named = {} if blocks is None else dict(named_layers(framework, qmodel))
    learning = {name: [id(each) for each in layers_within(layer) if id(each) in by_id] for name, layer in named.items()}
    chosen = check_blocks(blocks, learning)
    parts = {id(named[name]): _Part(name, named[name], [by_id[each] for each in learning[name]]) for name in chosen}
    taken = {each for name in chosen for each in learning[name]}
    lone = {key: _Part(plan_of(each).layer.name, each, [each]) for key, each in by_id.items() if key not in taken}
    return parts | lone


def _learners(wrapper: Any) -> list[Any]:
    quantizers = wrapper.weights_quantizers.values()
    return [q for q in quantizers if isinstance(q, AdaroundQuantizer) and q.quantization_config.enabled]


def _learn(
    framework: Framework, part: _Part, run: Callable[[], None], qmodel: Any, learning_rate: float
) -> ReconstructedLayer:
    """Let the roundings of one part learn; return what became of its outputs."""
    learners = [quantizer for layer in part.layers for quantizer in _learners(layer)]
    _forget(learners)
    with _float(qmodel), _calls(framework, part) as told:
        run()
    targets = [framework.functions.to_numpy(call.output) for call in told]
    with _calls(framework, part) as told:
        run()
    inputs = [[_outside(framework, tensor) for tensor in call.tensors] for call in told]
    arguments = told[0].arguments  # the same for each call, or `_looked_at` has refused
    alone = _alone(framework, part, arguments, learners)
    nearest = _distance(framework, alone, inputs, targets)
    if not alone.trainable_weights:
        return ReconstructedLayer(part.name, nearest, nearest)
    channels = float(targets[0].shape[-1])

    def loss(target: Any, output: Any) -> Any:
        f = framework.functions
        return f.sum((output - target) * (output - target)) / f.size(output) * channels

    alone.compile(framework.module.optimizers.Adam(learning_rate), loss)
    ends = [adaround.schedule_end(quantizer.beta) for quantizer in learners]
    resting: list[tuple[Any, Any]] = []
    try:
        for layer in part.layers:
            told_of(layer).trains_weights = True
        for step in range(max(ends)):
            resting += [(q, q.to_numpy(q.rounding)) for q, end in zip(learners, ends, strict=True) if end == step]
            alone.train_on_batch(_given(inputs[step % len(inputs)]), targets[step % len(inputs)])
            for quantizer, rounding in resting:  # Adam goes on moving one whose schedule is over before that of another
                quantizer.assign(quantizer.rounding, rounding)
    finally:
        for layer in part.layers:
            told_of(layer).trains_weights = False
        framework.forget_gradients(alone)
    learned = _distance(framework, alone, inputs, targets)
    if not learned <= nearest:
        _forget(learners)
        learned = nearest
    return ReconstructedLayer(part.name, nearest, learned)


def _alone(framework: Framework, part: _Part, arguments: Any, learners: list[Any]) -> Any:
    """Return a model that calls a part by itself, of which the roundings alone are trained."""
    roundings = [rounding for quantizer in learners for rounding in quantizer.trainable_weights]
    base: Any = framework.module.Model

    class Alone(base):  # type: ignore[misc] # Keras is untyped
        """The part by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.part = part.module

        @property
        def trainable_variables(self) -> list[Any]:
            """The roundings."""
            return roundings

        @property
        def trainable_weights(self) -> list[Any]:
            """The roundings."""
            return roundings

        def call(self, inputs: Any, training: Any = None) -> Any:  # noqa: ARG002 - the weights alone train
            """Return what the part gives."""
            tensors = inputs if isinstance(inputs, list | tuple) else [inputs]
            args, kwargs = _put_together(arguments, tensors)
            return main_output(self.part(*args, training=False, **kwargs))

    return Alone()


def _distance(framework: Framework, alone: Any, inputs: list[list[Any]], targets: list[Any]) -> float:
    to_numpy, pairs = framework.functions.to_numpy, zip(inputs, targets, strict=True)
    found = [np.square(to_numpy(alone(_given(x))) - target, dtype=np.float64).mean() for x, target in pairs]
    return float(np.mean(found))


def _given(tensors: list[Any]) -> Any:
    """Return tensors as a model is given them."""
    return tensors[0] if len(tensors) == 1 else tensors


def _outside(framework: Framework, tensor: Any) -> NDArray[Any]:
    """Return a tensor's values, to which Keras attaches no mask; float32 where they are no whole numbers."""
    values = framework.functions.to_numpy(tensor)
    return values if values.dtype.kind in "iub" else values.astype(np.float32)


def _forget(learners: list[Any]) -> None:
    """Let quantizers begin anew, with the nearest codes."""
    for quantizer in learners:
        quantizer.assign(quantizer.rounding, np.zeros(tuple(quantizer.rounding.shape), np.float32))
        quantizer.counted_steps = 0


@contextmanager
def _looked_at(framework: Framework, layers: list[Any], parts: dict[int, _Part]) -> Iterator[dict[int, Any]]:
    """Note which layers and blocks are called, in the order in which their first calls end, and check the calls.

    The arguments of the first call are noted, without tensors.
    """
    found: dict[int, Any] = {}
    learning = {id(layer): layer for layer in layers} | {key: part.module for key, part in parts.items()}

    def noted(key: int) -> Callable[[_Call], None]:
        def note(call: _Call) -> None:
            if key in parts:
                _check_call(framework, parts[key].name, call)
                if found.get(key, call.arguments) != call.arguments:
                    raise ModelError(f"{SUBJECT}: {parts[key].name!r} is called in several ways", _HINT)
            found.setdefault(key, call.arguments)

        return note

    with calls_replaced([(layer, _told_to(framework, noted(key))) for key, layer in learning.items()]):
        yield found


_HINT = "name another block, or give the layer another training method in the recipe."


def _check_call(framework: Framework, name: str, call: _Call) -> None:
    """Raise ModelError where a call of a part can't be made again by itself."""
    f = framework.functions
    for each in framework.flat(call.arguments):
        if not isinstance(each, _Slot | bool | int | float | str | type(None)):
            raise ModelError(f"{SUBJECT}: {name!r} is called with a {type(each).__name__}", _HINT)
    if not f.is_tensor(call.output) or "float" not in str(f.dtype_of(call.output)):
        raise ModelError(f"{SUBJECT}: {name!r} gives a {type(call.output).__name__}, not a floating tensor", _HINT)
    shapes = [tuple(each.shape) for each in [*call.tensors, call.output]]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        told = ", ".join(map(str, shapes[:-1]))
        problem = f"{SUBJECT}: {name!r} is called with shapes {told} and gives {shapes[-1]}: the first axes differ"
        raise ModelError(problem, _HINT)


@contextmanager
def _calls(framework: Framework, part: _Part) -> Iterator[list[_Call]]:
    """Note the calls of a part."""
    found: list[_Call] = []
    with calls_replaced([(part.module, _told_to(framework, found.append))]):
        yield found


def _told_to(framework: Framework, note: Callable[[_Call], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes of a layer's `call` one that tells of each call."""

    def made_of(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            tensors: list[Any] = []
            kept = {name: each for name, each in kwargs.items() if name != "training" and each is not None}
            arguments = _taken_apart((args, kept), tensors, framework.functions.is_tensor)
            note(_Call(arguments, tensors, main_output(output)))
            return output

        return called

    return made_of


def _taken_apart(value: Any, tensors: list[Any], is_tensor: Callable[[Any], bool]) -> Any:
    """Return nested values with slots in the places of tensors, which are appended to a list."""
    if isinstance(value, dict):
        return {name: _taken_apart(each, tensors, is_tensor) for name, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_taken_apart(each, tensors, is_tensor) for each in value]
        return parts if isinstance(value, list) else tuple(parts)
    if not is_tensor(value):
        return value
    tensors.append(value)
    return _Slot(len(tensors) - 1)


def _put_together(value: Any, tensors: Sequence[Any]) -> Any:
    """Return nested values with tensors in their slots."""
    if isinstance(value, dict):
        return {name: _put_together(each, tensors) for name, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_put_together(each, tensors) for each in value]
        return parts if isinstance(value, list) else tuple(parts)
    return tensors[value.index] if isinstance(value, _Slot) else value


class _Passing:
    """An observer that only lets a holder pass on what it gets."""

    def update(self, values: Any) -> None:
        """Do nothing."""


@contextmanager
def _float(model: Any) -> Iterator[None]:
    """Let a model compute with float weights and activations."""
    layers = layers_within(model)
    wrappers = [told_of(each) for each in layers if isinstance(each, KerasWrapper)]
    holders: list[Any] = [told_of(each) for each in layers if isinstance(each, KerasHolder)]
    try:
        for told in wrappers:
            told.quantizes_weights = False
        for told in holders:
            told.observer = _Passing()
        yield
    finally:
        for told in wrappers:
            told.quantizes_weights = True
        for told in holders:
            told.observer = None
