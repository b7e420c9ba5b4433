"""Why an activation quantizer saw nothing in calibration: what a backend notes, and the reason that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LISTED = 3
"""How many different things a reason lists."""


@dataclass
class Sight:
    """What a backend saw of one holder, and of the layer that it belongs to, while the model ran.

    Parameters
    ----------
    calls : list of str
        How the layer was called, as `call_text` writes it; each way once. Empty when it was not called.
    values : list of str
        What reached the holder without values to look at, such as ``"an int64 tensor"``; each kind once.
    seen : bool
        Whether values reached the holder.
    readers : list of str
        Functions that read the layer's weights without calling the layer.
    """

    calls: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    seen: bool = False
    readers: list[str] = field(default_factory=list)

    def called(self, positional: int, keywords: Sequence[str]) -> None:
        """Note a call of the layer."""
        _note(self.calls, call_text(positional, keywords))

    def reached(self, value: str) -> None:
        """Note what reached the holder; an empty text stands for values."""
        if value:
            _note(self.values, value)
        else:
            self.seen = True

    def read(self, reader: str) -> None:
        """Note who read the layer's weights."""
        _note(self.readers, reader)


def _note(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)


def call_text(positional: int, keywords: Sequence[str]) -> str:
    """Return how a layer was called.

    Examples
    --------
    >>> call_text(1, ["mask"]), call_text(0, ["hidden_states"]), call_text(2, []), call_text(0, [])
    ('with 1 positional argument and mask=', 'with hidden_states=', 'with 2 positional arguments', 'without arguments')
    """
    parts = [] if not positional else [f"{positional} positional argument{'s' if positional > 1 else ''}"]
    parts += [f"{keyword}=" for keyword in keywords]
    return f"with {' and '.join(parts)}" if parts else "without arguments"


def value_text(dtype: str, size: int, *, floating: bool) -> str:
    """Return what a tensor without values to look at is; an empty text of one with values.

    Examples
    --------
    >>> value_text("int64", 3, floating=False), value_text("float32", 0, floating=True)
    ('an int64 tensor', 'an empty tensor')
    """
    if not floating:
        return f"{'an' if dtype[:1] in 'aeiou' else 'a'} {dtype} tensor"
    return "" if size else "an empty tensor"


def only_read(evaluated: Sight, trained: Sight | None) -> bool:
    """Return whether a layer is never called, and other functions read its weights: its inputs can't be reached.

    Examples
    --------
    >>> only_read(Sight(readers=["linear"]), Sight()), only_read(Sight(readers=["linear"]), Sight(seen=True))
    (True, False)
    """
    sights = [evaluated, *([trained] if trained else [])]
    called = any(sight.calls or sight.values or sight.seen for sight in sights)
    return not called and any(sight.readers for sight in sights)


def reason(tensor: str, evaluated: Sight, trained: Sight | None, *, looked_in_training: bool = False) -> str:
    """Return why a quantizer saw nothing.

    Parameters
    ----------
    tensor : str
        What it quantizes: the name of the layer's argument, or ``"output"``.
    evaluated : Sight
        What was seen in evaluation mode.
    trained : Sight or None
        What was seen in training mode, None when the model was not run in it.
    looked_in_training : bool
        Whether the quantizer would have been calibrated by what is seen in training mode.

    Examples
    --------
    >>> reason("input", Sight(values=["an int64 tensor"]), None)
    'it got an int64 tensor, which holds no values to quantize'
    >>> reason("input", Sight(calls=["with hidden_states="]), None)
    "its layer was called with hidden_states=, which does not pass 'input'"
    >>> reason("input", Sight(), Sight(seen=True))
    'its layer runs only in training mode'
    """
    for sight in (evaluated, *([trained] if trained and looked_in_training else [])):
        if sight.values:
            return f"it got {' or '.join(sight.values[:LISTED])}, which holds no values to quantize"
        if sight.calls:
            given = " or ".join(sight.calls[:LISTED])
            if tensor == "output":
                return f"its layer was called {given} and gave no output"
            return f"its layer was called {given}, which does not pass {tensor!r}"
    if trained is not None and (trained.seen or trained.calls or trained.values):
        return "its layer runs only in training mode"
    readers = evaluated.readers or (trained.readers if trained else [])
    if readers:
        return f"its layer is never called: {' and '.join(readers[:LISTED])} read its weights directly"
    modes = "in evaluation mode" if trained is None else "in evaluation mode or in training mode"
    return f"no batch reached its layer {modes}"
