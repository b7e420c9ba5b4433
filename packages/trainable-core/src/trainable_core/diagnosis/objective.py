"""What a difference between two models' outputs costs: divergence, squared error, or a figure of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import CalibrationError, InvalidArgumentError

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Metric = Callable[[Any, Any], float] | str

KL, MSE = "kl", "mse"

UNITS = {KL: "nats", MSE: "of the output's energy"}
"""What the costs of the built-in metrics are counted in."""

NORMALIZED = 1e-3
"""How far the sum of probabilities may be from one: of float16 numbers it is a few thousandths of a thousand terms."""


def log_probabilities(outputs: Array, axis: int, *, normalized: bool) -> Float64:
    """Return the logarithms of the probabilities that outputs stand for.

    Parameters
    ----------
    outputs : float array
        Logits or probabilities.
    axis : int
        Axis of the classes.
    normalized : bool
        Whether they are probabilities already, as behind a softmax; see `is_probabilities`.

    Examples
    --------
    >>> np.exp(log_probabilities(np.array([[0.0, np.log(3.0)]]), -1, normalized=False))
    array([[0.25, 0.75]])
    """
    given = np.asarray(outputs, np.float64)
    if normalized:
        return np.log(np.maximum(given, np.finfo(np.float32).tiny))
    shifted = given - given.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def is_probabilities(outputs: Array, axis: int) -> bool:
    """Return whether outputs are not negative and sum up to one."""
    if not outputs.size or float(outputs.min()) < 0:
        return False
    return bool(np.abs(outputs.sum(axis=axis, dtype=np.float64) - 1).max() < NORMALIZED)


class Objective:
    """What the outputs of a quantized model cost beside those of a reference.

    Parameters
    ----------
    metric : {"kl", "mse"} or callable
        ``kl``: the divergence of the output's probabilities from the reference's, in nats, averaged over the rows.
        ``mse``: the squared distance divided by the reference's energy. Or ``metric(outputs, batch)``, a number for
        what the model returned for a batch.
    axis : int
        Axis of the classes, for ``kl``.
    greater_is_better : bool
        Whether a larger number of a `metric` of one's own is better.

    Raises
    ------
    InvalidArgumentError
        When the metric is unknown, or the axis is no integer.
    """

    def __init__(self, metric: Metric = KL, *, axis: int = -1, greater_is_better: bool = True) -> None:
        if not callable(metric) and metric not in {KL, MSE}:
            raise InvalidArgumentError("metric", f"it is 'kl', 'mse' or a callable, got {metric!r}")
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise InvalidArgumentError("axis", f"it is an integer, got {axis!r}")
        self.metric, self.axis, self.greater_is_better = metric, axis, bool(greater_is_better)

    @property
    def name(self) -> str:
        """What the metric is called."""
        if isinstance(self.metric, str):
            return self.metric
        return str(getattr(self.metric, "__name__", type(self.metric).__name__))

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return UNITS.get(self.name, f"of {self.name}") if isinstance(self.metric, str) else f"of {self.name}"

    @property
    def needs_arrays(self) -> bool:
        """Whether it is computed from the main output's values."""
        return isinstance(self.metric, str)

    def check(self, reference: Array, values: Array) -> None:
        """Refuse outputs that the metric says nothing of.

        Parameters
        ----------
        reference, values : float array
            The main output of the reference, and of the model without quantization.

        Raises
        ------
        InvalidArgumentError
            When the outputs have no such axis, or a single class along it, or those of the teacher another shape.
        CalibrationError
            When outputs of the reference are not finite.
        """
        if not np.isfinite(reference).all():
            problem = "the outputs that the quantized model is compared with are not finite"
            raise CalibrationError("diagnose", problem, "look for the bad batch.")
        if reference.shape != values.shape:
            problem = f"its output has the shape {reference.shape}, and that of the model {values.shape}"
            raise InvalidArgumentError("teacher", problem, "both need the same classes.")
        if self.metric != KL:
            return
        if not -reference.ndim <= self.axis < reference.ndim:
            raise InvalidArgumentError("axis", f"the output of shape {reference.shape} has no axis {self.axis}")
        if reference.shape[self.axis] < 2:  # noqa: PLR2004 - a divergence needs two
            problem = f"'kl' compares classes, and the output of shape {reference.shape} has one along axis {self.axis}"
            raise InvalidArgumentError("metric", problem, "use metric='mse', another axis, or a callable.")

    def cost(self, outputs: Any, values: Array | None, reference: Array | None, batch: Any) -> tuple[float, float]:
        """Return the cost of a batch, larger being worse, and its weight in an average over batches.

        Parameters
        ----------
        outputs : any
            What the model returned.
        values, reference : float array or None
            The main output of the model and of the reference; None where the metric does not need them.
        batch : any
            The batch, labels included.

        Raises
        ------
        InvalidArgumentError
            When a metric of the user's gives something else than a number.
        """
        if not isinstance(self.metric, str):
            found = self.metric(outputs, batch)
            try:
                number = float(found)
            except (TypeError, ValueError) as error:
                problem = f"{self.name} returned {type(found).__name__}, not a number"
                raise InvalidArgumentError("metric", problem) from error
            return (-number if self.greater_is_better else number), 1.0
        assert values is not None  # noqa: S101 - see `needs_arrays`
        assert reference is not None  # noqa: S101 - as above
        if not np.isfinite(values).all():
            return math.inf, 1.0
        if self.metric == MSE:
            # the sums of all batches are divided by each other, so that batches weigh as their energy
            energy = float(np.square(reference, dtype=np.float64).sum())
            apart = float(np.square(values.astype(np.float64) - reference).sum())
            return (apart / energy if energy else (math.inf if apart else 0.0)), energy or 1.0
        p, q, rows, _ = self._distributions(reference, values)
        return max(float((np.exp(p) * (p - q)).sum()) / rows, 0.0), float(rows)

    def cost_of_float(
        self, outputs: Any, values: Array | None, reference: Array | None, batch: Any
    ) -> tuple[float, float]:
        """Return the cost of a batch without quantization, which the others are compared with, as `cost` does.

        Raises
        ------
        InvalidArgumentError
            When a metric of the user's gives something else than a number, or one that is not finite.
        """
        number, weight = self.cost(outputs, values, reference, batch)
        if not isinstance(self.metric, str) and not math.isfinite(number):
            problem = f"{self.name} returned {abs(number)} for the model without quantization"
            raise InvalidArgumentError("metric", problem, "look for the bad batch.")
        return number, weight

    def upstream(self, values: Array, reference: Array) -> Array:
        """Return the gradient of the cost with respect to the main output, float32.

        For a metric of the user's, that of ``mse``.

        Notes
        -----
        Of the divergence with logits, ``(q - p) / rows``; with outputs that are probabilities, ``-p / q / rows``. Of
        the squared error, ``2 (y - r) / sum(r**2)``.
        """
        if self.metric != KL:
            energy = float(np.square(reference, dtype=np.float64).sum()) or 1.0
            return np.asarray(2 * (values.astype(np.float64) - reference) / energy).astype(np.float32)
        log_p, log_q, rows, normalized = self._distributions(reference, values)
        given = -np.exp(log_p - log_q) if normalized else np.exp(log_q) - np.exp(log_p)
        return np.asarray(given / rows).astype(np.float32)

    def _distributions(self, reference: Array, values: Array) -> tuple[Float64, Float64, int, bool]:
        """Return the logarithms of both probabilities, the number of rows, and whether outputs are probabilities."""
        normalized = is_probabilities(reference, self.axis)
        p, q = (log_probabilities(each, self.axis, normalized=normalized) for each in (reference, values))
        return p, q, max(p.size // p.shape[self.axis], 1), normalized


class Average:
    """A weighted average that is summed up batch by batch."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Take in a value; NaN counts as infinitely bad."""
        self._sum += math.inf if math.isnan(value) else value * weight
        self._weight += weight

    @property
    def value(self) -> float:
        """The average; 0 of nothing."""
        return self._sum / self._weight if self._weight else 0.0
