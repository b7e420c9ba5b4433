"""What is learned: three data sets that come with packages, as arrays, and what a model is judged by.

Nothing here knows a framework: both get the same arrays, in the same batches, in the same order.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = NDArray[Any]

VOCABULARY = 64
"""Characters that the transformer knows; the last one stands for all others."""
CONTEXT = 32
WINDOW = 26
"""Steps of two weeks that the recurrent network sees: a year."""
AHEAD = 6
"""Steps of two weeks that it looks ahead."""


@dataclass(frozen=True)
class Data:
    """One data set, split.

    Parameters
    ----------
    train_x, train_y, test_x, test_y : array
        Inputs and targets; of text, `train_x` is the whole of it, shape (characters,), and `train_y` is empty.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


@dataclass(frozen=True)
class Problem:
    """What a network is trained for.

    Parameters
    ----------
    name : str
        Of the network, as the tables have it.
    title : str
        The heading of its tables.
    data : {"digits", "text", "series"}
        Which data set.
    metric : str
        What a score is.
    higher_is_better : bool
        Which way scores are read.
    batch : int
        Number of examples in a batch.
    float_steps, steps : int
        Training steps of the float model, and of every method after it.
    float_rate, rate : float
        Learning rates of the weights, of Adam, at the beginning; they fall to zero by a cosine.
    ends : tuple of (str, tuple of str)
        Names of first and last layers, and which of their tensors have 8 bits.
    """

    name: str
    title: str
    data: Literal["digits", "text", "series"]
    metric: str
    higher_is_better: bool
    batch: int
    float_steps: int
    steps: int
    float_rate: float
    rate: float
    ends: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes; otherwise they are numbers."""
        return self.data != "series"


BOTH = ("weights", "activations")
PROBLEMS = {
    each.name: each
    for each in (
        Problem(
            "cnn",
            "Convolutional network on digits",
            "digits",
            "accuracy, %",
            higher_is_better=True,
            batch=64,
            float_steps=60 * 21,
            steps=20 * 21,
            float_rate=5e-3,
            rate=1e-3,
            ends=(("stem_conv", BOTH), ("head", BOTH)),
        ),
        Problem(
            "depthwise",
            "Depthwise network on digits",
            "digits",
            "accuracy, %",
            higher_is_better=True,
            batch=64,
            float_steps=60 * 21,
            steps=20 * 21,
            float_rate=5e-3,
            rate=1e-3,
            ends=(("stem_conv", BOTH), ("head", BOTH)),
        ),
        Problem(
            "transformer",
            "Character transformer on Python's help texts",
            "text",
            "bits per character",
            higher_is_better=False,
            batch=16,
            float_steps=2000,
            steps=300,
            float_rate=3e-3,
            rate=1e-3,
            ends=(("embedding", BOTH), ("position", BOTH), ("head", BOTH)),
        ),
        Problem(
            "recurrent",
            "Recurrent network on atmospheric CO2",
            "series",
            "root mean squared error, ppm",
            higher_is_better=False,
            batch=64,
            float_steps=1500,
            steps=400,
            float_rate=5e-3,
            rate=1e-3,
            ends=(("recurrent", ("activations",)), ("head", ("weights",))),
        ),
    )
}


@functools.cache
def load(problem: Problem, seed: int) -> Data:
    """Return a problem's data; the seed decides how digits are split, the others are split by time."""
    return {"digits": _digits, "text": _text, "series": _series}[problem.data](seed)


def _digits(seed: int) -> Data:
    """Scikit-learn's digits, 1,797 real images of 8 by 8 pixels; a quarter of them is for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int64), test_size=0.25, random_state=seed, stratify=labels
    )
    return Data(train_x, train_y, test_x, test_y)


def _text(_seed: int) -> Data:
    """Python's help on topics, by the order of their names; the last tenth is for testing, in 256 pieces."""
    text = "".join(topics[name] for name in sorted(topics))
    characters, counts = np.unique(np.array(list(text)), return_counts=True)
    known = characters[np.argsort(-counts, kind="stable")][: VOCABULARY - 1]
    codes = {character: code for code, character in enumerate(known)}
    encoded = np.array([codes.get(character, VOCABULARY - 1) for character in text], np.int64)
    split = len(encoded) * 9 // 10
    rest = encoded[split:]
    starts = np.linspace(0, len(rest) - CONTEXT - 1, 256).astype(int)
    pieces = np.stack([rest[start : start + CONTEXT + 1] for start in starts])
    return Data(encoded[:split], encoded[:0], pieces[:, :-1], pieces[:, 1:])


def _series(_seed: int) -> Data:
    """Weekly CO2 at Mauna Loa, 1958 to 2001 (statsmodels), every second week; the last quarter is for testing.

    Inputs are what a year was above or below its last value, targets what the value is twelve weeks later, in ppm.
    """
    file = resources.files("statsmodels.datasets.co2") / "co2.csv"
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    values = np.array([float(row["co2"] or "nan") for row in rows])
    known = np.flatnonzero(~np.isnan(values))
    values = np.interp(np.arange(len(values)), known, values[known])[::2]
    windows = np.lib.stride_tricks.sliding_window_view(values, WINDOW + AHEAD)
    last = windows[:, WINDOW - 1]
    x = (windows[:, :WINDOW] - last[:, np.newaxis]).astype(np.float32)[..., np.newaxis]
    y = (windows[:, -1] - last).astype(np.float32)[:, np.newaxis]
    split = len(x) * 3 // 4
    return Data(x[: split - WINDOW - AHEAD], y[: split - WINDOW - AHEAD], x[split:], y[split:])


def batches(problem: Problem, data: Data, *, steps: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Yield as many batches as there are steps; images are shifted by up to one pixel."""
    random = np.random.default_rng(seed)
    if problem.data == "text":
        for _ in range(steps):
            starts = random.integers(0, len(data.train_x) - CONTEXT, problem.batch)
            pieces = data.train_x[starts[:, np.newaxis] + np.arange(CONTEXT + 1)]
            yield pieces[:, :-1], pieces[:, 1:]
        return
    images = problem.data == "digits"
    source = _shifted(data.train_x) if images else data.train_x
    order = np.array([], np.int64)
    for _ in range(steps):
        if len(order) < problem.batch:  # the small rest of an epoch is left out
            order = random.permutation(len(data.train_x))
        chosen, order = order[: problem.batch], order[problem.batch :]
        shifts = tuple(random.integers(0, 3, size=(2, problem.batch))) if images else ()
        yield source[(chosen, *shifts)], data.train_y[chosen]


def _shifted(images: Array) -> Array:
    """Return all images at all nine places, shape (N, 3, 3, 8, 8)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))


def score(problem: Problem, outputs: Array, targets: Array) -> float:
    """Return what a model is judged by."""
    outputs = outputs.astype(np.float64)
    if problem.data == "series":
        return float(np.sqrt(np.mean((outputs - targets) ** 2)))
    if problem.data == "digits":
        return 100 * float((outputs.argmax(-1) == targets).mean())
    shifted = outputs - outputs.max(-1, keepdims=True)
    logits = np.take_along_axis(shifted, targets[..., np.newaxis], -1)[..., 0]
    return float(np.mean(np.log(np.exp(shifted).sum(-1)) - logits) / np.log(2))
