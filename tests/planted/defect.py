"""What a planted defect is: a broken class, its mistake in words, the law that must be the first to catch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trainable_core.conformance import LAWS, Verdict, adapter_of, try_law
from trainable_core.conformance.suite import subjects_of
from trainable_core.hookspecs import hookimpl
from trainable_core.registry import process as registry

EXAMPLES = 50
"""The law that is about the mistake must see it within the default number of cases."""
SEED = 0


@dataclass(frozen=True)
class Defect:
    cls: type[Any]
    caught_by: str
    before: int | None = None
    """Cases of the laws that must hold; None for as many as the test of the backend has, 0 to try none of them."""

    def __str__(self) -> str:
        return self.cls.__name__

    @property
    def mistake(self) -> str:
        return (self.cls.__doc__ or "").partition("\n")[0]


DEFECTS: dict[str, list[Defect]] = {}
"""By backend."""


def planted(backend: str, caught_by: str, before: int | None = None) -> Callable[[type[Any]], type[Any]]:
    """Register a broken class; `caught_by` is the law that says so first."""

    def register(cls: type[Any]) -> type[Any]:
        if "fake_quantize" in vars(cls) and "rounding" in {each.name for each in _options(cls)}:
            # what it does instead has one gradient of rounding
            cls.declaration = replace(cls.declaration, conformance_arguments=())
        DEFECTS.setdefault(backend, []).append(Defect(cls, caught_by, before))
        return cls

    return register


def _options(cls: type[Any]) -> tuple[Any, ...]:
    return getattr(getattr(cls, "declaration", None), "options", ())


def failures(cls: type[Any], caught_by: str, before: int) -> Iterator[Verdict]:
    """Yield what fails, in the order in which laws are tried; the laws that must hold get `before` cases, or no try."""
    if caught_by == "model_round_trip":  # about classes that a recipe finds; the others deploy what no model can hold
        with registered(cls):
            yield from _failures(cls, caught_by, before)
    else:
        yield from _failures(cls, caught_by, before)


@contextmanager
def registered(cls: type[Any]) -> Iterator[None]:
    """Let recipes find a class."""

    class Plugin:
        @staticmethod
        @hookimpl
        def trainable_register_quantizers(backend: str) -> list[type]:
            return [cls] if backend == cls.backend else []

    registry.register(Plugin, "planted")
    try:
        yield
    finally:
        registry.default_registry().unregister("planted")


def _failures(cls: type[Any], caught_by: str, before: int) -> Iterator[Verdict]:
    for subject in subjects_of(cls, adapter_of(cls.backend)):
        for law in LAWS.values():
            if law.about(subject) and (before or law.name == caught_by):
                examples = EXAMPLES if law.name == caught_by else before
                verdict = try_law(law, subject, examples=examples, seed=SEED, shrink=False)
                if not verdict.holds:
                    yield verdict
