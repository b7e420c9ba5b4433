"""A run of many laws on many quantizers: its progress, its table and its JSON document."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import hypothesis

from trainable_core import __version__
from trainable_core.conformance import parallel
from trainable_core.conformance.case import Counterexample, Subject
from trainable_core.conformance.law import LAWS, Law
from trainable_core.conformance.suite import Verdict
from trainable_core.registry.process import get_backend

SCHEMA_VERSION = 1
Row = tuple[str, ...]
THOROUGH = 10
"""How many times as many cases a thorough run has."""
FEWEST, MOST = 3, 100
"""Cases per law and quantizer."""


@dataclass
class Report:
    """The results of a run.

    Parameters
    ----------
    examples : int or None
        Number of cases per law and quantizer; None where each backend's own number was taken.
    seed : int
        As for `try_law`.
    verdicts : list of Verdict
        In the order in which the laws were tried.
    seconds : float
        How long the run took.
    """

    examples: int | None
    seed: int
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counterexamples(self) -> list[Counterexample]:
        """Counterexamples, one for each law and quantizer that it does not hold for."""
        return [verdict.counterexample for verdict in self.verdicts if verdict.counterexample is not None]

    @property
    def cases(self) -> int:
        """Number of cases tried."""
        return sum(verdict.cases for verdict in self.verdicts)

    def coverage(self) -> list[Row]:
        """Return a row per law: its name, the number of its cases, and what was special about some of them."""
        rows: list[Row] = []
        for law in dict.fromkeys(verdict.law.name for verdict in self.verdicts):
            own = [verdict for verdict in self.verdicts if verdict.law.name == law]
            covered = sorted(frozenset[str]().union(*(verdict.covered for verdict in own)))
            rows.append((law, str(sum(verdict.cases for verdict in own)), ", ".join(covered)))
        return rows

    def rows(self) -> list[Row]:
        """Return a row per quantizer: backend, quantizer, laws that hold, cases, seconds, broken laws."""
        rows: list[Row] = []
        for subject in dict.fromkeys(verdict.subject for verdict in self.verdicts):
            own = [verdict for verdict in self.verdicts if verdict.subject == subject]
            kept, broken = sum(verdict.holds for verdict in own), [v.law.name for v in own if not v.holds]
            cases, seconds = sum(verdict.cases for verdict in own), sum(verdict.seconds for verdict in own)
            laws = f"{kept} of {len(own)}"
            rows.append((subject.key.backend, str(subject), laws, str(cases), f"{seconds:.1f}", ", ".join(broken)))
        return rows

    def document(self) -> dict[str, Any]:
        """Return the run as a JSON document."""
        backends = dict.fromkeys(verdict.subject.key.backend for verdict in self.verdicts)
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": {
                "python": platform.python_version(),
                "trainable-core": __version__,
                "hypothesis": hypothesis.__version__,
                **{name: _version(name) for backend in backends for name in _distributions(backend)},
            },
            "examples": self.examples,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "cases": self.cases,
            "ok": not self.counterexamples,
            "laws": {verdict.law.name: verdict.law.reason for verdict in self.verdicts},
            "coverage": {law: covered.split(", ") for law, _, covered in self.coverage()},
            "verdicts": [
                {
                    "backend": verdict.subject.key.backend,
                    "class": f"{verdict.subject.cls.__module__}.{verdict.subject.cls.__qualname__}",
                    "training_method": verdict.subject.key.quantizer_id,
                    "target": verdict.subject.key.target.name,
                    "quantization_method": verdict.subject.key.method.name,
                    "law": verdict.law.name,
                    "holds": verdict.holds,
                    "cases": verdict.cases,
                    "seconds": round(verdict.seconds, 3),
                    "counterexample": None if verdict.counterexample is None else verdict.counterexample.document(),
                }
                for verdict in self.verdicts
            ],
        }


def _distributions(backend: str) -> Iterable[str]:
    described = get_backend(backend)
    return (described.distribution, *described.framework)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def run(
    subjects: Sequence[Subject],
    laws: Sequence[Law],
    *,
    examples: int | None = None,
    seed: int,
    thorough: bool = False,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Try laws on quantizers, in as many processes as there are `jobs`; `progress` is called with what is tried next.

    The other arguments are `try_law`'s. No result depends on the number of processes. Where every law is tried and a
    backend has cases for the fewest alone, quantizers share the laws out: see `shared_out`.
    """
    report = Report(examples, seed)
    pending, before = [], 0
    for subject in subjects:
        about = [law for law in laws if law.about(subject)]
        many = share(subject, subjects, thorough=thorough) if examples is None else examples
        if examples is None and not thorough and many == FEWEST and len(laws) == len(LAWS):
            about = shared_out(about, subject, subjects, seed)
        pending.append(parallel.work(before, subject, about, many, seed, thorough=thorough))
        before += len(about)
    started = time.monotonic()

    def begins(work: parallel.Work, law: Law | None, broken: int) -> None:
        number, name = (work.place, "") if law is None else (work.place + work.laws.index(law), law.name)
        progress(f"{number + 1}/{before} {work.subject} {name}" + (f" ({broken} broken)" if broken else ""))

    for found in parallel.run(pending, jobs, begins):
        report.verdicts += found
    report.seconds = time.monotonic() - started
    return report


