"""A page about a Keras model, whichever Keras it is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from trainable_core.backend.view import Forward
from trainable_core.reporting.report import Asked, report_on
from trainable_keras.description import describe
from trainable_keras.framework import Framework
from trainable_keras.viewing import KerasView


def report(framework: Framework, qmodel: Any, path: object, asked: Asked, forward: Forward | None) -> Path:
    """Write a page about a model; see `trainable_keras.report`."""
    library = framework.module.__name__.partition(".")[0]
    versions = {library: str(import_module(library).__version__)}
    return report_on(KerasView(framework, qmodel, forward), describe(framework, qmodel), path, asked, versions)
