"""A page about a PyTorch model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainable_core.diagnosis.report import Diagnosis
from trainable_core.reporting.contents import SUBJECT
from trainable_core.reporting.report import Asked, report_on
from trainable_torch.description import describe
from trainable_torch.viewing import TorchView


def report(
    qmodel: nn.Module,
    path: str | PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    training: str | PathLike[str] | None = None,
    exported: str | PathLike[str] | None = None,
    diagnosis: Diagnosis | None = None,
    title: str | None = None,
) -> Path:
    """Write a page about a model: what is quantized and what is not, how tensors fit their grids, how it trained.

    Parameters
    ----------
    qmodel : Module
        A wrapped or finalized model.
    path : path
        The page, whose name ends in ``.html``. It is one file that needs no network.
    batches : iterable, optional
        What activations are looked at with, in evaluation mode, as `calibrate` takes them; by default they are not.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.
    training : path, optional
        The CSV file that `track` wrote, to show thresholds over the steps.
    exported : path, optional
        A file that `export` wrote, to show what is computed in integers and what stays float.
    diagnosis : Diagnosis, optional
        What `diagnose` returned, to show what each layer costs and what to do.
    title : str, optional
        What stands at the top; by default the name of the model's class.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ModelError
        When the model is not wrapped, or sharded over ranks.
    DocumentError
        When the page can't be written or its name ends otherwise, or one of the other files is not what it should be.
    CalibrationError
        When the batches are none, or one.
    InvalidArgumentError
        When `diagnosis` or `title` is of a wrong kind.
    MissingLibraryError
        When Matplotlib or Jinja is not installed: the extra ``report`` of trainable-core brings them.

    Notes
    -----
    The model is as it was afterwards. Of each weight at most 262,144 elements are looked at, evenly spread, and as many
    of each activation in every call.
    """
    asked = Asked(batches=batches, training=training, exported=exported, diagnosis=diagnosis, title=title)
    return report_on(TorchView(qmodel, SUBJECT, forward), describe(qmodel), path, asked, {"torch": torch.__version__})
