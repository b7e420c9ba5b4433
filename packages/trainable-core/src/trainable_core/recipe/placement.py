"""Where the quantizer of an output stands: behind the activation function that hardware computes together with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.plan import LayerPlan

MOVED = "quantized after its activation"
"""Reason of a layer without weights whose output's quantizer stands behind the next layer."""

Call = tuple[str, str | None]
"""A call of a layer or functional operation, and the activation function that alone uses its output, if one does."""

Indices = frozenset[int]


def behind_activations(
    recipe: QuantizationRecipe, plans: Sequence[LayerPlan], calls: Iterable[Call]
) -> list[LayerPlan]:
    """Return the plans with the quantizers of outputs moved behind the activations that follow.

    Parameters
    ----------
    recipe : QuantizationRecipe
        What the plans were resolved from.
    plans : sequence of LayerPlan
        Of all layers and functional operations.
    calls : iterable of (str, str or None)
        Every call of each of them that is known: its name, and the name of the activation that is the only user of its
        output; None where there is no such user.

    Returns
    -------
    list of LayerPlan
        The plans of layers that are followed by an activation at every call have no quantizer of the output any more.

    Notes
    -----
    The tensor behind the activation is the output of both. So its quantizer is what the rules for either say, in the
    order of the recipe: as everywhere, later ones win. An activation that is called behind several layers has one
    quantizer. Where the rules for these layers ask for different ones, it is as the activation's own rules say, and the
    layers that ask for another one keep a quantizer of their own, before the activation.
    """
    moving = _Moving(recipe, plans, calls)
    moving.settle()
    return [
        replace(plan, activation=None, reason="" if plan.weights else MOVED)
        if plan.layer.name in moving.moved
        else moving.plan_of(plan)
        for plan in plans
    ]


class _Moving:
    """Which layers' quantizers move, and which rules then hold for the activations."""

    def __init__(self, recipe: QuantizationRecipe, plans: Sequence[LayerPlan], calls: Iterable[Call]) -> None:
        self.recipe = recipe
        self.held = {p.layer.name: p for p in plans if p.activation is not None and p.placement == "outputs"}
        layers = [plan.layer for plan in plans]
        self.rules: dict[str, Indices] = {layer.name: frozenset() for layer in layers}
        for index, matched in enumerate(recipe.matched(layers)):
            for each in matched:
                self.rules[layers[each].name] |= {index}
        clamps = {layer.name for layer in layers if layer.clamps}
        followers: dict[str, list[str | None]] = {}
        for name, after in calls:
            if name in self.held:
                # in integers a layer's output is a code before any function that is more than a clamp of codes
                follows = after in self.held and (after in clamps or not self.held[name].integer)
                followers.setdefault(name, []).append(after if follows else None)
        self.called = Counter({name: len(after) for name, after in followers.items()})
        self.moved: dict[str, Counter[str | None]] = {
            name: Counter(after) for name, after in followers.items() if None not in after
        }
        self._before = self._layers_before()
        self._known: dict[tuple[str, Indices], LayerPlan] = {}

    def _layers_before(self) -> dict[str | None, list[str]]:
        """Return the layers that moved behind each activation."""
        before: dict[str | None, list[str]] = {}
        for name, after in self.moved.items():
            for activation in after:
                before.setdefault(activation, []).append(name)
        return before

    def settle(self) -> None:
        """Leave layers where they are until every activation can have one quantizer for all that it follows."""
        while True:
            stay = {name for name in self.moved if not all(self._fits(name, after) for after in self.moved[name])}
            if not stay:
                return
            for name in stay:
                del self.moved[name]
            self._before = self._layers_before()

    def plan_of(self, plan: LayerPlan) -> LayerPlan:
        """Return an activation's plan by the rules for it and for the layers before it."""
        name = plan.layer.name
        if name not in self.held:
            return plan
        (rules, *others) = self._variants(name, frozenset())
        merged = self._resolved(name, rules)
        return merged if all(self._resolved(name, other) == merged for other in others) else plan

    def _fits(self, name: str, activation: str | None) -> bool:
        """Return whether an activation's quantizer is what the rules for a layer before it ask for."""
        assert activation is not None  # noqa: S101 - `moved` has no other
        final = self.plan_of(self.held[activation])
        reached = self._variants(name, frozenset({activation}))
        own = self.rules[activation]
        return all(self._resolved(activation, rules | own) == final for rules in reached)

    def _variants(self, name: str, seen: frozenset[str]) -> set[Indices]:
        """Return the rules that hold for what a layer gives, for each way that leads to it through what moved."""
        own = self.rules[name]
        before = [layer for layer in self._before.get(name, ()) if layer != name and layer not in seen]
        found = {rules | own for layer in before for rules in self._variants(layer, seen | {name})}
        if sum(self.moved[layer][name] for layer in before) < self.called[name] or not found:
            found.add(own)
        return found

    def _resolved(self, name: str, rules: Indices) -> LayerPlan:
        if rules == self.rules[name]:
            return self.held[name]
        if (name, rules) not in self._known:
            chosen = [self.recipe.rules[index] for index in sorted(rules)]
            self._known[name, rules] = self.recipe.plan_of(self.held[name].layer, chosen)
        return self._known[name, rules]
