"""Other ways to a wrapped layer than by its name: its parameters under other names, and its forward in a list."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.recipe.document import SKIPPED
from trainable_core.recipe.layers import LayerKind
from trainable_core.recipe.state import WrappedState
from trainable_torch.layers import is_computed, kind_of
from trainable_torch.references import exchanged_in, parts_of
from trainable_torch.wrapper import QuantizationWrapper, read_through


def read_aliases(root: nn.Module, state: WrappedState) -> None:
    """Let modules that hold a quantized weight under a name of their own read it quantized as well.

    Parameters
    ----------
    root : Module
        A model whose layers have their quantizers.
    state : WrappedState
        Gets the reason where a weight stays float under such a name.
    """
    owners: dict[int, list[tuple[QuantizationWrapper, str]]] = {}
    for module in root.modules():
        if isinstance(module, QuantizationWrapper):
            for attribute, weight in module.own_weights().items():
                owners.setdefault(id(weight), []).append((module, attribute))
    for name, module in list(root.named_modules()):
        kind = kind_of(module)
        if isinstance(module, parametrize.ParametrizationList) or _computes_its_weights(module, kind):
            continue  # what is computed is quantized, and not what it is computed of
        own = set() if kind is None else {attribute.rpartition(".")[2] for attribute in kind.weights}
        aliases = {
            key: owners[id(weight)]
            for key, weight in module._parameters.items()  # noqa: SLF001 - own ones, without children's
            if weight is not None
            and id(weight) in owners
            and key not in (*own, *getattr(type(module), "read_names", ()))
        }
        if not aliases or _is_skipped(name, state):
            continue
        for key, found in list(aliases.items()):
            if len({id(owner.weights_quantizers[attribute]) for owner, attribute in found}) > 1:
                path = f"{name}.{key}".lstrip(".")
                state.left_out[path] = "it is the weight of several layers, which quantize it in different ways"
                del aliases[key]
        through = {key: found[0] for key, found in aliases.items()}
        if isinstance(module, fx.GraphModule):
            _retarget(module, through)
            continue
        try:
            read_through(module, through)
        except (ModelError, QuantizerStateError) as error:
            state.left_out |= {f"{name}.{key}".lstrip("."): str(error) for key in aliases}
            continue
        own_names = {key for key, weight in module._parameters.items() if weight is not None}  # noqa: SLF001 - as above
        if own_names == through.keys() and name not in state.plans:
            state.left_out.pop(name or "model", None)  # all that it holds is quantized by others


def _computes_its_weights(module: nn.Module, kind: LayerKind | None) -> bool:
    return kind is not None and any(is_computed(module, attribute) for attribute in kind.weights)


def _is_skipped(name: str, state: WrappedState) -> bool:
    steps = name.split(".")
    return any(state.left_out.get(".".join(steps[:end])) == SKIPPED for end in range(1, len(steps) + 1))


def _retarget(root: fx.GraphModule, aliases: dict[str, tuple[QuantizationWrapper, str]]) -> None:
    """Let a graph read weights where the layers have them."""
    names = {module: name for name, module in root.named_modules()}
    for node in root.graph.nodes:
        if node.op == "get_attr" and node.target in aliases:
            owner, attribute = aliases[node.target]
            node.target = f"{names[owner]}.{attribute}"


def rebind_forwards(root: nn.Module) -> None:
    """Let bound forwards of wrapped layers, kept in attributes and containers, be those with the quantizers.

    A layer's own attributes stay as they are: what it calls there is its float forward.
    """
    for module in root.modules():

        def exchange(value: Any, module: nn.Module = module) -> Any:
            if not isinstance(value, types.MethodType) or value.__name__ != "forward":
                return value
            layer = value.__self__
            return layer.forward if isinstance(layer, QuantizationWrapper) and layer is not module else value

        exchanged_in(module, exchange)


def unregistered_layers(root: nn.Module) -> dict[str, str]:
    """Return the layers that a model holds without having registered them, with what that means."""
    registered = set(root.modules())
    why = "it is not registered as a submodule, so it is neither quantized nor among the model's parameters"
    return {
        f"{path}.{name}".rstrip("."): why
        for at, module in root.named_modules()
        for key, value in vars(module).items()
        if key not in ("_modules", "_parameters", "_buffers")
        for path, each in _modules_in(value, f"{at}.{key}".lstrip("."), depth=4)
        if each not in registered
        for name, layer in each.named_modules()
        if layer not in registered and (kind := kind_of(layer)) is not None and kind.weights
    }


def _modules_in(value: Any, path: str, *, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a container, partial, bound method or closure, with their places."""
    if isinstance(value, nn.Module):
        yield path, value
    elif depth and isinstance(value, dict):
        for key, each in value.items():
            yield from _modules_in(each, f"{path}[{key!r}]", depth=depth - 1)
    elif depth:
        indexed = isinstance(value, list | tuple)
        for index, each in enumerate(parts_of(value)):
            yield from _modules_in(each, f"{path}[{index}]" if indexed else path, depth=depth - 1)
