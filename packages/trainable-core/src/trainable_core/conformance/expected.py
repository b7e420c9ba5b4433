"""Checks that are expected to fail: each with a reason, and a failure when it passes, as pytest's strict xfail."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from trainable_core.errors import InvalidArgumentError, nearest


def checked_expectations(expected: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return expected failures; each names a law or a check that is made, and gives a reason.

    Parameters
    ----------
    expected : mapping of str to str
        Reasons, by law (``"tie_rule"``) or by quantizer and law (``"EWGS-Weights-UNIFORM-tie_rule"``).
    names : collection of str
        The laws and checks that are made.

    Raises
    ------
    InvalidArgumentError
        When a name is none of these, or a reason is blank.
    """
    for name, reason in expected.items():
        if name not in names:
            hint = nearest(name, names).strip().removeprefix("Hint: ")
            raise InvalidArgumentError(
                f"expected failure {name!r}", "it is neither a law nor a check that is made", hint
            )
        if not reason.strip():
            raise InvalidArgumentError(f"expected failure {name!r}", "it has no reason", "say why it fails.")
    return dict(expected)


def parsed_expectations(texts: Sequence[str]) -> dict[str, str]:
    """Return expected failures from ``LAW=REASON`` texts, as the command line takes them.

    Raises
    ------
    InvalidArgumentError
        When a text has no reason, or a name is given twice.

    Examples
    --------
    >>> parsed_expectations(["level_count=the top code is reserved"])
    {'level_count': 'the top code is reserved'}
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, reason = text.partition("=")
        if not reason.strip():
            raise InvalidArgumentError(f"--expect {text}", "it has no reason", "write LAW=REASON.")
        if name in found:
            raise InvalidArgumentError(f"--expect {text}", f"{name} is expected twice")
        found[name] = reason.strip()
    return found
