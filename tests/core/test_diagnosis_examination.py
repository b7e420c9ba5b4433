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


@pytest.mark.parametrize("gain", [1.0, 2.0**12, 2.0**-12], ids=["1", "large", "small"])
def test_gradients_survive_half_precision(gain: float) -> None:
    x = np.tile(X, 2**10)  # each element's gradient is about 1e-6, 2**-24 being the smallest float16
    exact = gradients(diagnosed(HomeView(), x))
    view = Half()
    view.gain = gain
    found = gradients(diagnosed(view, x))
    # 11 significant bits for each of the elements that a gradient is the sum of, many of which cancel out
    assert found == [pytest.approx(gain * each, rel=2e-2) for each in exact if each is not None]


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
