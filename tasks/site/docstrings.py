"""The reference: papers in docstrings are linked, and the pages of names that are gone are removed."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

REFERENCE = Path(__file__).parents[2] / "docs/reference"
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def _link_papers(_: Sphinx, _what: str, _name: str, _value: object, _options: object, lines: list[str]) -> None:
    lines[:] = [PAPER.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line) for line in lines]


def _remove_old_pages(_: Sphinx) -> None:
    lists = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.rst"))
    listed = set(re.findall(r"^   (\S+)$", lists, re.MULTILINE))
    for page in (REFERENCE / "generated").glob("*.rst"):
        if page.stem not in listed:
            page.unlink()


def setup(app: Sphinx) -> dict[str, bool]:
    """Change docstrings when autodoc has read them; autosummary writes pages, and leaves what it wrote before."""
    app.connect("builder-inited", _remove_old_pages)
    app.connect("autodoc-process-docstring", _link_papers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
