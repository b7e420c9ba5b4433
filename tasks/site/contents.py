"""The site's tables of contents, which are the lists of links that a reader of the repository sees as well.

`docs/README.md` lists the pages in sections, which become the sidebar. A few pages have those of a folder below them,
in the order in which they link to them.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the contents are tested where Sphinx is not installed
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
MAP = "docs/README"
"""The page that lists the others."""
START = "README"
"""The page that the site opens with."""
PARENTS = {"docs/design/README": "docs/design", "docs/measured-tables": "benchmarks/results"}
"""Pages that list a folder of others."""


@dataclass(frozen=True)
class Entry:
    """A page in the list: its file, its title, and what the list says of it."""

    file: str
    title: str
    description: str

    @property
    def page(self) -> str:
        """Its name in Sphinx."""
        return self.file.rpartition(".")[0]


def links(text: str, page: str) -> dict[str, str]:
    """Return the files of the pages that a Markdown text links to, relative to the repository, and the links' texts.

    Parameters
    ----------
    text : str
        Markdown.
    page : str
        Name in Sphinx of the page that it is in; links are relative to it.
    """
    folder = posixpath.dirname(page)
    found: dict[str, str] = {}
    for title, target in re.findall(r"\[([^]]+)\]\((?!https?:)([^)#\s]+\.(?:md|ipynb|rst))(?:#[^)]*)?\)", text):
        found.setdefault(posixpath.normpath(posixpath.join(folder, target)), title)
    return found


def sections(text: str) -> dict[str, list[Entry]]:
    """Return the sections of the map with the entries of their lists; an entry is the first link of its item."""
    found: dict[str, list[Entry]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        items = re.split(r"^- ", body, flags=re.MULTILINE)[1:]
        found[heading.strip()] = [entry for entry in map(_entry, items) if entry]
    return found


def site_map() -> dict[str, list[Entry]]:
    """Return the sections of `docs/README.md`."""
    return sections((ROOT / f"{MAP}.md").read_text(encoding="utf-8"))


def toctree(pages: list[str], caption: str = "") -> str:
    """Return a hidden table of contents."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "", ":::{toctree}", *options, "", *(f"/{page}" for page in pages), ":::", ""])


def _entry(item: str) -> Entry | None:
    pages = links(item, MAP)
    if not pages:
        return None
    file, title = next(iter(pages.items()))
    description = re.sub(r"\s+", " ", item.partition(")")[2]).strip(" :")
    return Entry(file, title, re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", description))


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == START:
        app.env.note_dependency(f"{MAP}.md")  # so that it is read again when the list has changed
        source[0] += toctree([MAP])
        for heading, entries in site_map().items():
            source[0] += toctree([entry.page for entry in entries if entry.page != START], heading)
    elif folder := PARENTS.get(page):
        source[0] += toctree(
            [file.rpartition(".")[0] for file in links(source[0], page) if posixpath.dirname(file) == folder]
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the tables when Sphinx reads a page."""
    app.connect("source-read", _add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
