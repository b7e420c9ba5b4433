"""Files of the site that are no pages: ``index.html`` and ``llms.txt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.site.contents import START, site_map

if TYPE_CHECKING:  # the list is tested where Sphinx is not installed
    from sphinx.application import Sphinx

SUMMARY = "Trainable quantizers for quantization-aware training in PyTorch and Keras."


def llms(sources: str) -> str:
    """Return a list of all pages for programs that read documentation, in the format of https://llmstxt.org.

    Parameters
    ----------
    sources : str
        Folder of the pages' Markdown in the site.
    """
    lines = ["# trainable", "", f"> {SUMMARY}"]
    for heading, entries in site_map().items():
        lines += ["", f"## {heading}", ""]
        for entry in entries:
            description = f": {entry.description}" if entry.description else ""
            lines.append(f"- [{entry.title}]({sources}/{entry.file}.txt){description}")
    return "\n".join([*lines, ""])


def _write(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        folder = Path(app.outdir)
        # The start page is the repository's README, and keeps its name, because relative links lead to it.
        page = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={START}.html">'
        (folder / "index.html").write_text(f'{page}<a href="{START}.html">trainable</a>\n', encoding="utf-8")
        (folder / "llms.txt").write_text(llms("_sources"), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the files when the pages are there."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
