"""Checks that are expected to fail: each with a reason, and a failure when it passes, as pytest's strict xfail."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainable_core.errors import DocumentError, InvalidArgumentError, nearest

TABLE = "tool.trainable.expected-failures"
"""The table of a plugin's pyproject.toml that says which checks fail, and why."""


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


def normalized(distribution: str) -> str:
    """Return the name of a distribution as package indexes compare names.

    Examples
    --------
    >>> normalized("Trainable_MyMethod")
    'trainable-mymethod'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def project_expectations(path: Path | None) -> tuple[str, dict[str, str]]:
    """Return the name of a project, and the expected failures in the table `TABLE` of its pyproject.toml.

    Parameters
    ----------
    path : Path or None
        The file; None for the one in the current folder, if there is one.

    Raises
    ------
    DocumentError
        When the file can't be read.
    InvalidArgumentError
        When the table is no table of texts, or the file names no project.
    """
    if path is None:
        path = Path("pyproject.toml")
        if not path.is_file():
            return "", {}
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415 - the command line is there without the extra
    else:
        import tomli as tomllib  # noqa: PLC0415 - pytest, of the same extra, brings it
    try:
        with path.open("rb") as file:
            document: dict[str, Any] = tomllib.load(file)
    except OSError as error:
        raise DocumentError(path, f"can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DocumentError(path, f"is not TOML: {error}") from error
    table: Any = document
    for key in TABLE.split("."):
        table = table.get(key, {}) if isinstance(table, dict) else {}
    subject = f"[{TABLE}] of {path}"
    if not isinstance(table, dict) or not all(isinstance(reason, str) for reason in table.values()):
        raise InvalidArgumentError(subject, "it is not a table of texts", 'write LAW = "REASON".')
    project = document.get("project", {})
    name = project.get("name", "") if isinstance(project, dict) else ""
    if table and not (isinstance(name, str) and name):
        raise InvalidArgumentError(subject, "the file names no project whose quantizers these could be")
    return str(name), dict(table)


def checked_table(table: Mapping[str, str], made: Collection[str], laws: Collection[str], *, complete: bool) -> None:
    """Check the expected failures of a project.

    Parameters
    ----------
    table : mapping of str to str
        Reasons, by law or by quantizer and law.
    made : collection of str
        The checks of the project's quantizers that are made.
    laws : collection of str
        All laws.
    complete : bool
        Whether every check is made; otherwise a name of one that is not is passed over.

    Raises
    ------
    InvalidArgumentError
        When a name is that of no law, or of no check that is made, or a reason is blank.
    """
    others = [] if complete else [name for name in table if name.rpartition("-")[2] in laws]
    checked_expectations(table, {*made, *laws, *others})
