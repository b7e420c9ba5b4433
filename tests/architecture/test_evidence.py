"""benchmarks/evidence: what its cells ask for, how its page is read, and that the page is made of the results."""

import json
import sys
from pathlib import Path

import pytest

from trainable_core import QuantizationRecipe
from trainable_core.registry.methods import built_in_methods

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/evidence"


@pytest.fixture(scope="module")
def evidence():
    """Return the modules that need no framework."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    sys.path.insert(0, str(FOLDER))
    try:
        import cells
        import page
    finally:
        sys.path.remove(str(FOLDER))
    return cells, page


def records(evidence, **scores):
    """Return records of PyTorch's CNN at W2A2: for each method its scores, a seed each."""
    cells, _ = evidence
    made = {
        cells.Cell("torch", "cnn", "W2A2", method, seed, cells.ROWS[method].qparams): value
        for method, values in scores.items()
        for seed, value in enumerate(values)
    }
    return {cell: {"score": value, "seconds": 1.0} for cell, value in made.items()}


def test_every_cell_has_a_recipe_with_first_and_last_layers_of_eight_bits(evidence):
    cells, _ = evidence
    found = cells.cells(range(1))
    assert len(set(map(str, found))) == len(found)
    for cell in found:
        if cell.method == cells.FLOAT:
            continue
        recipe = QuantizationRecipe.model_validate(cells.recipe(cell))
        setting = cells.SETTINGS[cell.setting]
        assert recipe.weights.n_bits == setting.weights
        assert (recipe.activations and recipe.activations.n_bits) == setting.activations
        assert recipe.rules
        for rule in recipe.rules:
            for section in (rule.weights, rule.activations):
                assert not section or section["n_bits"] == 8


def test_schedules_end_with_the_training(evidence):
    cells, _ = evidence
    cell = next(each for each in cells.cells() if each.method == "LSQ freezing")
    threshold = cells.recipe(cell)["weights"]["modifiers"]["oscillation_freezing"]["threshold"]
    assert (threshold["t_start"], threshold["t_end"]) == (cell.problem.steps // 4, cell.problem.steps)


def test_every_method_is_measured_but_the_one_that_chooses_its_width(evidence):
    cells, _ = evidence
    rows = [section for row in cells.ROWS.values() for section in (row.weights, row.activations)]
    assert {section.get("training_method", "LSQ") for section in rows} == set(built_in_methods()) - {"DQA"}


def test_a_method_that_gains_more_than_two_standard_errors_is_clearly_better(evidence):
    _, page = evidence
    found = records(evidence, LSQ=[92.0, 93.0, 94.0], STE=[91.0, 92.0, 93.1])
    assert "| clearly: +0.967 ± 0.033 points, 3 seeds |" in page.expectations(found)
    found = records(evidence, LSQ=[92.0, 93.0, 90.0], STE=[91.0, 92.0, 91.9])
    assert "| not clearly: +0.033 ± 0.967 points, 3 seeds |" in page.expectations(found)
    found = records(evidence, LSQ=[91.0, 92.0], STE=[92.0, 93.0])
    assert "| **no**: -1.000 ± 0.000 points, 2 seeds |" in page.expectations(found)


def test_frameworks_are_compared_where_they_began_with_the_same_float_model(evidence):
    cells, page = evidence
    scores = {"torch": [90.0, 91.0, 60.0], "keras": [90.5, 91.5, 92.0]}
    found = {
        cells.Cell(framework, "cnn", "W2A2", "LSQ", seed, cells.ROWS["LSQ"].qparams): {
            "score": score,
            "seconds": 1.0,
            "float": framework if seed == 2 else "the same",
        }
        for framework, values in scores.items()
        for seed, score in enumerate(values)
    }
    assert page.agreement(found).endswith("within one standard deviation in 1 of 1 entries.")  # of two seeds
    found = {cell: {**record, "float": cell.framework} for cell, record in found.items()}
    assert page.agreement(found) == "PyTorch and Keras are not compared yet."


def test_an_entry_says_how_many_seeds_it_has(evidence):
    _, page = evidence
    assert page.entry(dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0])), 1) == "3.0 ± 1.6"
    assert page.entry({0: 1.0, 3: 3.0}, 1) == "2.0 ± 1.4 (2)"
    assert page.entry({}, 1) == ""


def test_the_page_is_made_of_the_results(evidence):
    cells, page = evidence
    lines = (ROOT / "benchmarks/results/evidence.jsonl").read_text(encoding="utf-8").splitlines()
    found = {cells.cell_of(record): record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    generated = text.partition(page.BEGIN)[2].partition(page.END)[0].strip()
    assert generated == page.text(found)
