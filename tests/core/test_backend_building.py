"""From a plan to the quantizer it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.core.home_backend import (
    HomeActivation,
    HomeWeights,
    WarmWeights,
    activation_config,
    weights_config,
    weights_quantizer,
)
from trainable_core import hookimpl
from trainable_core.backend.building import build_quantizer, require_calibrated, require_quantizer
from trainable_core.enums import QuantizationTarget, TieRule
from trainable_core.errors import (
    InvalidArgumentError,
    QuantizerDefinitionError,
    QuantizerStateError,
    UnknownBackendError,
    UnknownQuantizerError,
)
from trainable_core.hookspecs import Backend
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.plan import QuantizerPlan
from trainable_core.registry.process import default_registry, register


class HomePlugin:
    """The backend ``home`` and its quantizers."""

    @staticmethod
    @hookimpl
    def trainable_register_backend() -> Backend:
        """Describe the backend."""
        return Backend("home", "trainable-home", ("numpy",), TieRule.HALF_EVEN, "home")

    @staticmethod
    @hookimpl
    def trainable_register_quantizers(backend: str) -> list[type]:
        """Return its quantizers."""
        return [HomeWeights, HomeActivation, WarmWeights] if backend == "home" else []


@pytest.fixture(autouse=True)
def _home() -> Iterator[None]:
    register(HomePlugin(), "home")
    yield
    default_registry().unregister("home")


def build(
    plan: QuantizerPlan, base: type[BaseTrainableQuantizer] = BaseTrainableQuantizer, backend: str = "home"
) -> Any:
    """Return the plan's quantizer, called ``fc.weight``."""
    return build_quantizer(plan, backend, base, "fc.weight")


def test_target_method_and_training_method_choose_the_class():
    assert type(build(QuantizerPlan(weights_config(), "HOME"))) is HomeWeights
    assert type(build(QuantizerPlan(weights_config(method="UNIFORM"), "WARM"))) is WarmWeights
    assert type(build(QuantizerPlan(activation_config(), "HOME"))) is HomeActivation


def test_the_quantizer_holds_config_and_name():
    plan = QuantizerPlan(weights_config(n_bits=3), "HOME")
    quantizer = build(plan)
    assert quantizer.quantization_config is plan.config
    assert quantizer.subject == "fc.weight"


def test_arguments_reach_the_class():
    quantizer = build(QuantizerPlan(weights_config(), "WARM", {"temperature": 0.5, "freeze_quant_params": True}))
    assert (quantizer.temperature, quantizer.freeze_quant_params) == (0.5, True)


@pytest.mark.parametrize("argument", ["temprature", "quantization_config", "self"])
def test_an_argument_the_class_does_not_take_is_named_with_those_it_does(argument: str):
    with pytest.raises(InvalidArgumentError, match=rf"fc\.weight: arguments\.{argument}.*temperature"):
        build(QuantizerPlan(weights_config(), "WARM", {argument: 1}))


def test_a_training_method_nobody_has_is_refused_with_the_nearest():
    with pytest.raises(UnknownQuantizerError, match=r"home/Weights/WORM/SYMMETRIC(.|\n)*'WARM'"):
        build(QuantizerPlan(weights_config(), "WORM"))


def test_a_backend_nobody_has_is_refused_with_those_there_are():
    with pytest.raises(UnknownBackendError, match=r"'hoem'(.|\n)*'home'"):
        build(QuantizerPlan(weights_config(), "HOME"), backend="hoem")


def test_a_class_of_another_base_is_refused():
    class Elsewhere(BaseTrainableQuantizer):
        """Another backend's base."""

    with pytest.raises(QuantizerDefinitionError, match=r"HomeWeights(.|\n)*Elsewhere"):
        build(QuantizerPlan(weights_config(), "HOME"), Elsewhere)


def test_quantizers_without_numbers_are_named_and_those_switched_off_are_not():
    off = weights_quantizer(weights_config(enable_weights_quantization=False))
    ready = weights_quantizer(weights_config({"threshold": 1.0}))
    waiting = weights_quantizer(weights_config())
    require_calibrated([off, ready], "Model", "trainable_home")
    with pytest.raises(QuantizerStateError, match=r"(?s)Model: not calibrated: fc\.weight.*trainable_home\.calibrate"):
        require_calibrated([off, ready, waiting], "Model", "trainable_home")


def test_what_a_wrapper_or_holder_needs_is_a_quantizer_for_its_target():
    weights = weights_quantizer(weights_config())
    require_quantizer(weights, QuantizationTarget.Weights, "it")
    for wrong, target in ((None, QuantizationTarget.Weights), (weights, QuantizationTarget.Activation)):
        with pytest.raises(InvalidArgumentError, match="it"):
            require_quantizer(wrong, target, "it")
