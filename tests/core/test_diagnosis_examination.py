"""What a diagnosis measures: on a model of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.core.home_view import HomeView
from trainable_core.backend.view import VariableKey
from trainable_core.diagnosis.examination import diagnose, scale_to
from trainable_core.diagnosis.objective import Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.qparams import Float32

X = np.random.default_rng(0).uniform(-2, 2, 64).astype(np.float32)


class Half(HomeView):
    """A model whose gradients are float16 on their way; `gain` is what they are multiplied with there."""

    gain = 1.0

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Float32], Float32]
    ) -> Mapping[VariableKey, Float32 | None]:
        """Return slopes for an upstream gradient that was float16."""

        def of_half(values: Float32) -> Float32:
            with np.errstate(over="ignore"):
                return np.float32(np.float16(np.float16(upstream(values)) * np.float16(self.gain)))

        with np.errstate(invalid="ignore"):
            return super().gradients(batch, variables, of_half)


def diagnosed(view: HomeView, x: Float32 = X) -> Diagnosis:
    return diagnose(
        view,
        [x],
        teacher=None,
        objective=Objective("mse", axis=-1, greater_is_better=False),
        gradients=True,
        show_progress=lambda _: nullcontext(SimpleNamespace(update=lambda count: count)),
    )


def gradients(found: Diagnosis) -> list[float | None]:
    return [each.gradient for each in found.variables]


def test_the_cost_is_that_of_the_quantized_model() -> None:
    view = HomeView()
    found = diagnosed(view)
    with view.quantizing(()):
        reference = view.call(X)
    assert found.total == pytest.approx(np.square(view.call(X) - reference).sum() / np.square(reference).sum())
    (layer,) = found.layers
    assert layer.alone == layer.within == found.total
    assert [each.name for each in found.quantizers] == ["fc.weight", "fc: input"]
    assert len(gradients(found)) == 3  # a threshold and two ends
    assert all(gradients(found))


def test_gradients_that_underflow_are_found_by_a_larger_upstream_gradient() -> None:
    x = np.tile(X, 64)
    exact = gradients(diagnosed(HomeView(), x))
    view = Half()
    view.gain = 2.0**-16  # of gradients below 1e-3, of which float16, whose least number is 2**-24, has nothing left
    with np.errstate(under="ignore"):
        found = gradients(diagnosed(view, x))
    # scaled to 1, the largest has 8 significant bits, and many that are smaller cancel out
    assert found == [pytest.approx(view.gain * each, rel=5e-2) for each in exact if each is not None]


def test_a_gradient_that_is_zero_stays_zero() -> None:
    view = Half()
    view.gain = 0.0
    assert gradients(diagnosed(view)) == [0.0] * 3


def test_gradients_that_are_never_finite_are_told() -> None:
    view = Half()
    view.gain = np.nan
    found = diagnosed(view)
    assert np.isnan(np.asarray(gradients(found), np.float64)).all()
    assert any("not finite" in each.sentence for each in found.findings if each.kind == "gradient")


def test_a_gradient_is_scaled_by_a_power_of_two() -> None:
    for largest in (1e-30, 0.75, 3e4):
        scale = scale_to(np.float32([0.1 * largest, -largest]), 4)
        assert np.frexp(scale)[0] == 0.5
        assert 8 <= scale * largest < 16
    assert [scale_to(np.float32(odd), 4) for odd in ([], [0.0], [np.inf], [np.nan])] == [1.0] * 4
