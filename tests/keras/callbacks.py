"""Training with the callbacks of Keras, whichever Keras it is; results are the weights of the model in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS = 4
INTERRUPTED_AT = 2
Weights = list[np.ndarray]


class Interrupted(Exception):  # noqa: N818 - not an error: what a machine that goes away does to a program
    """Training was cut off."""


def cut_off(keras: Any, epoch: int) -> Any:
    """Return a callback that cuts training off when an epoch begins."""

    class CutOff(keras.callbacks.Callback):
        def on_epoch_begin(self, now: int, logs: Any = None) -> None:
            if now == epoch:
                raise Interrupted

    return CutOff()


def fit(keras: Any, model: Any, x: np.ndarray, target: np.ndarray, epochs: int, callbacks: Any = ()) -> Any:
    """Train with momentum, so that the optimizer has a state too, on batches in a fixed order."""
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model.fit(
        x, target, batch_size=len(x) // 2, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )


def backed_up(
    keras: Any, make: Callable[[], Any], x: np.ndarray, target: np.ndarray, folder: Path
) -> tuple[Weights, Weights]:
    """Return the weights after uninterrupted training, and those after a cut and another process's going on.

    Parameters
    ----------
    keras : module
        Which Keras.
    make : callable
        Returns a model that is ready to train, each time an equal one.
    x, target : array
        What it is trained with.
    folder : path
        Where ``BackupAndRestore`` keeps its files.
    """
    whole = make()
    fit(keras, whole, x, target, EPOCHS)
    first = make()
    try:
        fit(
            keras,
            first,
            x,
            target,
            EPOCHS,
            [keras.callbacks.BackupAndRestore(str(folder)), cut_off(keras, INTERRUPTED_AT)],
        )
    except Interrupted:
        pass
    else:
        message = "nothing was cut off"
        raise AssertionError(message)
    second, seen = make(), []
    begun = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    fit(keras, second, x, target, EPOCHS, [keras.callbacks.BackupAndRestore(str(folder)), begun])
    assert seen == list(range(INTERRUPTED_AT, EPOCHS))  # else it began anew, and would be the same for that
    return whole.get_weights(), second.get_weights()


def stopped_early(keras: Any, make: Callable[[], Any], x: np.ndarray, target: np.ndarray) -> tuple[Weights, Weights]:
    """Return the weights after one epoch, and those that ``EarlyStopping`` restored because it was the best.

    A falling loss that is to rise is at its best after the first epoch.
    """
    best, stopped = make(), make()
    fit(keras, best, x, target, 1)
    stop = keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=1, restore_best_weights=True)
    history = fit(keras, stopped, x, target, EPOCHS, [stop])
    losses = history.history["loss"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    return best.get_weights(), stopped.get_weights()


def same(one: Weights, other: Weights) -> bool:
    """Tell whether weights are the same bit for bit."""
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
