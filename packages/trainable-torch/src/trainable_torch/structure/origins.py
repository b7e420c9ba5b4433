"""Where the inputs of layers come from: from which quantizer, past operations that only pass codes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils import parametrize

from trainable_core.recipe.routes import Origin
from trainable_torch.batch_norm import SimulatedBatchNorm
from trainable_torch.kernels import eligible
from trainable_torch.layers import kind_of
from trainable_torch.structure.dataflow import SIZE_ATTRIBUTES, SIZE_METHODS
from trainable_torch.structure.observing import OPERATION, SHAPE, WITH_OWN_OPERATION, Observed
from trainable_torch.structure.operands import operation_kind
from trainable_torch.structure.overrides import change_of, change_of_class, hook_of, own_class
from trainable_torch.structure.tracing import (
    DROPOUTS,
    EXAMPLE_HELPS,
    called,
    dropout_arguments,
    own_operations,
    quantizable_inputs,
    traced_parts,
)

Graphs = list[tuple[nn.Module, fx.Graph]]
TRAINED = "trained"
"""Key in a node's ``meta`` when it was called in train mode, in which dropout is no obstacle."""
Named = Callable[[nn.Module, fx.Node], str]
"""What a node of a part's graph is called: the name of a layer or functional operation, or empty."""

_PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    nn.UpsamplingNearest2d, nn.Upsample, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, *eligible.DROPOUT,
)  # fmt: skip
_PASSING = frozenset(
    (
        "relu", "relu_", "view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "transpose", "t",
        "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "contiguous", "clone", "detach", "expand",
        "expand_as", "view_as", "reshape_as", "repeat", "tile", "repeat_interleave", "narrow", "select",
        "index_select", "getitem", "__getitem__", "chunk", "split", "tensor_split", "unbind", "unfold", "flip", "roll",
        "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "amax", "T", "mT", "float",
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    )
)  # fmt: skip
"""Names of functions and methods whose results hold values of their first argument, and zeros."""
_SEVERAL = ("attention", "recurrent")
"""Op kinds of layers that return several tensors, of which the first one is quantized."""
_CLAMPS = frozenset(("relu", "relu_", "relu6", "hardtanh"))
_CLAMPING_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


def graphs_of(root: nn.Module, observed: Observed | None) -> Graphs:
    """Return what is known of a model's calls: its own graph, or those of the example in both modes, or of its parts.

    Each graph comes with the module in which its names are to be looked up.
    """
    if isinstance(root, fx.GraphModule):
        return [(root, root.graph)]
    if observed is not None and not isinstance(observed.trained, str):
        for node in observed.trained.graph.nodes:
            node.meta[TRAINED] = True
        return [(root, observed.evaluated.graph), (root, observed.trained.graph)]
    return [(part, part.graph) for _, part in traced_parts(root)]


def names_in(root: nn.Module, nodes: dict[str, fx.Node], operations: Iterable[Any]) -> Named:
    """Return what tells the names of nodes.

    Parameters
    ----------
    root : Module
        The model.
    nodes : dict of str to Node
        Functional operations that are nodes, by name.
    operations : iterable of Operation
        Functional operations that an example showed.
    """
    modules: dict[nn.Module, str] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        modules.setdefault(module, name)
    functions = {node: name for name, node in nodes.items()}
    places = {(each.module, each.kind, each.ordinal): each.name for each in operations}

    def named(part: nn.Module, node: fx.Node) -> str:
        if node.op == "call_module":
            return modules.get(part.get_submodule(str(node.target)), "")
        return functions.get(node, "") or places.get(node.meta.get(OPERATION, ()), "")

    return named


def clamps_module(module: nn.Module) -> bool:
    """Return whether a module is an activation function that only clamps its input."""
    return type(module) in _CLAMPING_MODULES


def clamps_node(node: fx.Node) -> bool:
    """Return whether a functional operation is an activation function that only clamps its input."""
    return operation_kind(node.target) == "activation" and called(node) in _CLAMPS


def inputs_of_calls(graphs: Graphs, named: Named, quantized: set[str]) -> dict[str, list[list[Origin]]]:
    """Return where the inputs of each layer and operation come from: one list for each call.

    Parameters
    ----------
    graphs : list of (Module, Graph)
        What `graphs_of` returned.
    named : callable
        What `names_in` returned.
    quantized : set of str
        Names of the layers and operations whose output has a quantizer.
    """
    found: dict[str, list[list[Origin]]] = {}
    for index, (part, graph) in enumerate(graphs):
        places = {node: f"{index}.{place}" for place, node in enumerate(graph.nodes)}
        known: dict[fx.Node, Origin] = {}
        for node in graph.nodes:
            name = named(part, node)
            if name:
                inputs = _inputs(part, node)
                found.setdefault(name, []).append(
                    [_origin(part, each, named, quantized, places, known) for each in inputs]
                )
    return found


