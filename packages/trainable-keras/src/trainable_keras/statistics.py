"""Statistics of batch norms that stayed in a wrapped model, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from trainable_core.calibration.batch_norm import SUBJECT, check_request, require_reached
from trainable_core.calibration.batches import feed, inputs_of
from trainable_keras.calibration import calls_replaced
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.wrapping import state_of


def batch_norms(framework: Framework, model: Any) -> list[Any]:
    """Return a model's batch norms that learn; one that is not trainable keeps its statistics in training too."""
    layers = (each for each in layers_within(model) if isinstance(each, framework.module.layers.BatchNormalization))
    return [layer for layer in layers if not isinstance(layer, framework.passing) and layer.trainable]


def reestimate_batch_norm(
    framework: Framework, qmodel: Any, batches: Iterable[Any], forward: Callable[[Any, Any], Any] | None = None
) -> Any:
    """Estimate the statistics of the model's batch norms anew; see `trainable_keras.reestimate_batch_norm`."""
    state_of(framework, qmodel)
    norms = batch_norms(framework, qmodel)
    check_request(norms, batches, forward)
    to_numpy = framework.functions.to_numpy
    statistics = [variable for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]
    before = [np.array(to_numpy(variable)) for variable in statistics]
    momenta = [norm.momentum for norm in norms]
    calls: dict[int, int] = {}

    def call(batch: Any) -> Any:
        return qmodel(inputs_of(batch), training=False) if forward is None else forward(qmodel, batch)

    try:
        with framework.eagerly(), calls_replaced([(norm, _averaging(norm, calls)) for norm in norms]):
            feed(batches, call, SUBJECT)
        require_reached(norm.name for norm in norms if id(norm) not in calls)
    except BaseException:
        for variable, value in zip(statistics, before, strict=True):
            framework.assign(variable, value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return qmodel


def _averaging(norm: Any, calls: dict[int, int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes calls of a batch norm those of training, each of equal weight in its statistics."""

    def made_of(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            count = calls[id(norm)] = calls.get(id(norm), 0) + 1
            norm.momentum = (count - 1) / count
            return call(args[0] if args else kwargs.pop("inputs"), **{**kwargs, "training": True})

        return called

    return made_of
