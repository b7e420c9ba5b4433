"""The page of a report: one HTML file with its style and its figures in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainable_core import __version__
from trainable_core.backend.description import FOLDED, TITLES
from trainable_core.documents.files import as_path, require_writable, write_atomically
from trainable_core.errors import DocumentError
from trainable_core.export.libraries import library
from trainable_core.reporting.contents import Contents, TensorFacts, remarks
from trainable_core.reporting.figures import EXTRA, Artist
from trainable_core.tracking.writers import Scalar

MOST_CODES = 64
"""Codes of a grid for which a figure shows how often each is used; beyond, the histogram shows as much."""

CLIPPED = 0.05
"""Share of clipped values from which on a tensor is named at the top."""

UNUSED = 0.5
"""Share of the codes in use below which a tensor is named at the top."""

MOST_NAMED = 12
"""Tensors that are named at the top; more can be unfolded."""

SECTIONS = {
    "attention": "Worth a look",
    "diagnosis": "Diagnosis",
    "quantizers": "Quantizers",
    "islands": "In the exported file",
    "tensors": "Weights and activations on their grids",
}
"""Headings by their ids."""


@dataclass(frozen=True)
class Heading:
    """The heading of a list of names."""

    id: str
    title: str
    titles: tuple[str, str]


@dataclass
class Card:
    """A tensor's part of the page."""

    id: str
    name: str
    remarks: Sequence[str] = ()
    figures: list[tuple[str, Any]] = field(default_factory=list)


class Page:
    """Makes pages.

    Raises
    ------
    MissingLibraryError
        When Matplotlib or Jinja is not installed.
    """

    def __init__(self) -> None:
        self._artist = Artist()
        jinja = library("jinja2", "report", EXTRA)
        self._markup = library("markupsafe", "report", EXTRA).Markup
        environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True)
        text = (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
        self._template = environment.from_string(text)

    def html(self, contents: Contents) -> str:
        """Return the page of a report."""
        cards = self._cards(contents)
        notes = {_heading(title): list(names.items()) for title, names in contents.description.notes().items()}
        attention = list(attention_to(contents.tensors))
        shown = {
            "attention": attention,
            "diagnosis": contents.diagnosis,
            "quantizers": True,
            "islands": contents.islands,
            "tensors": cards,
        }
        sections = {name: title for name, title in SECTIONS.items() if shown[name]}
        text: str = self._template.render(
            contents=contents,
            sections=sections | {heading.id: heading.title for heading in notes},
            titles=TITLES,
            rows=contents.description.table()[1],
            notes=notes,
            attention=attention,
            most=MOST_NAMED,
            anchors={card.name: card.id for card in cards},
            cards=cards,
            number="{:.3g}".format,
            version=__version__,
        )
        return text

    def write(self, contents: Contents, path: Path) -> Path:
        """Write the page of a report; an old one is replaced only once the new one is complete.

        Raises
        ------
        DocumentError
            When it can't be written.
        """
        write_atomically(path, self.html(contents).encode())
        return path

    def _cards(self, contents: Contents) -> list[Card]:
        by_tensor: dict[str, list[Scalar]] = {}
        for scalar in contents.training:
            by_tensor.setdefault(scalar.tensor, []).append(scalar)
        names = [*(facts.name for facts in contents.tensors), *by_tensor]
        cards = {name: Card(f"tensor-{index}", name) for index, name in enumerate(dict.fromkeys(names))}
        for facts in contents.tensors:
            if facts.values.empty:  # none is a number: there is nothing to draw
                continue
            card = cards[facts.name]
            card.remarks = remarks(facts)
            self._add(card, "values", self._artist.values(facts))
            if facts.codes is not None and facts.codes.size <= MOST_CODES:
                self._add(card, "codes in use", self._artist.codes(facts))
        for name, scalars in by_tensor.items():
            if sum(each.quantity == "low" for each in scalars) > 1:
                self._add(cards[name], "ends of the grid over the training", self._artist.training(name, scalars))
        return [card for card in cards.values() if card.figures]

    def _add(self, card: Card, caption: str, figure: str) -> None:
        card.figures.append((caption, self._markup(figure)))


def _heading(title: str) -> Heading:
    columns = ("batch norm", "layer") if title == FOLDED else ("name", "why")
    columns = ("bias", "input") if title.startswith("int32") else columns
    return Heading(title.partition(",")[0].replace(" ", "-"), title[0].upper() + title[1:], columns)


def attention_to(tensors: Sequence[TensorFacts]) -> Iterator[tuple[str, str]]:
    """Yield what is worth a look: a tensor's name, and what is odd about it."""
    for facts in tensors:
        if facts.odd:
            yield facts.name, f"{facts.odd:,} of its values are NaN or infinite"
        if facts.clipped is not None and facts.clipped > CLIPPED:
            yield facts.name, f"{facts.clipped:.1%} of its values are clipped: its threshold may be too small"
        if facts.codes is not None and facts.grid is not None:
            count = len(facts.grid.levels) or facts.codes.size
            if facts.used < UNUSED * count and facts.values.count >= count:
                yield facts.name, f"{facts.used} of {count} codes are in use: its threshold may be too large"


def require_page(path: object) -> Path:
    """Return where a page goes, and refuse what it can't be written to, before any work is done for it.

    Raises
    ------
    DocumentError
        When its name does not end in ``.html`` or ``.htm``, or it can't be written to.
    """
    place = as_path(path)
    if place.suffix.lower() not in {".html", ".htm"}:
        raise DocumentError(place, "a report is an HTML page", "give it a name that ends in .html.")
    require_writable(place)
    return place
