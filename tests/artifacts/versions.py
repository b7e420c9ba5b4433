"""Which versions wrote artifacts, and reading what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts.quantizers import TENSOR
from trainable_core import get_trainable_quantizer_class

FOLDER = Path(__file__).parent
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.name[0].isdigit())
every_version = pytest.mark.parametrize("version", VERSIONS)


def document(version: str, part: str, name: str) -> Any:
    """Return what a JSON file holds."""
    return json.loads((FOLDER / version / part / f"{name}.json").read_text(encoding="utf-8"))


def check_quantizers(version: str, backend: str, run: Callable[[Any, Any], Any]) -> None:
    """Require that every quantizer is made again from its document and gives the stored output, bit for bit."""
    found = document(version, backend, "quantizers")
    methods = {training_method for _, training_method, _ in (each["key"] for each in found)}
    assert methods >= {"STE", "LSQ", "DQA"}
    for each in found:
        target, training_method, method = each["key"]
        cls = get_trainable_quantizer_class(target, training_method, method, backend=backend)
        quantizer = cls.from_config(each["config"])
        np.testing.assert_array_equal(run(quantizer, TENSOR), np.float32(each["output"]), err_msg=str(each["key"]))
        again = cls.from_config(json.loads(json.dumps(quantizer.get_config())))
        np.testing.assert_array_equal(run(again, TENSOR), np.float32(each["output"]), err_msg=str(each["key"]))
