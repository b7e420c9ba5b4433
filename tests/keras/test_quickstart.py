"""examples/quickstart_keras.py, run as a reader would run it, beside the PyTorch one."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.keras.framework import ENGINE

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_DATA = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the quickstart's digits are scikit-learn's"
)


def quickstart(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "quickstart_keras.py"), *options]
    environment = {**os.environ, "KERAS_BACKEND": ENGINE, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False, env=environment
    )


def dictionary_keys(example: str) -> set[str]:
    """Return the keys of the figures that an example writes, read from its source."""
    tree = ast.parse((EXAMPLES / example).read_text(encoding="utf-8"))
    (figures,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "figures"
    ]
    return {key.value for key in figures.keys}


def options(example: str) -> dict[str, Any]:
    """Return the options of an example with what they default to, read from its source."""
    tree = ast.parse((EXAMPLES / example).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)]
    defaults = {
        call.args[0].value: {word.arg: ast.unparse(word.value) for word in call.keywords}["default"] for call in calls
    }
    return {name: default for name, default in defaults.items() if name != "--out"}


def test_figures_and_options_are_those_of_the_pytorch_example() -> None:
    assert dictionary_keys("quickstart_keras.py") == dictionary_keys("quickstart_torch.py")
    assert options("quickstart_keras.py") == options("quickstart_torch.py")
    assert {"--recipe", "--epochs", "--seed"} == set(options("quickstart_keras.py"))


@NEEDS_DATA
def test_a_run_learns_and_deploys_what_it_trained(tmp_path: Path) -> None:
    recipe = EXAMPLES / "recipes" / "w2a4_lsq.yaml"
    outcome = quickstart(tmp_path, "--epochs", "2", "--seed", "1", "--out", "figures.json", "--recipe", str(recipe))
    assert outcome.returncode == 0, outcome.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures.keys() == dictionary_keys("quickstart_torch.py")
    assert figures["seed"] == 1
    assert figures["max_abs_difference"] == 0.0
    assert figures["deployed_accuracy"] == figures["trained_accuracy"]
    # ten runs gave 97.2 % in float in the mean; of 450 images, three standard deviations are 2.3 %
    assert figures["float_accuracy"] > 0.972 - 0.023
    # chance is 10 %; two epochs of 25 bring 2-bit weights above what calibration alone gives
    assert figures["trained_accuracy"] > max(0.8, figures["calibrated_accuracy"])
    rows = [line.split() for line in outcome.stdout.splitlines() if line.endswith("deployed")]
    weights = [row for row in rows if row[1] == "kernel"]
    assert len(rows) == 8
    assert all("2" in row and "LSQ" in row for row in weights)
    assert {row[0] for row in weights} == {"stem.conv", "body1.conv", "body2.conv", "head"}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@NEEDS_DATA
@pytest.mark.parametrize("wrong", [("--epoch", "x"), ("--model", "big")])
def test_a_wrong_option_is_told_before_anything_is_trained(wrong: tuple[str, str], tmp_path: Path) -> None:
    outcome = quickstart(tmp_path, *wrong)
    assert outcome.returncode == 2
    assert "usage" in outcome.stderr
    assert list(tmp_path.iterdir()) == []
