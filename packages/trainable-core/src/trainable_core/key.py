"""What a quantizer class is looked up by."""

from __future__ import annotations

from typing import NamedTuple

from trainable_core.enums import QuantizationMethod, QuantizationTarget


class Key(NamedTuple):
    """What a quantizer class is looked up by."""

    backend: str
    target: QuantizationTarget
    quantizer_id: str
    method: QuantizationMethod

    def __str__(self) -> str:
        return f"{self.backend}/{self.target}/{self.quantizer_id}/{self.method}"


def is_readable(name: str) -> bool:
    """Return whether a name can be read and typed: printable, not blank, and without spaces around it.

    Examples
    --------
    >>> is_readable("EWGS"), is_readable(" "), is_readable(chr(9)), is_readable("EWGS ")
    (True, False, False, False)
    """
    return bool(name) and name.isprintable() and name == name.strip()


def identifier_text(quantizer_id: object) -> str:
    """Return the string a training method is registered under: an enum member gives its name, anything else ``str()``.

    Examples
    --------
    >>> from trainable_core.enums import TrainingMethod
    >>> identifier_text(TrainingMethod.LSQ), identifier_text("EWGS")
    ('LSQ', 'EWGS')
    """
    name = getattr(quantizer_id, "name", None)
    return name if isinstance(name, str) else str(quantizer_id)
