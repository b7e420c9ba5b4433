"""Distillation: a quantized student learns the outputs of a float teacher, and its features.

References
----------
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531 (logits).
Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550 (features).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.errors import InvalidArgumentError, nearest

SUBJECT = "distill"


def _log_softmax(logits: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def logits_term(
    student: ArrayLike, teacher: ArrayLike, temperature: float = 1.0, axis: int = -1
) -> tuple[float, NDArray[np.float64]]:
    """Return the term for the logits, and its gradient for those of the student.

    Parameters
    ----------
    student, teacher : float array, same shape
        Logits.
    temperature : float
        > 0; the larger, the more the small probabilities count.
    axis : int
        Axis of the classes.

    Returns
    -------
    term : float
    gradient : float64 array, shape of `student`

    Notes
    -----
    ``T**2 * mean(sum_k p_k (log p_k - log q_k))`` with ``p = softmax(teacher / T)``, ``q = softmax(student / T)`` and
    the mean over everything but the classes (section 2 of Hinton et al.; the factor keeps gradients of one size for
    every temperature). The gradient is ``T (q - p) / N``.

    Examples
    --------
    >>> term, gradient = logits_term([[0.0, 0.0]], [[0.0, np.log(3.0)]])
    >>> round(term, 6), gradient
    (0.130812, array([[ 0.25, -0.25]]))
    """
    of_student, of_teacher = (np.asarray(each, np.float64) / temperature for each in (student, teacher))
    q, p = _log_softmax(of_student, axis), _log_softmax(of_teacher, axis)
    count = max(p.size // p.shape[axis], 1)
    term = temperature**2 * float((np.exp(p) * (p - q)).sum()) / count
    return term, temperature * (np.exp(q) - np.exp(p)) / count


def features_term(student: ArrayLike, teacher: ArrayLike) -> tuple[float, NDArray[np.float64]]:
    """Return the mean squared distance of features, and its gradient for those of the student."""
    distance = np.asarray(student, np.float64) - np.asarray(teacher, np.float64)
    return float((distance**2).mean()), 2 * distance / distance.size


def checked_weights(
    temperature: Any, logits: Any, features: Any, student: Collection[str], teacher: Collection[str]
) -> dict[str, float]:
    """Return the factor of each layer's term by the layer's name, after a look at all arguments.

    Parameters
    ----------
    temperature, logits : float
        As users give them.
    features : mapping, sequence or None
        Factors by name, or names, whose factors are 1.
    student, teacher : collection of str
        Names of the layers of both models.

    Raises
    ------
    InvalidArgumentError
        When a number is not one or out of range, a model has no layer of a name, or nothing is to be learned.
    """
    for name, value in (("temperature", temperature), ("logits", logits)):
        if not _is_factor(value) or (name == "temperature" and value == 0):
            raise InvalidArgumentError(SUBJECT, f"{name} must be a positive number, got {value!r}")
    given = {} if features is None else features
    if not isinstance(given, Mapping | Sequence) or isinstance(given, str | bytes):
        raise InvalidArgumentError(SUBJECT, f"features must be names of layers, or factors by name, got {features!r}")
    weights = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
    for name, weight in weights.items():
        for which, known in (("student", student), ("teacher", teacher)):
            if name not in known:
                problem = f"features: the {which} has no layer {name!r}" + nearest(name, known)
                raise InvalidArgumentError(SUBJECT, problem)
        if not _is_factor(weight):
            raise InvalidArgumentError(
                SUBJECT, f"features: the factor of {name!r} must not be negative, got {weight!r}"
            )
    if not logits and not any(weights.values()):
        raise InvalidArgumentError(SUBJECT, "all factors are 0, so nothing would be learned from the teacher")
    return {name: float(weight) for name, weight in weights.items()}


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)
