"""Checks of quantization params and bit widths; they raise ValueError, which pydantic turns into a field's error."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget

MAX_THRESHOLD = 2.0**100
"""Largest threshold and range end: with 16 bits its grid and the inverse of its scale stay inside float32."""


MAX_ITEMS = 2**20
"""How many numbers, texts and containers a document may hold; a few lines of YAML can stand for billions."""
MAX_DEPTH = 64
"""How many containers of a document may stand inside one another; an error message shows no deeper one."""


def plain(value: Any) -> Any:
    """Return a copy with NumPy numbers and arrays as Python's, at any depth; leave everything else as it is.

    Raises
    ------
    ValueError
        When it holds itself, is nested deeper than `MAX_DEPTH`, holds more than `MAX_ITEMS`, or text that UTF-8 can't
        express and so no JSON document.
    """
    return _plain(value, count(1), 0)


def _plain(value: Any, items: Iterator[int], depth: int) -> Any:
    if depth > MAX_DEPTH:
        message = f"it holds itself, or is nested deeper than {MAX_DEPTH}"
        raise ValueError(message)
    if next(items) > MAX_ITEMS:
        message = f"it holds more than {MAX_ITEMS} items"
        raise ValueError(message)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            check_text(key)
        return {key: _plain(item, items, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item, items, depth + 1) for item in value]
    return check_text(value)


def check_text(value: Any) -> Any:
    """Return the value; ValueError when it is a text with a lone surrogate, which no JSON document can hold."""
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    return value


def check_widths(widths: list[int]) -> list[int]:
    """Return the widths; ValueError unless there are some and all differ, as a quantizer keeps one grid for each."""
    if not widths:
        message = "an empty list offers no bit width; leave it out instead"
        raise ValueError(message)
    if len(set(widths)) < len(widths):
        message = f"bit widths must differ, got {widths}"
        raise ValueError(message)
    return widths


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a parameter: () of a number, (C,) of a list, (C, 1, 1, 1) of one shaped to broadcast.

    Raises
    ------
    ValueError
        When lists inside it differ in length, or more than one axis has several values.
    """
    if not isinstance(value, list):
        return ()
    shapes = {shape_of(item) for item in value}
    if len(shapes) > 1:
        message = f"lists inside it differ in shape: {sorted(shapes)}"
        raise ValueError(message)
    shape = (len(value), *(shapes.pop() if shapes else ()))
    if sum(size > 1 for size in shape) > 1:
        message = f"values of shape {shape} differ along more than one axis; a quantizer has one channel axis"
        raise ValueError(message)
    return shape


def flat(value: Any) -> Any:
    """Return a parameter that is shaped to broadcast as a plain list; numbers and plain lists as they are."""
    while isinstance(value, list) and any(isinstance(item, list) for item in value):
        value = [each for item in value for each in item]
    return value


def _numbers(key: str, value: Any) -> list[float]:
    """Return the parameter's numbers, one per channel, all finite."""
    try:
        shape_of(value)
    except ValueError as error:
        message = f"{key!r} must be a number or a list of numbers: {error}"
        raise ValueError(message) from None
    value = flat(value)
    items: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if not items:
        message = f"{key!r} must not be empty"
        raise ValueError(message)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float):
            message = f"{key!r} must be a number or a list of numbers, got {value!r}"
            raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
        if not abs(item) <= MAX_THRESHOLD:  # NaN is refused too
            message = f"{key!r} must be finite and at most 2**100 in magnitude, got {item!r}"
            raise ValueError(message)
    return [float(item) for item in items]


def _known_keys(method: QuantizationMethod) -> tuple[str, ...]:
    if method is QuantizationMethod.UNIFORM:
        return (RANGE_MIN, RANGE_MAX, THRESHOLD, SIGNED)
    if method in LUT_METHODS:
        return (THRESHOLD, SIGNED, LUT_VALUES)
    return (THRESHOLD, SIGNED)


def _check_threshold(params: Mapping[str, Any]) -> list[float]:
    thresholds = _numbers(THRESHOLD, params[THRESHOLD])
    if min(thresholds) <= 0:
        message = f"{THRESHOLD!r} must be positive, got {min(thresholds)!r}"
        raise ValueError(message)
    return thresholds


