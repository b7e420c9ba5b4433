"""One thread at a time, but never a thread that the one in charge is waiting for.

A plugin may start a thread while it is imported, and wait for it; when that thread asks the registry, each waits for
the other. Whoever finds the thread in charge waiting for other threads goes ahead without its turn, and meets what the
thread in charge would meet if it asked itself: the plugins that were loaded before.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType, TracebackType
from typing import Final

LOOK: Final = 0.05
"""Seconds between two looks at the thread in charge."""

PATIENCE: Final = 10
"""Looks in a row that must find it waiting in the same place."""


class Turns:
    """A reentrant lock for one thread at a time; see the module."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._entered = threading.local()

    def __enter__(self) -> None:
        with_turn = self._take()
        self._stack().append((with_turn, self._holder))
        if with_turn:
            self._holder = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with_turn, before = self._stack().pop()
        if with_turn:
            self._holder = before if self._stack() else None
            self._lock.release()

    def _stack(self) -> list[tuple[bool, int | None]]:
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        stack: list[tuple[bool, int | None]] = self._entered.stack
        return stack

    def _take(self) -> bool:
        """Wait for the turn; False when the thread in charge waits for other threads itself."""
        if self._stack() and not self._stack()[-1][0]:
            return False  # gone ahead already
        waiting: FrameType | None = None
        looks = 0
        while not self._lock.acquire(timeout=LOOK):
            frame = sys._current_frames().get(self._holder or 0)  # noqa: SLF001 - documented, in spite of its name
            waits = frame is not None and frame.f_code.co_filename == threading.__file__
            looks = looks + 1 if waits and frame is waiting else int(waits)
            waiting = frame
            if looks >= PATIENCE:
                return False
        return True
