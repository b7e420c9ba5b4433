"""Roundings learned layer by layer against the float model; see `trainable_core.reference.adaround`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.reconstruction import SUBJECT, ReconstructedLayer, Reconstruction, check_request
from trainable_core.calibration.batches import inputs_of
from trainable_core.errors import ModelError, UnsupportedConfigError
from trainable_core.reference import adaround
from trainable_keras.calibration import calls_replaced
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, plan_of, told_of
from trainable_keras.quantizers.adaround import AdaroundQuantizer
from trainable_keras.wrapping import state_of, trainable_quantizers

Call = tuple[Any, Any]


def reconstruct(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None,
    learning_rate: float,
    progress: bool | None,
) -> Reconstruction:
    """Learn the roundings of a model's weights layer by layer; see `trainable_keras.reconstruct`."""
    state_of(framework, qmodel)
    if not framework.can_reconstruct:
        problem = "it can't train a layer by itself on Keras's PyTorch engine yet"
        raise UnsupportedConfigError(SUBJECT, problem, "use trainable-torch, or another engine.")
    layers = [each for each in layers_within(qmodel) if isinstance(each, KerasWrapper) and _learners(each)]
    single = bool(framework.functions.is_tensor(batches)) or hasattr(batches, "__array__")
    listed = check_request(layers, batches, forward, single=single)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")

    def run() -> None:
        with framework.eagerly():
            for batch in listed:
                if forward is not None:
                    forward(qmodel, batch)
                else:
                    qmodel(inputs_of(batch), training=False)

    with _calls(layers, keep=False) as seen:
        run()
    missed = [plan_of(layer).layer.name for layer in layers if id(layer) not in seen]
    if missed:
        raise ModelError(f"{SUBJECT}: no batch reached {', '.join(missed)}")
    by_id = {id(layer): layer for layer in layers}
    order = [by_id[key] for key in seen]
    shown = tqdm(order, desc=SUBJECT, disable=None if progress is None else not progress, leave=False)
    return Reconstruction(tuple(_learn(framework, layer, run, qmodel, learning_rate) for layer in shown))


def _learners(wrapper: Any) -> list[Any]:
    quantizers = wrapper.weights_quantizers.values()
    return [q for q in quantizers if isinstance(q, AdaroundQuantizer) and q.quantization_config.enabled]


def _learn(
    framework: Framework, layer: Any, run: Callable[[], None], qmodel: Any, learning_rate: float
) -> ReconstructedLayer:
    """Let the roundings of one layer learn; return what became of its outputs."""
    learners, name, to_numpy = _learners(layer), plan_of(layer).layer.name, framework.functions.to_numpy
    _forget(learners)
    with _float(qmodel), _calls([layer]) as told:
        run()
    targets = [to_numpy(output) for _, output in told[id(layer)]]
    with _calls([layer]) as told:
        run()
    inputs = [framework.functions.floats(to_numpy(given)) for given, _ in told[id(layer)]]  # outside of any graph

    def distance() -> float:
        pairs = zip(inputs, targets, strict=True)
        found = [np.square(to_numpy(layer(x, training=False)) - target, dtype=np.float64).mean() for x, target in pairs]
        return float(np.mean(found))

    nearest = distance()
    roundings = [rounding for q in learners for rounding in q.trainable_weights]
    if not roundings:
        return ReconstructedLayer(name, nearest, nearest)
    channels = float(targets[0].shape[-1])
    base: Any = framework.module.Model

    class Alone(base):  # type: ignore[misc] # Keras is untyped
        """The layer by itself, of which the roundings alone are trained."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        @property
        def trainable_variables(self) -> list[Any]:
            """The roundings."""
            return roundings

        @property
        def trainable_weights(self) -> list[Any]:
            """The roundings."""
            return roundings

        def call(self, inputs: Any, training: Any = None) -> Any:
            """Return what the layer gives."""
            return self.layer(inputs, training=training)

    def loss(target: Any, output: Any) -> Any:
        f = framework.functions
        return f.sum((output - target) * (output - target)) / f.size(output) * channels

    alone = Alone()
    alone.compile(framework.module.optimizers.Adam(learning_rate), loss)
    for step in range(max(adaround.schedule_end(quantizer.beta) for quantizer in learners)):
        alone.train_on_batch(inputs[step % len(inputs)], targets[step % len(inputs)])
    learned = distance()
    if not learned <= nearest:
        _forget(learners)
        learned = nearest
    return ReconstructedLayer(name, nearest, learned)


def _forget(learners: list[Any]) -> None:
    """Let quantizers begin anew, with the nearest codes."""
    for quantizer in learners:
        quantizer.assign(quantizer.rounding, np.zeros(tuple(quantizer.rounding.shape), np.float32))
        quantizer.counted_steps = 0


@contextmanager
def _calls(layers: Iterable[Any], *, keep: bool = True) -> Iterator[dict[int, list[Call]]]:
    """Note input and output of layers, in the order in which they are first called; or, to save memory, the order."""
    found: dict[int, list[Call]] = {}

    def noted(layer: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def made_of(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(inputs: Any, *args: Any, **kwargs: Any) -> Any:
                output = call(inputs, *args, **kwargs)
                calls = found.setdefault(id(layer), [])
                if keep:
                    calls.append((inputs, output))
                return output

            return called

        return made_of

    with calls_replaced([(layer, noted(layer)) for layer in layers]):
        yield found


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
