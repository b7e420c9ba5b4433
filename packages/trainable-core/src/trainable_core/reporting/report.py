"""The report on a model: from what the arguments are to a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainable_core import __version__
from trainable_core.backend.description import Description
from trainable_core.backend.view import ModelView
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.errors import InvalidArgumentError
from trainable_core.reporting.contents import SUBJECT, Contents, Islands, gathered, overview
from trainable_core.reporting.files import islands_of
from trainable_core.reporting.page import Page, require_page
from trainable_core.tracking.writers import Scalar, read_csv


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the verb `report` of a backend is asked for; see there.

    Parameters
    ----------
    batches : iterable, optional
        What activations are looked at with.
    training : path, optional
        What `track` wrote.
    exported : path, optional
        What `export` wrote.
    diagnosis : Diagnosis, optional
        What `diagnose` said.
    title : str, optional
        What stands at the top.
    """

    batches: Iterable[Any] | None = None
    training: object = None
    exported: object = None
    diagnosis: Diagnosis | None = None
    title: str | None = None


def report_on(
    view: ModelView, description: Description, path: object, asked: Asked, versions: Mapping[str, str]
) -> Path:
    """Write the report on a model; everything that can be refused is refused before the model is called.

    Parameters
    ----------
    view : ModelView
        The model.
    description : Description
        What `describe` says of it.
    path : path
        The page.
    asked : Asked
        What is to be in it.
    versions : mapping of str to str
        Of the libraries that the model is made with.
    """
    place = require_page(path)
    page = _page(asked.diagnosis, asked.title)
    scalars: list[Scalar] = [] if asked.training is None else read_csv(asked.training)
    islands: Islands | None = None if asked.exported is None else islands_of(asked.exported)
    tensors = gathered(view, asked.batches)
    name = type(view.model).__name__
    told = ", ".join(f"{library} {version}" for library, version in versions.items())
    facts = {**overview(description), "made with": f"trainable {__version__}, {told}"}
    title = asked.title or f"Quantization of {name}"
    contents = Contents(title, facts, description, tensors, scalars, islands, asked.diagnosis)
    return page.write(contents, place)


def _page(diagnosis: object, title: object) -> Page:
    if diagnosis is not None and not isinstance(diagnosis, Diagnosis):
        problem = f"diagnosis must be what `diagnose` returned, got {type(diagnosis).__name__}"
        raise InvalidArgumentError(SUBJECT, problem)
    if title is not None and not isinstance(title, str):
        raise InvalidArgumentError(SUBJECT, f"title must be text, got {title!r}")
    return Page()
