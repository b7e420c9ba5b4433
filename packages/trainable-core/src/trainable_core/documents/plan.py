"""What a wrapped model knows about itself, and the plan of one of its layers, as JSON-clean documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from trainable_core.config import StrictBool, config_document, config_from_document
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.sections import Section
from trainable_core.recipe.state import WrappedState


def _quantizer_document(plan: QuantizerPlan) -> dict[str, Any]:
    document = {
        "config": config_document(plan.config),
        "training_method": plan.training_method,
        "arguments": dict(plan.arguments),
    }
    return {**document, "modifiers": {**plan.modifiers}} if plan.modifiers else document


class _Quantizer(Section):
    config: dict[str, Any]
    training_method: str
    arguments: dict[str, Any]
    modifiers: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def plan(self) -> QuantizerPlan:
        config = config_from_document(self.config, "a quantizer's plan")
        return QuantizerPlan(config, self.training_method, self.arguments, self.modifiers)


class _Weight(Section):
    shape: list[int]
    channels_axis: int
    inputs_axis: int | None = None
    experts_axis: int | None = None

    def info(self) -> WeightInfo:
        return WeightInfo(tuple(self.shape), self.channels_axis, self.inputs_axis, self.experts_axis)


class _Layer(Section):
    name: str
    op: str
    weights_info: dict[str, _Weight]
    weights: dict[str, _Quantizer]
    activation: _Quantizer | None
    placement: Literal["inputs", "outputs"]
    reason: str

    def plan(self) -> LayerPlan:
        infos = {name: weight.info() for name, weight in self.weights_info.items()}
        weights = {attribute: quantizer.plan() for attribute, quantizer in self.weights.items()}
        activation = None if self.activation is None else self.activation.plan()
        return LayerPlan(LayerInfo(self.name, self.op, infos), weights, activation, self.placement, self.reason)


class _State(Section):
    recipe: dict[str, Any]
    plans: list[_Layer]
    left_out: dict[str, str]
    folded: dict[str, str]
    finalized: StrictBool
    structure: dict[str, Any] = Field(default_factory=dict)
    foldable: dict[str, str] = Field(default_factory=dict)


def plan_document(plan: LayerPlan) -> dict[str, Any]:
    """Return a layer's plan as a JSON-clean document."""
    return {
        "name": plan.layer.name,
        "op": plan.layer.op,
        "weights_info": {
            attribute: {**asdict(info), "shape": list(info.shape)} for attribute, info in plan.layer.weights.items()
        },
        "weights": {attribute: _quantizer_document(each) for attribute, each in plan.weights.items()},
        "activation": None if plan.activation is None else _quantizer_document(plan.activation),
        "placement": plan.placement,
        "reason": plan.reason,
    }


def plan_from_document(document: Mapping[str, Any]) -> LayerPlan:
    """Return the plan that `plan_document` was called on.

    Raises
    ------
    InvalidArgumentError, pydantic.ValidationError
        When it is not such a document; names the field.
    """
    return _Layer.model_validate(document).plan()


def state_document(state: WrappedState) -> dict[str, Any]:
    """Return what a wrapped model knows about itself as a JSON-clean document."""
    document = {
        "recipe": state.recipe.model_dump(mode="json", exclude_unset=True),
        "plans": [plan_document(plan) for plan in state.plans.values()],
        "left_out": dict(state.left_out),
        "folded": dict(state.folded),
        "finalized": state.finalized,
        "structure": dict(state.structure),
    }
    return {**document, "foldable": dict(state.foldable)} if state.foldable else document


def state_from_document(document: Mapping[str, Any]) -> WrappedState:
    """Return the state that `state_document` was called on.

    Raises
    ------
    InvalidArgumentError, pydantic.ValidationError
        When it is not such a document; names the field.
    """
    state = _State.model_validate(document)
    plans = [layer.plan() for layer in state.plans]
    return WrappedState(
        QuantizationRecipe.model_validate(state.recipe),
        {plan.layer.name: plan for plan in plans},
        state.left_out,
        state.folded,
        finalized=state.finalized,
        structure=state.structure,
        foldable=state.foldable,
    )
