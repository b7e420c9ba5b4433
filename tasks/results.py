"""What the sessions of one run of nox did: outcome, time and counts of tests, printed at the end."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import nox


@dataclass
class Result:
    """What one session did.

    Parameters
    ----------
    name : str
        The session's.
    outcome : str
        ``ok`` once it has ended without an error.
    seconds : float
        How long it took.
    passed, failed, skipped : int
        Counts of tests; errors count as failed.
    """

    name: str
    outcome: str = "failed"
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0


RESULTS: dict[str, Result] = {}


@contextmanager
def timed(session: nox.Session, purpose: str) -> Iterator[None]:
    """Print what a session does when it starts, and how it ended and after how long; keep both for the summary."""
    result = RESULTS[session.name] = Result(session.name)
    started = time.monotonic()
    print(f"[{session.name}] {purpose}", flush=True)
    try:
        yield
        result.outcome = "ok"
    finally:
        result.seconds = time.monotonic() - started
        print(f"[{session.name}] {result.outcome} after {result.seconds:.0f} s", flush=True)


def count(result: Result, report: Path) -> None:
    """Add the counts of a report in JUnit's format, which pytest wrote, to a session's result."""
    for suite in ET.parse(report).iter("testsuite"):  # noqa: S314 - the file was written by our own pytest
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("errors", 0)) + int(suite.get("failures", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += tests - failed - skipped


def summary(results: list[Result]) -> str:
    """Return a table of the sessions and, on the last line, the counts of all tests."""
    width = max(len(name) for name in ("all sessions", *(result.name for result in results)))
    lines = [f"{'session':{width}} outcome  seconds  passed  failed  skipped"]
    for result in results:
        counts = (result.passed, result.failed, result.skipped)
        cells = "".join(f"{number:8d}" for number in counts) if any(counts) else ""
        lines.append(f"{result.name:{width}} {result.outcome:7} {result.seconds:8.0f}{cells}")
    lines.append(f"{'all sessions':{width}} {'took':7} {sum(result.seconds for result in results):8.0f} s")
    passed, failed, skipped = (
        sum(getattr(result, kind) for result in results) for kind in ("passed", "failed", "skipped")
    )
    if passed or failed or skipped:
        lines.append(f"total: {passed} passed, {failed} failed, {skipped} skipped")
    return "\n".join(lines)


@atexit.register
def _print_summary() -> None:
    if RESULTS:
        print(f"\n{summary(list(RESULTS.values()))}", flush=True)
