"""An ONNX graph that can be changed: nodes in order, constants as arrays, who makes and who reads each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import ModelError
from trainable_core.export.libraries import library

Array = NDArray[Any]
Node = Any
"""``onnx.NodeProto``."""


class Graph:
    """The main graph of an ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is; nodes are copied.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
        In topological order.
    constants : dict of str to array
        Initializers and the values of ``Constant`` nodes.
    inputs, outputs : list of onnx.ValueInfoProto
        Of the graph.
    shapes : dict of str to tuple
        Known shapes; a dimension that is not known is None.
    """

    def __init__(self, model: Any) -> None:
        self.onnx = library("onnx", "an ONNX graph")
        graph = model.graph
        self.name = graph.name or "model"
        self.opsets: dict[str, int] = {each.domain: each.version for each in model.opset_import}
        copied = type(graph)()
        copied.input.extend(graph.input)
        copied.output.extend(graph.output)
        self.inputs, self.outputs = list(copied.input), list(copied.output)
        self.constants: dict[str, Array] = {
            each.name: self.onnx.numpy_helper.to_array(each) for each in graph.initializer
        }
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        for info in [*graph.value_info, *graph.input, *graph.output]:
            shape = _shape_of(info)
            if shape is not None:
                self.shapes[info.name] = shape
        self.shapes |= {name: array.shape for name, array in self.constants.items()}
        self.nodes: list[Node] = []
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                value = _value_of(self.onnx, node)
                if value is not None:
                    self.constants[node.output[0]] = value
                    self.shapes[node.output[0]] = value.shape
                    continue
            own = self.onnx.NodeProto()
            own.CopyFrom(node)
            self.nodes.append(own)
        self._names = {each.name for each in graph.input} | set(self.constants)
        self._names |= {name for node in self.nodes for name in node.output}

    # ---- looking ----------------------------------------------------------------------------------------------------

    def producers(self) -> dict[str, Node]:
        """Return the node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[Node]]:
        """Return the nodes that read each tensor, once for each time they read it."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in used_by(node):
                found.setdefault(name, []).append(node)
        return found

    def output_names(self) -> set[str]:
        """Return the names of the graph's outputs."""
        return {each.name for each in self.outputs}

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor, None where it is not known."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def constant(self, name: str) -> Array | None:
        """Return the value of a constant, None for any other tensor."""
        return self.constants.get(name)

    # ---- changing ---------------------------------------------------------------------------------------------------

    def fresh(self, wish: str) -> str:
        """Return a name that no tensor has, near to a wish."""
        name, count = wish, 1
        while name in self._names:
            count += 1
            name = f"{wish}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, wish: str, value: Array) -> str:
        """Add a constant and return its name."""
        name = self.fresh(wish)
        self.constants[name] = value
        self.shapes[name] = value.shape
        return name

    def make(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        like: Node = None,
        **attributes: Any,
    ) -> Node:
        """Return a new node, not yet in the graph; with the metadata of the node that it stands for."""
        given = {key: value for key, value in attributes.items() if value is not None}
        node = self.onnx.helper.make_node(op_type, list(inputs), list(outputs), domain=domain, **given)
        node.name = f"{op_type}_{outputs[0]}"
        if like is not None:
            node.metadata_props.extend(like.metadata_props)
        self._names.update(outputs)
        return node

    def rename_reads(self, old: str, new: str, nodes: Iterable[Node] | None = None) -> None:
        """Let readers of one tensor read another: all of them, or the given ones."""
        for node in self.nodes if nodes is None else nodes:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def replace(self, replacements: Mapping[int, Sequence[Node]]) -> None:
        """Put nodes in the place of others, by the id of the node that goes."""
        self.nodes = [new for node in self.nodes for new in replacements.get(id(node), [node])]

    def sort(self) -> None:
        """Put the nodes into topological order; those that are in order stay in their order."""
        known = {each.name for each in self.inputs} | set(self.constants) | {""}
        waiting, ordered = list(self.nodes), []
        while waiting:
            later = []
            for node in waiting:
                if all(name in known for name in used_by(node)):
                    ordered.append(node)
                    known.update(node.output)
                else:
                    later.append(node)
            if len(later) == len(waiting):
                raise ModelError(f"the graph reads {sorted(set(used_by(later[0])) - known)}, which nothing makes")
            waiting = later
        self.nodes = ordered

    def sweep(self) -> None:
        """Remove the nodes and constants that no output depends on."""
        needed = self.output_names()
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(used_by(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    # ---- writing ----------------------------------------------------------------------------------------------------

    def to_model(self, producer: str = "trainable", version: str = "") -> Any:
        """Return the graph as a model; constants become initializers."""
        onnx = self.onnx
        initializers = [onnx.numpy_helper.from_array(np.asarray(v, order="C"), k) for k, v in self.constants.items()]
        for each in [*self.nodes, *self.inputs, *self.outputs]:  # the tracer's notes, with paths of the machine
            del each.metadata_props[:]
            each.doc_string = ""
        graph = onnx.helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        domains = {node.domain for node in self.nodes} | {""}
        opsets = [onnx.helper.make_opsetid(name, self.opsets.get(name, 1)) for name in sorted(domains)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, producer_name=producer, producer_version=version)
        model.ir_version = min(model.ir_version, IR_VERSION)
        return model


IR_VERSION = 10
"""The version of the container that came with opset 21; every runtime that knows the one reads the other."""


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """Return an attribute of a node."""
    onnx = library("onnx", "an ONNX graph")
    for each in node.attribute:
        if each.name == name:
            value = onnx.helper.get_attribute_value(each)
            return value.decode() if isinstance(value, bytes) else value
    return default


def used_by(node: Node) -> Iterator[str]:
    """Yield the names of the tensors that a node reads, those that its subgraphs read from outside included."""
    yield from (name for name in node.input if name)
    for each in node.attribute:
        for graph in ([each.g] if each.HasField("g") else []) + list(each.graphs):
            own = {name for inner in graph.node for name in inner.output}
            own |= {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                yield from (name for name in used_by(inner) if name not in own)


def layer_of(node: Node) -> str:
    """Return the name of the innermost layer whose code made a node; an empty string where it is not known."""
    scopes = next((each.value for each in node.metadata_props if each.key.endswith("name_scopes")), "")
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return parts[-2] if len(parts) > 1 else ""


def _shape_of(info: Any) -> tuple[int | None, ...] | None:
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return tuple(each.dim_value if each.HasField("dim_value") else None for each in kind.shape.dim)


def _value_of(onnx: Any, node: Node) -> Array | None:
    value = node.attribute[0]
    if value.name == "value":
        found: Array = onnx.numpy_helper.to_array(value.t)
        return found
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if value.name not in dtypes:
        return None
    return np.asarray(onnx.helper.get_attribute_value(value), dtypes[value.name])
