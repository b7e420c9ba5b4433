"""What a planted defect is: a broken class, its mistake in words, the law that must be the first to catch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Defect:
    cls: type[Any]
    caught_by: str

    def __str__(self) -> str:
        return self.cls.__name__

    @property
    def mistake(self) -> str:
        return (self.cls.__doc__ or "").partition("\n")[0]


DEFECTS: dict[str, list[Defect]] = {}
"""By backend."""


def planted(backend: str, caught_by: str):
    """Register a broken class; `caught_by` is the law that says so first."""

    def register(cls: type[Any]) -> type[Any]:
        DEFECTS.setdefault(backend, []).append(Defect(cls, caught_by))
        return cls

    return register
