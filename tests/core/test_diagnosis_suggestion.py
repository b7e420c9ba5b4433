"""Which widths are suggested, and what they are said to cost: on models of NumPy arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.core.home_view import HomeView
from trainable_core.diagnosis.objective import Objective
from trainable_core.diagnosis.suggestion import Suggestion, suggest
from trainable_core.recipe.document import QuantizationRecipe

pytest.importorskip("scipy")

CANDIDATES = {"weights_quantization_candidates": [{"n_bits": 2}, {"n_bits": 5}]}


class Errors(HomeView):
    """Layers whose weights are the same; what a call returns is made of the error of each, relative to its weight."""

    def __init__(self, combine: Callable[[list[float]], float], *names: str, **options: Any) -> None:
        super().__init__(**options)
        self.combine = combine
        layers = [HomeView(**options).tensors()[0] for _ in names]
        self._tensors = tuple(
            replace(each, layer=replace(each.layer, name=name)) for each, name in zip(layers, names, strict=True)
        )

    def call(self, batch: Any) -> Any:
        """Return the errors in one number."""
        if self.layers is not None and not self.layers:
            return 0.0
        made = [self.replaced.get(each, self.quantized(each)) for each in self.tensors()]
        return self.combine([float(np.abs(each - self.weight).mean()) for each in made])


def suggested(view: HomeView, budget: Any, widths: Any = (2, 4, 8)) -> Suggestion:
    metric = Objective(lambda outputs, _: outputs, axis=-1, greater_is_better=False)
    return suggest(
        view,
        [np.zeros(1, np.float32)],
        budget,
        teacher=None,
        widths=widths,
        objective=metric,
        show_progress=lambda _: nullcontext(SimpleNamespace(update=lambda count: count)),
    )


def test_costs_that_add_up_are_predicted_exactly() -> None:
    view = Errors(sum, "a", "b", n_bits=2)
    found = suggested(view, 8)
    errors = [row.added[8] + found.present / 2 for row in found.rows]
    assert found.widths == {"a": 8, "b": 8}
    assert found.predicted == pytest.approx(sum(errors))
    assert found.uniform[8] == found.predicted > 0


def test_no_negative_cost_is_predicted_where_savings_overlap() -> None:
    found = suggested(Errors(math.prod, "a", "b", "c", n_bits=2), 8)
    assert sum(row.added[8] for row in found.rows) < -found.present  # one layer of 8 bits saves nearly all
    assert (found.predicted, found.uniform[8]) == (0.0, 0.0)


def test_a_cost_below_that_of_the_float_model_is_predicted_as_far_as_it_was_measured() -> None:
    found = suggested(Errors(lambda errors: sum(errors) - 1, "a", "b", n_bits=2), 8)
    assert found.predicted == pytest.approx(found.present + found.rows[0].added[8])
    assert found.predicted < 0


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_makes_an_infinite_cost_finite_is_chosen(odd: float) -> None:
    def worst(errors: list[float]) -> float:
        return odd if max(errors) > 0.2 else sum(errors)  # of 2 bits 0.58, of 4 bits 0.03

    (row,) = (found := suggested(Errors(worst, "a", n_bits=2, threshold=(1.0, 4.0)), 4)).rows
    assert (found.present, row.n_bits) == (math.inf, 4)
    assert found.predicted == row.added[4] < 0.2
    both = suggested(Errors(worst, "a", "b", n_bits=2, threshold=(1.0, 4.0)), 4)
    assert both.predicted == math.inf  # neither layer alone is enough
    assert json.loads(both.to_json())["predicted"] is None


def test_a_width_that_the_method_chooses_is_left_to_it() -> None:
    found = suggested(Errors(sum, "a", "b", threshold=(1.0, 2.0), n_bits=2, **CANDIDATES), 8, widths=(3, 6))
    assert [(row.n_bits, row.fixed, set(row.added)) for row in found.rows] == [(5, True, {5})] * 2
    assert found.rules == []
    assert found.recipe == QuantizationRecipe.model_validate(found.to_dict()["recipe"])


def test_the_view_says_which_widths_a_method_chooses_among() -> None:
    weight, of_input = HomeView(**CANDIDATES).tensors()
    assert (weight.candidates, of_input.candidates, weight.n_bits) == ((2, 5), (), 5)
