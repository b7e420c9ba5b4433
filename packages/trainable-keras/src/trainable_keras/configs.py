"""What a layer's config tells of the layers inside it, and how a layer that was read becomes what it was."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from trainable_core.errors import ModelError
from trainable_keras.batch_norm import Simulated, Simulation, told_of_norm
from trainable_keras.graph import structure
from trainable_keras.parts import KerasHolder, KerasWrapper, own_config
from trainable_keras.two_classes import (
    PENDING,
    Composite,
    Kit,
    Passing,
    add_class,
    as_its_own_class,
    own_class,
    plainly,
)

BIASED = "_trainable_biased"
"""Attribute of a layer that got a bias when a batch norm was folded into it."""

NOTHING: dict[str, Any] = {"parts": {}, "biased": [], "passing": [], "simulated": {}, "composites": []}


class ConfigKit(Kit):
    """The part of a kit that both versions of Keras share."""

    composite: ClassVar[type[Any]]
    """Its class of layers with quantized layers inside."""

    passing: ClassVar[type[Any]]
    """Its class of batch norms that are folded."""

    simulated: ClassVar[type[Any]]
    """Its class of batch norms that are simulated as folded."""

    wrapper: ClassVar[type[KerasWrapper]]
    """Its class of quantized layers."""

    @abstractmethod
    def add_bias(self, layer: Any) -> None:
        """Give a built layer the bias that it got when a batch norm was folded into it."""

    @abstractmethod
    def forget_variables(self, layer: Any) -> None:
        """Take its variables from a layer."""

    def pass_on(self, layer: Any) -> None:
        """Let a batch norm pass on what it gets: its work is done by the layer before it."""
        add_class(layer, self.passing)
        self.forget_variables(layer)

    def simulate(self, layer: Any) -> None:
        """Let a batch norm pass on what it gets, with its variables: the layer before it simulates it."""
        add_class(layer, self.simulated)

    def attach(self, layer: Any, told: Mapping[str, Any]) -> None:
        """Let the layer before a simulated batch norm know it, as its config tells."""
        Simulation.attach(told, layer)

    def compose(self, layer: Any) -> None:
        """Let a layer's config tell of the quantized layers inside it."""
        add_class(layer, self.composite)

    def inside_of(self, layer: Any) -> dict[str, Any]:
        """Return what became of the layers inside a layer, by their places in it; JSON-clean.

        Raises
        ------
        ModelError
            When the layer can't be made again from its own config, or has quantizers that stand by themselves in a
            graph: a file could be written, but not read.
        """
        self._require_readable(layer)
        parts, biased, passing, composites = {}, [], [], []
        simulated = {}
        for place, each in structure(layer, self.graph):
            if isinstance(each, KerasHolder):
                raise ModelError(
                    f"{own_class(layer).__name__} {layer.name!r} can't be saved by Keras: it holds {each.name!r}, the "
                    "quantizer of a functional operation, in a graph that its class makes by itself",
                    "use trainable_keras.save.",
                )
            if isinstance(each, KerasWrapper):
                parts[place] = {**own_config(each), "build": self.build_config(each)}
            if vars(each).get(BIASED):
                biased.append(place)
            if isinstance(each, Passing):
                passing.append(place)
            if isinstance(each, Simulated):
                simulated[place] = told_of_norm(each)
            if isinstance(each, Composite):
                composites.append(place)
        found: dict[str, Any] = {"parts": parts, "biased": biased, "passing": passing, "composites": composites}
        return {**found, "simulated": simulated} if simulated else found

    def _require_readable(self, layer: Any) -> None:
        """Raise ModelError for a layer that can't be made again from its own config."""
        subject = f"{own_class(layer).__name__} {layer.name!r} can't be saved by Keras"
        hint = "give its class a get_config that from_config can read, or use trainable_keras.save."
        try:
            with plainly(), as_its_own_class(layer):
                again = type(layer).from_config(copy.deepcopy(layer.get_config()))  # some take parts out of it
        except Exception as error:
            raise ModelError(f"{subject}: it can't be made again from its own config: {error}", hint) from error
        layers = [len(getattr(each, "layers", ())) for each in (layer, again)]
        if layers[1] > layers[0]:
            raise ModelError(
                f"{subject}: made again from its own config it has {layers[1]} layers, not {layers[0]}", hint
            )

    def become(self, layer: Any) -> None:
        """Make a layer what its config said, if it is built.

        Raises
        ------
        ModelError
            When the layer has no longer the layers inside that it was saved with.
        """
        if PENDING not in vars(layer) or not layer.built:
            return
        pending, told = type(layer), vars(layer).pop(PENDING)
        layer.__class__ = own_class(layer)
        try:
            self._restore_inside(layer, told.get("inside") or NOTHING)
            if told.get("quantization"):
                self.restore(layer, told["quantization"])
            else:
                self.compose(layer)
        except Exception:  # whoever goes on after this has a layer that still says what it is to be, and no float one
            layer.__class__ = pending
            vars(layer)[PENDING] = told
            raise

    def _restore_inside(self, layer: Any, inside: Mapping[str, Any]) -> None:
        places = {*inside["parts"], *inside["biased"], *inside["passing"], *inside.get("composites", ())}
        places |= set(inside.get("simulated", ()))
        found = dict(structure(layer, self.graph)) if places else {}
        if missing := places - set(found):
            raise ModelError(
                f"{own_class(layer).__name__} {layer.name!r} was saved with layers that it does not have now: "
                f"{sorted(missing)}",
                "load it with the class that it was saved with.",
            )
        for place, part in inside["parts"].items():
            if not found[place].built and part["build"]:
                self.build(found[place], part["build"])
        for place in inside["biased"]:
            self.add_bias(found[place])
        for place in inside["passing"]:
            self.pass_on(found[place])
        for place, part in inside["parts"].items():
            self.restore(found[place], part)
        for place, told in inside.get("simulated", {}).items():
            self.simulate(found[place])
            self.attach(found[place], told)
        for place in inside.get("composites", ()):  # Keras 2 names the entries of its files by classes
            self.compose(found[place])

    def restore(self, layer: Any, told: Mapping[str, Any]) -> None:
        """Quantize a built layer as its config tells."""
        self.wrapper.of_config(told, layer)
