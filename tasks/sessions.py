"""Registering a session, and running pytest in one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import nox

from tasks.environments import FOLDER, Environment
from tasks.results import RESULTS, count, timed

Session = Callable[[nox.Session], None]


def check(name: str, *, default: bool = True, python: Sequence[str] | None = None) -> Callable[[Session], Session]:
    """Register a function as a session that prints its purpose and its time.

    Parameters
    ----------
    name : str
        The session's.
    default : bool
        Whether a plain ``nox`` runs it.
    python : sequence of str, optional
        Versions of Python to run it on, each in a virtualenv of nox's own; without them the session uses the
        virtualenvs of `tasks.environments`.
    """

    def decorate(function: Session) -> Session:
        purpose = (inspect.getdoc(function) or name).partition("\n")[0]

        @functools.wraps(function)
        def run(session: nox.Session) -> None:
            with timed(session, purpose):
                function(session)

        backend = "virtualenv" if python else "none"
        nox.session(name=name, default=default, python=python, venv_backend=backend)(run)
        return run

    return decorate


def pytest(
    session: nox.Session, environment: Environment, *arguments: str, env: Mapping[str, str | None] | None = None
) -> None:
    """Run pytest in an environment and count its outcomes, whether it passes or not."""
    report = FOLDER / f"{session.name}.xml"
    report.unlink(missing_ok=True)
    settings = {"HYPOTHESIS_PROFILE": "ci", **(env or {})}
    try:
        environment.run(session, "-m", "pytest", f"--junitxml={report}", *arguments, *session.posargs, env=settings)
    finally:
        if report.exists():
            count(RESULTS[session.name], report)
