"""How the benchmarks measure and report, whatever the framework: interleaved ratios, Markdown tables.

Times are CPU times of the process, which runs one thread: on a quiet machine they are wall times, on a shared one they
leave out the time in which others had the core (but not what others do to its caches and memory).

glibc gives large freed blocks back to the system and takes them again, a page fault for every 4 KiB, at moments that
depend on what else the process did. So the scripts start themselves again with both of its thresholds out of reach.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

MALLOC = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32))
RESULTS = Path(__file__).parent / "results"

Key = TypeVar("Key")


def arguments(description: str, rounds: int, peers: Collection[str] = ()) -> argparse.Namespace:
    """Return the command line's options, with one of any `peers`, in a process whose allocator keeps what it has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each candidate is measured")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/results as well")
    if peers:
        parser.add_argument("--peer", choices=peers, required=True, help="the library to measure beside ours")
    if any(os.environ.get(name) is None for name in MALLOC):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})  # noqa: S606 - this very script
    options, _ = parser.parse_known_args()  # `nox -s bench` gives every script the same options
    return options


def interleaved(
    baseline: Callable[[], object], candidates: Mapping[Key, Callable[[], object]], rounds: int, warm: int = 2
) -> dict[Key, float]:
    """Return the median ratio of each candidate's time to that of the baseline, which runs before every candidate."""
    ratios: dict[Key, list[float]] = {name: [] for name in candidates}
    for _ in range(warm):
        for run in (baseline, *candidates.values()):
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                floor = _seconds(baseline)
                ratios[name].append(_seconds(run) / floor)
    finally:
        gc.enable()
    return {name: statistics.median(each) for name, each in ratios.items()}


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; floats with two digits."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report(file: str, section: str, text: str, *, write: bool) -> None:
    """Print a table; `write`: and put it under the heading `section` into ``benchmarks/results/<file>.md``."""
    print(f"\n{text}\n", flush=True)
    if write:
        page = RESULTS / f"{file}.md"
        page.write_text(with_section(page.read_text(encoding="utf-8"), section, text), encoding="utf-8")


def with_section(page: str, section: str, text: str) -> str:
    """Return a Markdown page with this text under a heading of the second level; a new heading is the last one."""
    before, *parts = page.split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    sections[section] = f"\n{text}\n"
    return before + "".join(f"\n## {heading}\n{body}" for heading, body in sections.items())