def _inputs(part: nn.Module, node: fx.Node) -> list[fx.Node]:
    if node.op != "call_module":
        return quantizable_inputs(node)
    module = part.get_submodule(str(node.target))
    kind = kind_of(module)
    names = ("input",) if kind is None else kind.inputs
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given[name] for name in names if isinstance(given.get(name), fx.Node)]


def _origin(
    part: nn.Module,
    node: fx.Node,
    named: Named,
    quantized: set[str],
    places: dict[fx.Node, str],
    known: dict[fx.Node, Origin],
) -> Origin:
    """Return where the values of a node come from."""
    passed: list[fx.Node] = []
    first = node
    while node not in known:
        origin = _made_here(part, node, named, quantized, places)
        if isinstance(origin, Origin):
            known[node] = origin
            break
        if len(origin) > 1:
            several = {_origin(part, each, named, quantized, places, known) for each in origin}
            (one, *others) = [each for each in several if not each.empty] or several
            alike = not others and bool(one.producer)
            known[node] = one if alike else Origin("", places[node], "it joins values of several grids")
            break
        passed.append(node)
        node = origin[0]
    for each in passed:
        known[each] = known[node]
    return known[first]


def _made_here(
    part: nn.Module, node: fx.Node, named: Named, quantized: set[str], places: dict[fx.Node, str]
) -> Origin | Sequence[fx.Node]:
    """Return the origin of what a node makes, or the nodes whose values it passes on."""
    changed = next((user for user in node.users if _changes(part, user, node, named)), None)
    found: Origin | Sequence[fx.Node] | str
    if 0 in node.meta.get(SHAPE, ()):
        return Origin("", places[node], "it holds no values", empty=True)
    if changed is not None:
        found = f"{changed.name} changes it in place"
    elif node.op == "call_module":
        found = _made_by_module(part, node, named(part, node), quantized)
    elif node.op in ("call_function", "call_method"):
        found = _made_by_function(part, node, named, quantized)
    else:
        found = "it is an input of the model" if node.op == "placeholder" else "it is a tensor of the model"
    return Origin("", places[node], found) if isinstance(found, str) else found


def _made_by_module(part: nn.Module, node: fx.Node, name: str, quantized: set[str]) -> Origin | Sequence[fx.Node] | str:
    """Return the origin of a module's output, the node whose values it passes on, or why neither is known."""
    module = part.get_submodule(str(node.target))
    if name in quantized:
        if module._forward_hooks:  # noqa: SLF001 - they run behind the quantizer
            return f"{name} has a forward hook"
        return f"{name} returns several tensors" if _returns_several(module) else Origin(name)
    if not _passes(module):
        return f"{name or node.name} has no quantizer behind it"
    hook = hook_of(module)
    return f"{name} has a {hook}" if hook else node.all_input_nodes[:1]


def _made_by_function(
    part: nn.Module, node: fx.Node, named: Named, quantized: set[str]
) -> Origin | Sequence[fx.Node] | str:
    """Return the origin of a function's result, the nodes whose values it passes on, or why neither is known."""
    name, function = named(part, node), called(node)
    if name in quantized:
        return Origin(name)
    if function in ("getitem", "__getitem__"):
        return _item(part, node, named, quantized)
    if function in ("cat", "concat", "concatenate", "stack"):
        return node.all_input_nodes
    transposed = node.target is getattr and node.args[1] in ("T", "mT")
    if transposed or (_passes_function(node) and node.all_input_nodes):
        return node.all_input_nodes[:1]
    return f"{name or function.strip('_')} has no quantizer behind it"


def _item(part: nn.Module, node: fx.Node, named: Named, quantized: set[str]) -> Origin | Sequence[fx.Node] | str:
    """Return the origin of an item or a slice, the node that it is of, or why neither is known."""
    base = node.args[0]
    if not isinstance(base, fx.Node):
        return "it is an item of what is no tensor"
    module = part.get_submodule(str(base.target)) if base.op == "call_module" else None
    if module is None or not _returns_several(module):
        return [base]
    name = named(part, base)
    first = node.args[1] == 0 and name in quantized and not module._forward_hooks  # noqa: SLF001 - as above
    return Origin(name) if first else f"it is an output of {name or base.name} without a quantizer"


