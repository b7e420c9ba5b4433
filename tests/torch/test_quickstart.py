"""examples/quickstart_torch.py, run as a reader would run it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_DATA = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the quickstart's digits are scikit-learn's"
)
FIGURES = {
    "float_accuracy",
    "calibrated_accuracy",
    "trained_accuracy",
    "deployed_accuracy",
    "max_abs_difference",
    "seed",
}


def quickstart(folder, *options):
    command = [sys.executable, str(EXAMPLES / "quickstart_torch.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return folder, outcome and figures of one run with every option; training in float takes most of its time."""
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = EXAMPLES / "recipes" / "w2a4_lsq.yaml"
    outcome = quickstart(folder, "--epochs", "2", "--seed", "1", "--out", "figures.json", "--recipe", str(recipe))
    assert outcome.returncode == 0, outcome.stderr
    return folder, outcome, json.loads((folder / "figures.json").read_text(encoding="utf-8"))


@NEEDS_DATA
def test_the_figures_are_complete(run):
    _, _, figures = run
    assert figures.keys() == FIGURES
    assert figures["seed"] == 1


@NEEDS_DATA
def test_the_deployed_model_is_bit_for_bit_the_trained_one(run):
    _, _, figures = run
    assert figures["max_abs_difference"] == 0.0
    assert figures["deployed_accuracy"] == figures["trained_accuracy"]


@NEEDS_DATA
def test_the_models_have_learned(run):
    """Float: five seeds gave 97.7 % in the mean; of 450 images, two standard deviations are 1.4 %."""
    _, _, figures = run
    assert figures["float_accuracy"] > 0.977 - 0.014
    # chance is 10 %; two epochs of 25 bring 2-bit weights above what calibration alone gives
    assert figures["trained_accuracy"] > max(0.8, figures["calibrated_accuracy"])


@NEEDS_DATA
def test_the_recipe_that_was_asked_for_is_used_and_the_report_says_so(run):
    folder, outcome, figures = run
    rows = [line.split() for line in outcome.stdout.splitlines() if line.endswith("deployed")]
    assert len(rows) == 8
    weights = [row for row in rows if row[1] == "weight"]
    assert all("2" in row and "LSQ" in row for row in weights)
    assert {row[0] for row in weights} == {"stem.conv", "body1.conv", "body2.conv", "head"}
    assert f"{figures['float_accuracy']:.4f}" in outcome.stdout
    assert "figures.json written" in outcome.stdout
    assert [path.name for path in folder.iterdir()] == ["figures.json"]
    assert outcome.stderr == ""  # no warning, and no progress bar where no terminal is


@NEEDS_DATA
def test_it_explains_itself(tmp_path):
    outcome = quickstart(tmp_path, "--help")
    assert outcome.returncode == 0
    assert all(option in outcome.stdout for option in ("--recipe", "--epochs", "--seed", "--out"))


@NEEDS_DATA
@pytest.mark.parametrize("options", [("--epoch", "x"), ("--seed", "1.5"), ("--model", "big")])
def test_a_wrong_option_is_told_before_anything_is_trained(options, tmp_path):
    outcome = quickstart(tmp_path, *options)
    assert outcome.returncode == 2
    assert "usage" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_examples_is_valid(path):
    from trainable_core import QuantizationRecipe

    assert QuantizationRecipe.of(path).weights is not None
