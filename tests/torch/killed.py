"""Processes that are killed while they save a model; prints what each left behind, for `test_faults`."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainable_core.errors import TrainableError
from trainable_torch import calibrate, load, save, wrap

WIDTH = 300  # a file of 0.7 MB: long enough to be met while it is written


def model() -> nn.Module:
    """Return the float model."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def patched(owner: Any, name: str, *, before: bool, nth: int = 1) -> None:
    """Kill this process before or after the nth call of a function."""
    whole, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if before and len(calls) == nth:
            kill()
        result = whole(*args, **kwargs)
        if not before and len(calls) == nth:
            kill()
        return result

    setattr(owner, name, dying)


def half_written() -> None:
    """Kill this process when it has written half of the file."""
    whole = Path.open

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = whole(self, *args, **kwargs)

        class Half:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, content: bytes) -> None:
                file.write(content[: len(content) // 2])
                file.flush()
                kill()

        return Half()

    Path.open = opened  # type: ignore[method-assign,assignment] # this process is about to end


POINTS: dict[str, Callable[[], None]] = {
    "before the file": lambda: patched(Path, "open", before=True),
    "half of it written": half_written,
    "before fsync": lambda: patched(os, "fsync", before=True),
    "after fsync": lambda: patched(os, "fsync", before=False),
    "before the rename": lambda: patched(Path, "replace", before=True),
    "after the rename": lambda: patched(Path, "replace", before=False),
    "before the folder's fsync": lambda: patched(os, "fsync", before=True, nth=2),
}


def forked(work: Callable[[], None], seconds: float | None = None) -> int:
    """Run work in a process of its own; kill it after some time if asked to; return the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def found(path: Path, states: dict[str, nn.Module]) -> str:
    """Return which of the models a file holds, or what is wrong with it."""
    try:
        state = load(path, model()).state_dict()
    except TrainableError as error:
        return f"{type(error).__name__}: {error}"
    for name, qmodel in states.items():
        if all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items()):
            return name
    return "neither"


def main(folder: Path) -> None:
    """Kill, look, and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}}
    states = {name: calibrate(wrap(model(), recipe)) for name in ("old", "new")}
    path = folder / "model"

    def at(point: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            point()
            save(states["new"], path)

        return work

    def in_turn() -> None:
        while True:
            for qmodel in states.values():
                save(qmodel, path)

    report: dict[str, Any] = {"at": {}, "anytime": []}
    for name, point in POINTS.items():
        save(states["old"], path)
        content = path.read_bytes()
        ended_by = forked(at(point))
        report["at"][name] = {
            "signal": ended_by,
            "state": found(path, states),
            "same bytes": path.read_bytes() == content,
        }
    rng = random.Random(0)  # noqa: S311 - some moments, no secrets
    for _ in range(20):
        ended_by = forked(in_turn, rng.uniform(0.002, 0.06))
        report["anytime"].append({"signal": ended_by, "state": found(path, states)})
    save(states["new"], path)
    report["afterwards"] = found(path, states)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