def share(subject: Subject, subjects: Sequence[Subject], *, thorough: bool) -> int:
    """Return how many cases per law a quantizer gets: many where few are checked."""
    many = min(max(subject.adapter.cases // len(_together(subject, subjects)), FEWEST), MOST)
    return many * THOROUGH if thorough else many


def _together(subject: Subject, subjects: Sequence[Subject]) -> list[Subject]:
    return [each for each in subjects if each.key.backend == subject.key.backend]


def shared_out(laws: Sequence[Law], subject: Subject, subjects: Sequence[Subject], seed: int) -> list[Law]:
    """Return a quantizer's share of laws, which goes on with the seed.

    A law on calls is tried on one grid of each class: a class has the same code for all of its grids, but for the
    values and gradients themselves. Where a backend has less than one case for each quantizer, every law is tried on
    as many quantizers as it has the fewest cases for, spread over the classes.
    """
    names, together, cases = list(LAWS), _together(subject, subjects), subject.adapter.cases

    def own(law: Law) -> bool:
        turn = names.index(law.name) + seed
        if cases < len(together):
            return subject in _spread([each for each in together if law.about(each)], cases // FEWEST, turn)
        grids = [each for each in together if each.cls is subject.cls and law.about(each)]
        return not of_calls(law) or subject in _spread(grids, 1, turn)

    return [law for law in laws if own(law)]


def _spread(subjects: Sequence[Subject], many: int, turn: int) -> list[Subject]:
    """Return so many of the subjects, at equal distances; the next ones for the next turn."""
    every = max(len(subjects) // max(many, 1), 1)
    return list(subjects[turn % every :: every])


def of_calls(law: Law) -> bool:
    """Return whether a law is about calls, and not about values and gradients."""
    return law.check.__module__.rpartition(".")[2] in OF_CALLS


OF_CALLS = {
    "classes",
    "contexts",
    "documents",
    "memory",
    "modifiers",
    "precision",
    "randomness",
    "replacements",
    "schedules",
    "sequences",
    "surroundings",
    "tensors",
    "training",
    "transforms",
}
"""Modules with laws on what a call leaves behind, on sequences of calls, and on what is written and read."""


class Progress:
    """Shows progress on stderr: on a terminal one line that is rewritten, elsewhere one line per quantizer."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown: set[str] = set()

    def __call__(self, text: str) -> None:
        """Show what is tried next."""
        if self._terminal:
            sys.stderr.write(f"\r{text:<78.78}")
            sys.stderr.flush()
            return
        number, quantizer, _ = text.split(" ", 2)
        if quantizer not in self._shown:
            sys.stderr.write(f"{number} {quantizer}\n")
            self._shown.add(quantizer)

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            sys.stderr.write("\r" + " " * 78 + "\r")
