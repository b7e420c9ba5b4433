"""Checking quantizers in several processes: each takes the next quantizer when it has tried all laws on its last one.

A process is `python -m trainable_core.conformance.parallel`: it gets tasks from its standard input and returns what
became of them by its standard output, both as pickles. What it can't do, the process that asked does itself: a
quantizer that is not registered there, or what a process had taken that ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from trainable_core.conformance import suite
from trainable_core.conformance.case import Counterexample, Subject
from trainable_core.conformance.law import LAWS, Law
from trainable_core.conformance.suite import Verdict, try_law

FEWEST = 8
"""Quantizers that are worth a process of their own, which imports a framework first."""


class Task(NamedTuple):
    """All laws that are to be tried on one quantizer, in words that another process understands.

    Parameters
    ----------
    backend, quantizer : str
        The backend's name, and what `_name` makes of a subject.
    laws : tuple of str
        Names of the laws.
    examples, seed, thorough
        As for `try_law`.
    """

    backend: str
    quantizer: str
    laws: tuple[str, ...]
    examples: int
    seed: int
    thorough: bool


@dataclass(frozen=True)
class Work:
    """A quantizer, the laws that are about it, and the task that this is for another process."""

    place: int
    subject: Subject
    laws: Sequence[Law]
    task: Task


def work(place: int, subject: Subject, laws: Sequence[Law], examples: int, seed: int, *, thorough: bool) -> Work:
    """Return what is to be done about the quantizer at this place."""
    names = tuple(law.name for law in laws)
    return Work(place, subject, laws, Task(subject.key.backend, _name(subject), names, examples, seed, thorough))


def verdicts(task: Task, subject: Subject, laws: Sequence[Law]) -> Iterator[Verdict]:
    """Try the laws of a task."""
    for law in laws:
        yield try_law(law, subject, examples=task.examples, seed=task.seed, thorough=task.thorough)


Begins = Callable[[Work, "Law | None", int], None]
"""Called with what is tried next, and with how many laws were found to be broken until then.

With each law that is tried in this process; with None for a quantizer that another process has taken.
"""


def run(pending: Sequence[Work], jobs: int, begins: Begins) -> list[list[Verdict]]:
    """Return the verdicts on each quantizer, made by this process and at most `jobs` - 1 others."""
    found: dict[int, list[Verdict]] = {}
    left = deque(pending)
    helpers = [_Helper(left, found, begins) for _ in range(min(jobs, len(pending) // FEWEST) - 1)]
    try:
        for helper in helpers:
            helper.start()
        while True:
            _here(left, found, begins)
            for helper in helpers:
                if helper.imports:
                    helper.end()  # nothing is left for it
                helper.join()
            if not left:  # what a process that ended had taken is here again
                break
    finally:
        left.clear()
        for helper in helpers:
            helper.end()
    return [found[each.place] for each in pending]


def _here(left: deque[Work], found: dict[int, list[Verdict]], begins: Begins) -> None:
    while left:
        with contextlib.suppress(IndexError):  # a helper was faster
            each = left.popleft()
            own: list[Verdict] = []
            found[each.place] = own
            for law in each.laws:
                begins(each, law, _broken(found))
                own += verdicts(each.task, each.subject, [law])


def _broken(found: dict[int, list[Verdict]]) -> int:
    return sum(not each.holds for own in list(found.values()) for each in own)


class _Helper(threading.Thread):
    """Gives tasks to a process of its own."""

    def __init__(self, left: deque[Work], found: dict[int, list[Verdict]], begins: Begins) -> None:
        super().__init__(daemon=True)
        self.left, self.found, self.begins = left, found, begins
        self.imports = True
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes wait for each other's cores
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def run(self) -> None:
        """Give out tasks while there are some and the process answers."""
        if self._answer(sorted({each.task.backend for each in tuple(self.left)})) is None:
            return
        self.imports = False
        while self.left:
            with contextlib.suppress(IndexError):
                each = self.left.popleft()
                self.begins(each, None, _broken(self.found))
                answer = self._answer(each.task)
                if answer is None:
                    self.left.append(each)
                    return
                said = zip(each.laws, answer, strict=True)
                self.found[each.place] = [verdict(each.subject, law, one) for law, one in said]

    def _answer(self, asked: Task | list[str]) -> list[Any] | None:
        given, made = self.process.stdin, self.process.stdout
        try:
            pickle.dump(asked, given)  # type: ignore[arg-type] # a pipe
            given.flush()  # type: ignore[union-attr]
            found: list[Any] | None = pickle.load(made)  # type: ignore[arg-type] # noqa: S301 - our own process
        except Exception:  # noqa: BLE001 - a process that ended, or bytes that are no answer: the work is done here then
            return None
        return found

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def _name(subject: Subject) -> str:
    return f"{subject.cls.__module__}.{subject.cls.__qualname__} {subject}"


def verdict(subject: Subject, law: Law, said: Any) -> Verdict:
    """Return the verdict that `serve` said."""
    cases, seconds, covered, counterexample = said
    found = None if counterexample is None else Counterexample(subject=subject, **counterexample)
    return Verdict(law, subject, cases, seconds, found, covered)


def _said(found: Verdict) -> Any:
    """Return a verdict without its subject, which holds modules."""
    broken = found.counterexample
    told = None if broken is None else {name: value for name, value in vars(broken).items() if name != "subject"}
    return found.cases, found.seconds, found.covered, told


def serve(given: IO[bytes], made: IO[bytes]) -> None:
    """Import the backends that are named first, then answer tasks; None where a quantizer is not known here."""
    backends: list[str] = pickle.load(given)  # noqa: S301 - of the process that began this one
    known = {_name(each): each for backend in backends for each in suite.subjects(backend)}
    made.write(pickle.dumps([]))
    made.flush()
    while True:
        try:
            task: Task = pickle.load(given)  # noqa: S301 - as above
        except EOFError:
            return
        subject = known.get(task.quantizer)
        laws = [LAWS[name] for name in task.laws if name in LAWS]
        answer = None
        if subject is not None and len(laws) == len(task.laws):
            answer = [_said(each) for each in verdicts(task, subject, laws)]
        made.write(pickle.dumps(answer))
        made.flush()


def main() -> None:
    """Serve on the standard streams; what a framework prints must not get between the answers."""
    with os.fdopen(os.dup(1), "wb") as made:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, made)


if __name__ == "__main__":
    main()
