"""What each training method is worth: method by setting by network by framework, five seeds; writes docs/evidence.md.

Every cell is one run of some seconds, whose result is appended to ``benchmarks/results/evidence.jsonl``; cells that are
there are not run again, so a run that was stopped goes on. The page is written at the end, and by ``--page`` alone.

Usage: ``python benchmarks/evidence [--short] [--only TEXT ...] [--jobs N] [--page]``
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import page
from cells import FRAMEWORKS, cell_of, cells, is_short
from running import run

RESULTS = Path(__file__).parents[1] / "results" / "evidence.jsonl"


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one seed of what says most, in some minutes")
    only = "run only cells whose name (framework/network/setting/method/seed) has all of these texts"
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help=only)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from what is there")
    results = "file that results are appended to; the page is made of the usual one alone"
    parser.add_argument("--results", type=Path, default=RESULTS, help=results)
    return parser.parse_args()


def done(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of results; a line that was cut off by the end of a process is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def main() -> None:
    """Run what is missing and write the page."""
    chosen = options()
    os.environ.update(OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow")
    records = done(chosen.results)
    known = {cell_of(record) for record in records}
    wanted = [cell for cell in cells() if all(text in str(cell) for text in chosen.only)]
    if chosen.short:
        wanted = [cell for cell in wanted if is_short(cell)]
    pending = [] if chosen.page else [cell for cell in wanted if cell not in known]
    failed = 0
    for framework in FRAMEWORKS:
        own = [cell for cell in pending if cell.framework == framework]
        failed += run(own, chosen.results, chosen.jobs) if own else 0
    if chosen.results == RESULTS:
        page.write(done(RESULTS))
    if failed:
        raise SystemExit(f"{failed} cells failed")


if __name__ == "__main__":
    main()