def _check_range(params: Mapping[str, Any]) -> list[float]:
    if THRESHOLD in params:
        if RANGE_MIN in params or RANGE_MAX in params:
            message = f"give either {THRESHOLD!r} or {RANGE_MIN!r} and {RANGE_MAX!r}, not both"
            raise ValueError(message)
        return _check_threshold(params)
    missing = [key for key in (RANGE_MIN, RANGE_MAX) if key not in params]
    if missing:
        message = f"UNIFORM needs {RANGE_MIN!r} and {RANGE_MAX!r} (or {THRESHOLD!r}); missing: {', '.join(missing)}"
        raise ValueError(message)
    lows, highs = _numbers(RANGE_MIN, params[RANGE_MIN]), _numbers(RANGE_MAX, params[RANGE_MAX])
    if len(lows) != len(highs):
        message = f"{RANGE_MIN!r} has {len(lows)} values, {RANGE_MAX!r} has {len(highs)}"
        raise ValueError(message)
    for low, high in zip(lows, highs, strict=True):
        if not low < high:
            message = f"{RANGE_MIN!r} must be less than {RANGE_MAX!r}, got [{low!r}, {high!r}]"
            raise ValueError(message)
    if params.get(SIGNED) is False and min(lows) < 0:
        message = f"{SIGNED!r} is false, and the range reaches down to {min(lows)!r}"
        raise ValueError(message)
    return lows


TABLE_ENDS = {True: (-128, 127), False: (0, 255)}
"""First and last value of a table with a sign, and without: mctq's hold integers of 8 bits."""


def _check_lut(params: Mapping[str, Any], n_bits: int) -> None:
    if LUT_VALUES not in params:
        message = f"a LUT method needs {LUT_VALUES!r}"
        raise ValueError(message)
    values = _numbers(LUT_VALUES, params[LUT_VALUES])
    if any(value != round(value) for value in values) or len(set(values)) > 2**n_bits:
        message = f"{LUT_VALUES!r} must be at most {2**n_bits} different integers, got {params[LUT_VALUES]!r}"
        raise ValueError(message)
    low, high = TABLE_ENDS[bool(params.get(SIGNED, True))]
    if not low <= min(values) <= max(values) <= high:
        sign = "" if params.get(SIGNED, True) else f", as {SIGNED!r} is false"
        message = f"{LUT_VALUES!r} must be from {low} to {high}{sign}, got {params[LUT_VALUES]!r}"
        raise ValueError(message)


def check_params(
    params: Mapping[str, Any], method: QuantizationMethod, n_bits: int, target: QuantizationTarget | None
) -> int | None:
    """Check quantization params against their method and return how many channels they are for.

    Parameters
    ----------
    params : mapping
        ``{}`` means not calibrated yet and is legal.
    method : QuantizationMethod
        The grid.
    n_bits : int
        Width of the grid's codes.
    target : QuantizationTarget or None
        What the params are for; None checks what holds for both.

    Returns
    -------
    int or None
        Number of channels, or None when the params hold plain numbers.

    Raises
    ------
    ValueError
        With the key, what is wrong with it and what was given.
    """
    if not isinstance(params, Mapping):
        message = f"quantization params must be a mapping, got {params!r}"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
    if not params:
        return None
    known = _known_keys(method)
    for key in params:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"{method.name} takes {', '.join(map(repr, known))}"
            message = f"unknown quantization parameter {key!r}; {hint}"
            raise ValueError(message)
    if SIGNED in params and not isinstance(params[SIGNED], bool):
        message = f"{SIGNED!r} must be true or false, got {params[SIGNED]!r}"
        raise ValueError(message)
    if target is QuantizationTarget.Activation and set(params) == {SIGNED} and method is not QuantizationMethod.UNIFORM:
        return None  # the sign is decided, the threshold waits for calibration
    if method is QuantizationMethod.UNIFORM:
        per_item = _check_range(params)
        first = params.get(THRESHOLD, params.get(RANGE_MIN))
    else:
        if THRESHOLD not in params:
            message = f"{method.name} needs {THRESHOLD!r}"
            raise ValueError(message)
        per_item = _check_threshold(params)
        first = params[THRESHOLD]
        if method in LUT_METHODS:
            _check_lut(params, n_bits)
        if target is QuantizationTarget.Weights and params.get(SIGNED) is False:
            message = f"{SIGNED!r} can't be false: a {method.name} weights grid is signed; UNIFORM takes any range"
            raise ValueError(message)
    return len(per_item) if isinstance(first, list) else None
