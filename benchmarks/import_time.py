"""How much more than its dependencies `import trainable_core` costs: a ratio of fresh interpreters, interleaved.

Usage: ``python benchmarks/import_time.py [--runs N]``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

DEPENDENCIES = "import numpy, pydantic, pluggy"
STATEMENTS = {
    "import trainable_core": "import trainable_core",
    "from trainable_core import *": "from trainable_core import *",
}


def seconds(statement: str) -> float:
    """Return how long a fresh interpreter takes to run one statement, its own start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)  # noqa: S603 - one of the statements above
    return time.perf_counter() - started


def main() -> None:
    """Interleave the two, print medians and the median of the pairwise ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=15, help="pairs of interpreters, after one to warm up")
    runs = parser.parse_known_args()[0].runs
    for title, statement in STATEMENTS.items():
        pairs = [(seconds(statement), seconds(DEPENDENCIES)) for _ in range(runs + 1)][1:]
        core, dependencies = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{title}: {core:.3f} s; {DEPENDENCIES}: {dependencies:.3f} s; median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
