"""Docstrings in the reference: papers that are named by their number are linked."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def _link_papers(_: Sphinx, _what: str, _name: str, _value: object, _options: object, lines: list[str]) -> None:
    lines[:] = [PAPER.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Change docstrings when autodoc has read them."""
    app.connect("autodoc-process-docstring", _link_papers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