def _returns_several(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.op in _SEVERAL


def _passes(module: nn.Module) -> bool:
    """Return whether a module's output holds values of its input, and zeros; dropout in eval mode."""
    if isinstance(module, SimulatedBatchNorm):
        return True
    if type(module) not in _PASSING_MODULES or change_of(module, type(module)):
        return False
    if isinstance(module, nn.Upsample):
        return module.mode == "nearest"
    return getattr(module, "value", 0) == 0  # of a constant pad


def _passes_function(node: fx.Node) -> bool:
    name = called(node).lstrip("_") if not called(node).startswith("__") else called(node)
    if node.target in DROPOUTS:
        return TRAINED in node.meta or not dropout_arguments(node)["training"]
    if name == "pad":
        named = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        return named.get("mode", "constant") != "constant" or not named.get("value")
    if name == "interpolate":
        named = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False)) | node.kwargs
        return named.get("mode", "nearest") == "nearest"
    return name in _PASSING or name.startswith("upsample_nearest")


def _changes(part: nn.Module, user: fx.Node, node: fx.Node, named: Named) -> bool:
    """Return whether a user of a value writes something else than its own kind of values into it."""
    if user.op == "call_module":
        module = part.get_submodule(str(user.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, (nn.ReLU, *eligible.DROPOUT))
    if user.op not in ("call_function", "call_method") or not user.args or user.args[0] is not node:
        return False
    name = called(user)
    if name in ("setitem", "__setitem__"):
        return True
    if user.target is F.relu or name.strip("_") in ("relu", "dropout", "requires_grad"):
        return False
    told = user.kwargs.get("inplace") is True
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.strip("_") in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul")
    return told or in_place or (augmented and not named(part, user))


def float_functions(graphs: Graphs, named: Named) -> dict[str, str]:
    """Return the functions between layers that are no known operation and no mere move of values.

    Returns
    -------
    dict of str to str
        Why each is computed in float, by the name of its node.
    """
    found: dict[str, str] = {}
    for part, graph in graphs:
        leading: set[fx.Node] = set()  # to a layer or a known operation
        for node in reversed(graph.nodes):
            name = named(part, node)
            if name and node.target is F.scaled_dot_product_attention:
                found[name] = "its softmax is computed in float"
            if not name and node in leading and _computes(node):
                found[node.name] = f"no integer kernel is known for the function {called(node).strip('_')!r}"
            if name or node in leading:
                leading.update(node.all_input_nodes)
    return dict(reversed(found.items()))


def _computes(node: fx.Node) -> bool:
    """Return whether a node is a function that makes new values of values."""
    if node.op not in ("call_function", "call_method") or operation_kind(node.target) or _passes_function(node):
        return False
    if called(node) in SIZE_METHODS or (node.target is getattr and node.args[1] in (*SIZE_ATTRIBUTES, "T", "mT")):
        return False
    return any(_is_value(each) for each in node.all_input_nodes)


def _is_value(node: fx.Node) -> bool:
    """Return whether a node is a tensor of values: no size, and nothing that is computed of sizes only."""
    if node.op in ("call_method", "call_function"):
        sizes = called(node) in SIZE_METHODS or (node.target is getattr and node.args[1] in SIZE_ATTRIBUTES)
        return not sizes and (not node.all_input_nodes or any(_is_value(each) for each in node.all_input_nodes))
    return True


def bias_obstacle(layer: nn.Module) -> str:
    """Return why the bias of a layer may be added to something else than the products of its input and its weight.

    Empty where it is added to them, or where somebody has declared that it is. A subclass that only pads its input
    first is as good as PyTorch's own layer.
    """
    base = own_class(layer, WITH_OWN_OPERATION)
    if base is None:
        return ""
    changed = change_of(layer, base)
    if parametrize.is_parametrized(layer) and changed.endswith((" has its own weight", " has its own bias")):
        changed = change_of_class(type(layer).__bases__[0], base)  # PyTorch's properties compute them
    if not changed:
        return ""
    operations: Sequence[fx.Node | None] = own_operations(layer) or [None]
    for operation in operations:
        node = operation.args[0] if operation is not None and operation.args else None
        while isinstance(node, fx.Node) and node.op != "placeholder" and _passes_function(node):
            node = node.args[0] if node.args else None
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return changed
    return ""


NOT_SEEN = f"what it is given is not known: this part of the model can't be traced; {EXAMPLE_HELPS}"
"""Why the input of a layer has no known quantizer, where no graph shows a call of the layer."""
