"""What is known of a wrapped model: on the model, and found again for its parts and for what holds it.

Layers move after `wrap`: adapters are merged into them, a backbone is taken out of its model, a head is exchanged. Each
module remembers its name from when it was wrapped, so what was noted then is found by the module and not by its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from trainable_core.errors import ModelError
from trainable_core.recipe.plan import LayerPlan
from trainable_core.recipe.state import WrappedState
from trainable_torch.reading import MARK, ORIGIN, Membership

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""


def keep(model: nn.Module, state: WrappedState) -> None:
    """Note the state of a model that has just been wrapped and marked."""
    setattr(model, STATE, state)
    vars(model)[MARK].state = state


def state_of(model: nn.Module) -> WrappedState:
    """Return what `wrap` noted on a model; of a part of it, or of a model that holds it, what concerns that one.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, holds several that were, or is a part whose functional operations have
        quantizers that belong to the whole.
    """
    if isinstance(model, nn.Module):
        state = vars(model).get(STATE)
        if isinstance(state, WrappedState):
            return state
        found = {each for module in model.modules() if (each := vars(module).get(MARK)) is not None and each.state}
        if len(found) == 1:
            state = _state_here(model, found.pop())
            setattr(model, STATE, state)
            return state
        if found:
            problem = f"{type(model).__name__} holds {len(found)} models that were wrapped by themselves"
            raise ModelError(problem, "call this for each of them, or wrap the whole.")
    raise ModelError(
        f"{type(model).__name__} was not made by trainable_torch.wrap", "qmodel = trainable_torch.wrap(model, recipe)."
    )


def present_state(model: nn.Module) -> WrappedState:
    """Return the state of a model under the names that its modules have now."""
    state, membership = state_of(model), vars(model).get(MARK)
    if membership is None or membership.state is not state:
        return state
    return _state_here(model, membership)


def plan_of(name: str, layer: nn.Module) -> LayerPlan:
    """Return the plan of a wrapped layer, which has this name now."""
    own = vars(layer)
    plan: LayerPlan = own[MARK].state.plans[own[ORIGIN] or "model"]
    return plan if plan.layer.name == name else replace(plan, layer=replace(plan.layer, name=name))


def added_layers(model: nn.Module) -> set[nn.Module]:
    """Return the modules that were put into a model after it was wrapped."""
    found = (module for module in model.modules() if MARK not in vars(module))
    return {module for module in found if not isinstance(module, torch.jit.ScriptModule)}  # those have no marks


def _state_here(model: nn.Module, membership: Membership) -> WrappedState:
    """Return the state of a model, or of what was made of one, under the present names."""
    whole = membership.state
    assert whole is not None  # noqa: S101 - who calls this has looked
    names: dict[str, str] = {}
    for name, module in model.named_modules():
        if vars(module).get(MARK) is membership:
            names.setdefault(vars(module)[ORIGIN], name)
    if "" not in names and whole.structure.get("operations"):
        problem = f"{type(model).__name__} is a part of a model with quantized functional operations"
        raise ModelError(problem, "call this for the whole model, or wrap the part by itself.")
    if names.keys() == membership.names and all(old == new for old, new in names.items()):
        return whole
    plans = {
        names.get(name, name): plan
        for name, plan in whole.plans.items()
        if name in names or name not in membership.names
    }
    return replace(
        whole,
        plans={name: replace(plan, layer=replace(plan.layer, name=name)) for name, plan in plans.items()},
        left_out=_renamed(whole.left_out, names, membership),
        folded={names[norm]: names[layer] for norm, layer in whole.folded.items() if norm in names and layer in names},
        foldable={
            names[norm]: names[layer] for norm, layer in whole.foldable.items() if norm in names and layer in names
        },
        biases=_renamed(whole.biases, names, membership),
        islands=_renamed(whole.islands, names, membership),
        origins={new or "model": old or "model" for old, new in names.items()},
    )


def _renamed(left_out: Mapping[str, str], names: Mapping[str, str], membership: Membership) -> dict[str, str]:
    """Return reasons under new names, without those of modules that are not there any more."""
    found = {}
    for key, reason in left_out.items():
        ends = [at for at in range(len(key), 0, -1) if at == len(key) or key[at] in ".:"]
        end = next((at for at in ends if key[:at] in membership.names), 0)
        if key[:end] in names:
            found[f"{names[key[:end]]}{key[end:]}" if end else key] = reason
    return found
