"""Running cells in processes of their own, which have one framework each."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import floats
from cells import Cell

CELLS_OF_A_PROCESS = 80
"""Then a new process goes on: TensorFlow keeps something of each model."""


def measure(cell: Cell) -> tuple[Cell, dict[str, Any] | str]:
    """Run a cell in this process; return its scores, seconds and float model, or what went wrong."""
    started = time.process_time()
    try:
        found = importlib.import_module(f"{cell.framework}_runs").run(cell)
    except Exception:  # noqa: BLE001 - one cell that fails does not end the others
        return cell, traceback.format_exc()
    seconds = round(time.process_time() - started, 1)
    return cell, {**found, "seconds": seconds, "float": floats.digest(cell.network, cell.seed)}


def run(pending: Collection[Cell], file: Path, jobs: int) -> int:
    """Run cells in processes of their own and append what they give; return how many failed."""
    failed = 0
    pool = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=CELLS_OF_A_PROCESS)
    with pool, file.open("a", encoding="utf-8") as lines:
        for number, (cell, found) in enumerate(pool.imap_unordered(measure, pending), 1):
            if isinstance(found, str):
                failed += 1
                print(f"{cell} failed\n{found}", flush=True)
                continue
            lines.write(json.dumps({**vars(cell), **found}) + "\n")
            lines.flush()
            print(f"{number} of {len(pending)}, {cell}: {found['score']:.3f} in {found['seconds']:.1f} s", flush=True)
        pool.close()
        pool.join()
    return failed
