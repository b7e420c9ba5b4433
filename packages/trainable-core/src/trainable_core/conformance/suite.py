"""Checking quantizers against laws: one law on one class, all laws on many, and the decorator for tests."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from trainable_core.conformance import laws as _registers_them  # noqa: F401 - a law is registered when its module is imported
from trainable_core.conformance import strategies
from trainable_core.conformance.adapter import Adapter, adapter_of
from trainable_core.conformance.case import Case, Counterexample, Subject, Violation, shown
from trainable_core.conformance.expected import checked_expectations, checked_table, project_expectations
from trainable_core.conformance.law import LAWS, Law, named_laws
from trainable_core.conformance.strategies import Corner
from trainable_core.errors import InvalidArgumentError, UnsupportedConfigError, nearest
from trainable_core.registry.marks import keys_of
from trainable_core.registry.process import default_registry
from trainable_core.registry.rows import QuantizerRow

F = TypeVar("F", bound=Callable[..., Any])
EXAMPLES = 50
"""Cases per law and quantizer when nobody says otherwise."""

__all__ = [
    "LAWS",
    "Check",
    "ConformanceError",
    "Verdict",
    "check_quantizer",
    "checks",
    "conformance_checks",
    "replay",
    "subjects",
    "try_law",
]


class ConformanceError(AssertionError):
    """Raised by a check when its law does not hold; the message is the counterexample."""

    def __init__(self, counterexample: Counterexample) -> None:
        self.counterexample = counterexample
        super().__init__(f"\n{counterexample}")


@dataclass(frozen=True)
class Verdict:
    """The result of trying one law on one quantizer.

    Parameters
    ----------
    law : Law
        The law.
    subject : Subject
        The quantizer.
    cases : int
        Number of cases tried, not counting those that made a counterexample smaller.
    seconds : float
        How long it took.
    counterexample : Counterexample or None
        None when the law holds.
    covered : frozenset of str
        What was special about the cases, in words; see `Case.labels`.
    """

    law: Law
    subject: Subject
    cases: int
    seconds: float
    counterexample: Counterexample | None
    covered: frozenset[str] = frozenset()

    @property
    def holds(self) -> bool:
        """Whether the law held for every case."""
        return self.counterexample is None


def try_law(
    law: Law,
    subject: Subject,
    *,
    examples: int | None = None,
    seed: int | None = None,
    shrink: bool = True,
    thorough: bool = False,
) -> Verdict:
    """Try one law on one quantizer.

    Parameters
    ----------
    law : Law
        The law.
    subject : Subject
        A quantizer class on one of its grids.
    examples : int, optional
        Number of cases; by default that of the active hypothesis profile. At least half of them are drawn at random,
        the others are made to meet the law's corners, which subjects share out between them where there are few.
    seed : int, optional
        Seed of the generated cases; by default as the active hypothesis profile says. The next seed goes on with the
        corners that follow, so that runs with successive seeds meet all of them.
    shrink : bool
        Whether to make a counterexample as small as possible, which may take many more calls than finding it.
    thorough : bool
        Whether every corner is tried, whatever the number of cases, and ways to run that take seconds each.
    """
    started = time.monotonic()
    trial = _Trial(law, subject, thorough=thorough)
    profile = settings()
    many = 1 if law.once else (profile.max_examples if examples is None else examples)
    if law.most is not None and not thorough:
        many = min(many, law.most)
    corners = law.corners(subject)
    key = f"{subject.cls.__qualname__}{subject}{law.name}"
    chosen = corners if thorough else _share(corners, many // 2, key, seed or 0)
    error = _drawn(trial, max(many - len(chosen), 1 if law.once else many - many // 2), seed, shrink=shrink)
    if error is None:
        entropy = 0 if seed is None and profile.derandomize else seed
        error = trial.corners(chosen, entropy, shrink=shrink)
    seconds = time.monotonic() - started
    found = None if error is None else _counterexample(law, subject, trial.failed, error)
    return Verdict(law, subject, trial.tried, seconds, found, frozenset(trial.covered))


class _Trial:
    """The cases that a law was tried on, and the one that failed."""

    def __init__(self, law: Law, subject: Subject, *, thorough: bool) -> None:
        self.law, self.subject, self.thorough = law, subject, thorough
        self.tried = 0
        self.covered: set[str] = set()
        self.failed: Case | None = None
        self.error: Exception | None = None

    def attempt(self, case: Case) -> None:
        """Try the law on a case."""
        if self.error is None:
            self.tried += 1
            self.covered |= case.labels()
        try:
            with np.errstate(all="ignore"):  # cases overflow and divide zero by zero on purpose
                self.law.check(self.subject.under(case, thorough=self.thorough), case)
        except Exception as problem:
            self.failed, self.error = case, problem
            raise

    def corners(self, corners: Sequence[Corner], seed: int | None, *, shrink: bool) -> Exception | None:
        """Try the law in corners, and make a case that fails simpler."""
        for number, corner in enumerate(corners):
            key = None if seed is None else [seed, number, zlib.crc32(f"{self.subject}{self.law.name}".encode())]
            case = strategies.corner_case(np.random.default_rng(key), self.subject, self.law.kind, corner)
            error = self._error(case)
            if error is not None:
                return self._simplified(case, error) if shrink else error
        return None

    def _simplified(self, case: Case, error: Exception) -> Exception:
        for _ in range(SIMPLER):
            found = next(((each, e) for each in strategies.simpler(case) if (e := self._error(each)) is not None), None)
            if found is None:
                break
            case, error = found
        self.failed = case
        return error

    def _error(self, case: Case) -> Exception | None:
        try:
            self.attempt(case)
        except Exception as problem:  # noqa: BLE001 - whatever a quantizer raises is the finding
            return problem
        return None


SIMPLER = 30
"""How often a counterexample in a corner is made simpler."""


def _share(corners: list[Corner], most: int, key: str, seed: int) -> list[Corner]:
    """Return as many of the corners, in their order: other ones for another key, the next ones for the next seed."""
    first = (zlib.crc32(key.encode()) + seed * most) % max(len(corners), 1)
    chosen = sorted((first + place) % len(corners) for place in range(min(most, len(corners))))
    return [corners[place] for place in chosen]


def _drawn(trial: _Trial, many: int, seed: int | None, *, shrink: bool) -> Exception | None:
    """Try a law on cases that hypothesis draws."""
    configured = settings(
        max_examples=many,
        deadline=None,
        database=None,
        derandomize=seed is None and settings().derandomize,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    attempt = trial.attempt  # hypothesis wants a function

    def test(case: Case) -> None:
        attempt(case)

    decorated = configured(given(trial.law.cases(trial.subject))(test))
    if seed is not None:
        decorated = hypothesis.seed(seed)(decorated)
    try:
        decorated()
    except Exception as problem:  # noqa: BLE001 - whatever a quantizer raises is the finding
        return trial.error or problem
    return None


def _counterexample(law: Law, subject: Subject, case: Case | None, error: Exception) -> Counterexample:
    name = f"{subject.cls.__module__}.{subject.cls.__qualname__}"
    if isinstance(error, Violation):
        what, expected, got = error.what, shown(error.expected), shown(error.got)
    else:
        what, expected, got = "the call", "no error", f"{type(error).__name__}: {error}"
    return Counterexample(law.name, law.reason, name, subject, None if law.once else case, what, expected, got)


def subjects_of(cls: type[Any], adapter: Adapter) -> list[Subject]:
    """Return a subject for each grid that a class is registered for."""
    return [Subject(adapter, cls, key) for key in keys_of(cls, adapter.backend)]


def subjects(backend: str | None = None, plugin: str | None = None) -> list[Subject]:
    """Return every registered quantizer class on each of its grids.

    Parameters
    ----------
    backend : str, optional
        Only this one's; by default every installed backend's.
    plugin : str, optional
        Only those of this plugin, named by its entry point or its distribution.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides the backend.
    InvalidArgumentError
        When no plugin has that name.
    """
    registry = default_registry()
    rows = registry.list_quantizers(backend)
    if plugin is not None:
        rows = _rows_of(plugin, rows)
    adapters = {name: adapter_of(name) for name in dict.fromkeys(row.backend for row in rows)}
    return [subject for row in rows for subject in subjects_of(row.cls, adapters[row.backend])]


def _rows_of(plugin: str, rows: Iterable[QuantizerRow]) -> list[QuantizerRow]:
    known = default_registry().plugins()
    wanted = {row.distribution for row in known if plugin in {row.name, row.distribution}}
    if not wanted:
        names = sorted(row.name for row in known)
        problem = f"there is no such plugin; plugins: {', '.join(names) or 'none'}"
        raise InvalidArgumentError(f"plugin {plugin!r}", problem, nearest(plugin, names).strip().removeprefix("Hint: "))
    return [row for row in rows if row.distribution in wanted]


def check_quantizer(
    cls: type[Any],
    adapter: Adapter | str,
    *,
    laws: Sequence[str] | None = None,
    examples: int | None = None,
    seed: int | None = None,
    shrink: bool = True,
) -> Iterator[Verdict]:
    """Yield a verdict for each law on each grid of a class, which need not be registered.

    Parameters
    ----------
    cls : type
        A class marked with ``@mark_quantizer``.
    adapter : Adapter or str
        The adapter of its backend, or the backend's name.
    laws : sequence of str, optional
        Only these.
    examples, seed, shrink
        As for `try_law`.
    """
    chosen = named_laws(None if laws is None else list(laws))
    for subject in subjects_of(cls, adapter_of(adapter) if isinstance(adapter, str) else adapter):
        for law in chosen:
            if law.about(subject):
                yield try_law(law, subject, examples=examples, seed=seed, shrink=shrink)


@dataclass(frozen=True)
class Check:
    """One law on one quantizer; call it in a test.

    Raises `ConformanceError` with the counterexample when the law does not hold.
    """

    law: Law
    subject: Subject
    examples: int | None = None
    seed: int | None = None

    def __call__(self) -> None:
        """Try the law."""
        verdict = try_law(self.law, self.subject, examples=self.examples, seed=self.seed)
        if verdict.counterexample is not None:
            raise ConformanceError(verdict.counterexample)

    def __str__(self) -> str:
        return f"{self.subject}-{self.law.name}"


def checks(
    *classes: type[Any],
    backend: str | None = None,
    plugin: str | None = None,
    laws: Sequence[str] | None = None,
    examples: int | None = None,
    seed: int | None = None,
) -> list[Check]:
    """Return a check for each law on each quantizer; see `conformance_checks`."""
    found = (
        [s for cls in classes for s in subjects_of(cls, adapter_of(cls.backend))]
        if classes
        else subjects(backend, plugin)
    )
    chosen = named_laws(None if laws is None else list(laws))
    return [Check(law, subject, examples, seed) for subject in found for law in chosen if law.about(subject)]


def conformance_checks(
    *classes: type[Any],
    backend: str | None = None,
    plugin: str | None = None,
    laws: Sequence[str] | None = None,
    examples: int | None = None,
    seed: int | None = None,
    expected_failures: Mapping[str, str] | str | PathLike[str] | None = None,
) -> Callable[[F], F]:
    """Parametrize a test with every law on every quantizer: ``def test_it(check): check()``.

    Parameters
    ----------
    *classes : type
        Quantizer classes; by default those that installed plugins registered.
    backend : str, optional
        Only this backend's quantizers. A class names its own backend.
    plugin : str, optional
        Only those of this plugin, named by its entry point or its distribution.
    laws : sequence of str, optional
        Only these.
    examples, seed : int, optional
        As for `try_law`.
    expected_failures : mapping of str to str, or path, optional
        Reasons, by law (``"tie_rule"``) or by quantizer and law (``"EWGS-Weights-UNIFORM-tie_rule"``); or the
        pyproject.toml whose table ``[tool.trainable.expected-failures]`` has them. A check that is expected to fail
        and passes is reported as a failure.

    Raises
    ------
    DocumentError
        When the pyproject.toml can't be read.
    InvalidArgumentError
        When a name is not a law's, when an expected failure belongs to no check or gives no reason, or when there is
        nothing to check.
    """
    import pytest  # noqa: PLC0415 - the command line needs none

    made = checks(*classes, backend=backend, plugin=plugin, laws=laws, examples=examples, seed=seed)
    if not made:
        raise InvalidArgumentError(
            f"backend {backend!r}, plugin {plugin!r}", "no quantizer is registered to be checked"
        )
    if isinstance(expected_failures, str | PathLike):
        expected = project_expectations(Path(expected_failures))[1]
        checked_table(expected, [str(check) for check in made], LAWS, complete=laws is None and backend is None)
    else:
        names = {str(check) for check in made} | {check.law.name for check in made}
        expected = checked_expectations(expected_failures or {}, names)
    parameters = []
    for check in made:
        why = expected.get(str(check), expected.get(check.law.name))
        marks = [] if why is None else [pytest.mark.xfail(reason=why, raises=ConformanceError, strict=True)]
        parameters.append(pytest.param(check, id=str(check), marks=marks))
    decorate: Callable[[F], F] = pytest.mark.parametrize("check", parameters)
    return decorate


def replay(document: Mapping[str, Any] | str, cls: type[Any] | None = None) -> None:
    """Try a law again on the case of a counterexample; raises `Violation`, or what the quantizer raises.

    Parameters
    ----------
    document : mapping or str
        What `Counterexample.document` returned, or an entry of the JSON report; a str is read as JSON.
    cls : type, optional
        The class; by default the one at the document's import path.

    Raises
    ------
    InvalidArgumentError
        When the class can't be imported.
    UnsupportedConfigError
        When the class does not serve the document's grid.
    """
    given: Mapping[str, Any] = json.loads(document) if isinstance(document, str) else document
    cls = _imported(given["quantizer"]) if cls is None else cls
    (law,) = named_laws([given["law"]])
    for subject in subjects_of(cls, adapter_of(given["backend"])):
        if subject.key.method.name == given["method"]:
            if given["case"] is None:  # the law is about the class: any case will do
                Check(law, subject, seed=0)()
                return
            case = Case.from_document(given["case"])
            with np.errstate(all="ignore"):
                law.check(subject.under(case, thorough=True), case)
            return
    raise UnsupportedConfigError("replay", f"{cls.__name__} is not for {given['method']}")


def _imported(path: str) -> type[Any]:
    module, _, name = path.rpartition(".")
    try:
        cls: type[Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            "replay", f"there is no quantizer at {path}: {error}", "pass the class as `cls`."
        ) from error
    return cls
