"""Prints, or writes into docs/conformance.md, which law caught each planted defect and after how many examples.

``python -m tests.planted.table torch --write``: the numbers are those of one version of hypothesis.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from tests.planted.defect import DEFECTS, SEED, Defect, failures

DOCUMENT = Path(__file__).parents[2] / "docs/conformance.md"
HEAD = "| planted in {backend} | mistake | caught by | examples |\n|---|---|---|---|\n"
BEFORE = 0  # that no other law is the first is what the tests require


def marked(backend: str) -> re.Pattern[str]:
    """Match a backend's table in the document, between its two marks."""
    return re.compile(rf"(<!-- planted: {backend} -->\n).*?(<!-- end -->)", re.DOTALL)


def row(defect: Defect) -> str:
    first = next(failures(defect.cls, defect.caught_by, BEFORE))
    return f"| `{defect}` | {defect.mistake} | `{first.law.name}` | {first.cases} |\n"


def table(backend: str) -> str:
    for module in sorted(Path(__file__).parent.glob(f"{backend}_*.py")):
        importlib.import_module(f"tests.planted.{module.stem}")
    return HEAD.format(backend=backend) + "".join(row(defect) for defect in DEFECTS[backend])


def listed(backend: str) -> list[tuple[str, str, str]]:
    """Return the document's rows for a backend, without the numbers of examples."""
    found = marked(backend).search(DOCUMENT.read_text(encoding="utf-8"))
    assert found is not None, f"{DOCUMENT.name} has no table for {backend}"
    return re.findall(r"^\| `(\w+)` \| (.+) \| `(\w+)` \| \d+ \|$", found[0], re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}, seed {SEED}")
    arguments = parser.parse_args()
    made = table(arguments.backend)
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(marked(arguments.backend).sub(lambda m: m[1] + made + m[2], text), encoding="utf-8")
    else:
        sys.stdout.write(made)


if __name__ == "__main__":
    main()
