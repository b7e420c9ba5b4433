"""Rewrites of a graph with ``Quantize`` nodes, each of which leaves every value as it is.

They let integer kernels take more of a graph: a quantizer moves to the operation that makes its values, through
whatever only moves or clips them; a linear layer of any rank becomes a ``Gemm``; a mean over all positions becomes a
``GlobalAveragePool``; a transposed convolution, for which runtimes have no integer kernel, becomes a convolution.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainable_core.export.containers import BYTE
from trainable_core.export.graph import Graph, Node, attribute
from trainable_core.export.source import DOMAIN, QUANTIZE, QuantizerRecord
from trainable_core.export.subpixel import Phases
from trainable_core.integer.products import Window
from trainable_core.reference import affine

Records = dict[str, QuantizerRecord]

MOVES = frozenset(
    ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "DepthToSpace", "SpaceToDepth", "Identity")
)
"""Operations whose output's values are values of their first input."""

LOW, HIGH = "low", "high"
"""Attributes of a ``Quantize`` node: the ends that its codes are clipped to, where they are not those of the grid."""


CALL, RESULT, ALSO = "call", "result", "also"
"""Attributes of a ``Quantize`` node: which of the quantizer's calls it is, the tensor that the quantizer gave before
nodes moved, and calls of others that it stands for."""


def is_quantizer(node: Node) -> bool:
    """Return whether a node stands for a quantizer."""
    return bool(node.domain == DOMAIN and node.op_type == QUANTIZE)


def simplify(graph: Graph, records: Records) -> None:
    """Carry out every rewrite."""
    for step in (number_calls, remove_identities, use_gemm, pool_globally, convolve_directly):
        step(graph, records)
        graph.sweep()
    merge_quantizers(graph, records)
    hoist_quantizers(graph, records)
    merge_quantizers(graph, records)
    graph.sweep()


def remove_identities(graph: Graph, _records: Records) -> None:
    """Let readers of an ``Identity`` or a cast to the same type read its input."""
    outputs = graph.output_names()
    gone: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            if name in gone:
                node.input[index] = gone[name]
        if node.op_type == "Identity" and not node.domain and node.output[0] not in outputs:
            gone[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    graph.nodes = kept


# ---- quantizers move to what makes their values ---------------------------------------------------------------------


def merge_quantizers(graph: Graph, records: Records) -> None:
    """Let several quantizers of one tensor on the same grid be one; runtimes fuse an operation with a single one."""
    first: dict[tuple[Any, ...], Any] = {}
    outputs = graph.output_names()
    for node in graph.nodes:
        if not is_quantizer(node):
            continue
        grid = records[attribute(node, "name")].grid
        numbers = grid.scale.tobytes(), grid.zero_point.tobytes(), grid.quant_min, grid.quant_max, grid.channels_axis
        key = (node.input[0], *numbers, attribute(node, LOW), attribute(node, HIGH))
        same: Node = first.setdefault(key, node)
        if same is not node and node.output[0] not in outputs:
            graph.rename_reads(node.output[0], same.output[0])
            theirs = [
                (name, call, same.output[0] if result == node.output[0] else result)
                for name, call, result in calls_of(node)
            ]
            also = [f"{call}\t{result}\t{name}" for name, call, result in [*calls_of(same)[1:], *theirs]]
            set_attribute(graph, same, ALSO, also)
    graph.sweep()


def number_calls(graph: Graph, _records: Records) -> None:
    """Note on each quantizer's node which of the quantizer's calls it is, before any node moves."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if is_quantizer(node):
            name = attribute(node, "name")
            set_attribute(graph, node, CALL, counts[name])
            set_attribute(graph, node, RESULT, node.output[0])
            counts[name] += 1


def calls_of(node: Node) -> list[tuple[str, int, str]]:
    """Return the quantizers' calls that a node stands for, its own first.

    Each has the name of the quantizer, which of its calls it is, and the tensor that the quantizer gave in the source,
    which the codes are compared at.
    """
    own = (attribute(node, "name"), int(attribute(node, CALL, 0)), attribute(node, RESULT, node.output[0]))
    also = [each.decode().split("\t", 2) for each in attribute(node, ALSO) or []]
    return [own, *((name, int(call), result) for call, result, name in also)]


def set_attribute(graph: Graph, node: Node, name: str, value: Any) -> None:
    """Set an attribute of a node."""
    for index, each in enumerate(node.attribute):
        if each.name == name:
            del node.attribute[index]
            break
    node.attribute.append(graph.onnx.helper.make_attribute(name, value))


def hoist_quantizers(graph: Graph, records: Records) -> None:
    """Move each quantizer before what only moves, clips or selects values and is read by nothing else."""
    producers, readers, outputs = graph.producers(), graph.readers(), graph.output_names()
    gone: set[int] = set()
    for node in graph.nodes:
        if not is_quantizer(node) or records[attribute(node, "name")].grid.channels_axis is not None:
            continue
        while True:
            before = producers.get(node.input[0])
            if before is None or before.domain or len(before.output) > 1 or len(readers[before.output[0]]) > 1:
                break
            if before.output[0] in outputs or not _lets_pass(graph, before, node, records):
                break
            source = before.input[0]
            stays = before.op_type not in ("Relu", "Clip")
            if stays:
                _swap(graph, before, node)
                producers |= {node.output[0]: node, before.output[0]: before}
                readers[node.output[0]] = [before]
            else:  # the quantizer clips as it did
                node.input[0] = source
                gone.add(id(before))
            readers[source] = [node if each is before else each for each in readers[source]]
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    graph.sort()


def _swap(graph: Graph, before: Node, quantizer: Node) -> None:
    """Put a quantizer before the node that makes its input."""
    source, result = before.input[0], quantizer.output[0]
    inner = graph.fresh(f"{source}_quantized")
    shape = graph.shapes.get(source)
    if shape is not None:
        graph.shapes[inner] = shape
    quantizer.input[0], quantizer.output[0] = source, inner
    before.input[0], before.output[0] = inner, result


def _lets_pass(graph: Graph, node: Node, quantizer: Node, records: Records) -> bool:
    """Return whether a quantizer may stand before a node; clips it where the node clips."""
    if node.op_type in MOVES:
        return True
    if node.op_type == "MaxPool":  # runtimes pool no 16-bit codes
        grid = records[attribute(quantizer, "name")].grid
        return bool(grid.quant_max - grid.quant_min < 2**BYTE)
    if node.op_type == "Gather":
        return node.input[0] not in graph.constants and node.input[1] in graph.constants
    if node.op_type == "Pad":
        value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())  # noqa: PLR2004
        return value is not None and not np.any(value)
    if node.op_type not in ("Relu", "Clip"):
        return False
    grid = records[attribute(quantizer, "name")].grid
    low, high = attribute(quantizer, LOW, grid.quant_min), attribute(quantizer, HIGH, grid.quant_max)
    ends = clip_ends(graph, node)
    if ends is None:
        return False
    codes = affine.quantize(np.asarray(ends, np.float32), grid)
    low, high = max(low, int(codes[0])), min(high, int(codes[1]))
    if low > high:
        return False
    set_attribute(graph, quantizer, LOW, low)
    set_attribute(graph, quantizer, HIGH, high)
    return True


def clip_ends(graph: Graph, node: Node) -> tuple[float, float] | None:
    """Return the ends that a ``Relu`` or ``Clip`` clips to; None where they are computed."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = [float("-inf"), float("inf")]
    for index, name in enumerate(list(node.input)[1:3]):
        if name:
            value = graph.constant(name)
            if value is None or value.size != 1 or np.isnan(value).any():
                return None
            ends[index] = float(value.reshape(()))
    return (ends[0], ends[1]) if ends[0] <= ends[1] else None


# ---- linear layers --------------------------------------------------------------------------------------------------


def use_gemm(graph: Graph, records: Records) -> None:
    """Make a matrix product with a quantized weight, and the addition of a bias behind it, one ``Gemm``.

    What has more than two dimensions is flattened before it, and brought back to its shape behind it.
    """
    producers, readers, outputs = graph.producers(), graph.readers(), graph.output_names()
    replacements: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op_type != "MatMul" or node.domain or not _is_weight(producers, records, node.input[1]):
            continue
        rank, shape = graph.rank(node.input[0]), graph.shapes.get(node.input[1])
        if rank is None or shape is None or len(shape) != 2 or rank < 2 or None in shape:  # noqa: PLR2004 - a matrix
            continue
        result, bias, addition = node.output[0], "", None
        users = readers.get(result, [])
        if len(users) == 1 and result not in outputs and users[0].op_type == "Add":
            addition = users[0]
            (other,) = [name for name in addition.input if name != result] or [""]
            value = graph.constant(other) if other else None
            if value is not None and value.shape == (shape[1],):
                bias, result = other, addition.output[0]
            else:
                addition = None
        made = _gemm(graph, node, bias, result, rank, int(shape[1] or 0))
        replacements[id(node)] = made
        if addition is not None:
            replacements[id(addition)] = []
    graph.replace(replacements)
    if replacements:
        graph.sort()


def _gemm(graph: Graph, node: Node, bias: str, result: str, rank: int, width: int) -> list[Node]:
    x, weight = node.input
    inputs = [weight, bias] if bias else [weight]
    if rank == 2:  # noqa: PLR2004 - a matrix as it is
        return [graph.make("Gemm", [x, *inputs], [result], like=node)]
    shape = graph.shapes[x]
    flat, product = graph.fresh(f"{x}_flat"), graph.fresh(f"{result}_flat")
    graph.shapes[flat], graph.shapes[product] = (None, shape[-1]), (None, width)
    rows = graph.add_constant(f"{flat}_shape", np.array([-1, shape[-1] or -1], np.int64))
    made = [
        graph.make("Reshape", [x, rows], [flat], like=node),
        graph.make("Gemm", [flat, *inputs], [product], like=node),
    ]
    unknown = [index for index, size in enumerate(shape[:-1]) if size is None]
    if len(unknown) <= 1:
        sizes = [-1 if size is None else size for size in shape[:-1]] + [width]
        back = graph.add_constant(f"{result}_shape", np.array(sizes, np.int64))
    else:
        whole, lead, back = (graph.fresh(f"{result}_{part}") for part in ("sizes", "lead", "shape"))
        last = graph.add_constant(f"{result}_width", np.array([width], np.int64))
        ends = [
            graph.add_constant(f"{result}_{part}", np.array([at], np.int64))
            for part, at in (("first", 0), ("last", rank - 1))
        ]
        made += [
            graph.make("Shape", [x], [whole], like=node),
            graph.make("Slice", [whole, *ends], [lead], like=node),
            graph.make("Concat", [lead, last], [back], like=node, axis=0),
        ]
    return [*made, graph.make("Reshape", [product, back], [result], like=node)]


def _is_weight(producers: dict[str, Node], records: Records, name: str) -> bool:
    """Return whether a tensor is a quantized weight, perhaps moved."""
    node = producers.get(name)
    while node is not None and node.op_type in MOVES:
        node = producers.get(node.input[0])
    return node is not None and is_quantizer(node) and records[attribute(node, "name")].codes is not None


# ---- means ----------------------------------------------------------------------------------------------------------


def pool_globally(graph: Graph, _records: Records) -> None:
    """Make a mean over all but two axes a ``GlobalAveragePool``, with the two axes in front."""
    replacements: dict[int, list[Node]] = {}
    for node in graph.nodes:
        rank = graph.rank(node.input[0]) if node.input else None
        if node.op_type != "ReduceMean" or node.domain or rank is None:
            continue
        axes = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else attribute(node, "axes")
        reduced = [] if axes is None else sorted(int(axis) % rank for axis in np.asarray(axes).reshape(-1))
        kept = [axis for axis in range(rank) if axis not in reduced]
        if reduced and len(kept) == 2:  # noqa: PLR2004 - rows and channels
            replacements[id(node)] = _pooled(graph, node, kept, reduced)
    graph.replace(replacements)


def _pooled(graph: Graph, node: Node, kept: list[int], reduced: list[int]) -> list[Node]:
    source, result = node.input[0], node.output[0]
    shape, made, order = graph.shapes[source], [], [*kept, *reduced]
    if order != sorted(order):
        turned = graph.fresh(f"{source}_turned")
        graph.shapes[turned] = tuple(shape[axis] for axis in order)
        made.append(graph.make("Transpose", [source], [turned], like=node, perm=order))
        source = turned
    keeps = bool(attribute(node, "keepdims", 1))
    if keeps and order == sorted(order):
        return [*made, graph.make("GlobalAveragePool", [source], [result], like=node)]
    pooled = graph.fresh(f"{result}_pooled")
    graph.shapes[pooled] = (shape[kept[0]], shape[kept[1]], *(1,) * len(reduced))
    made.append(graph.make("GlobalAveragePool", [source], [pooled], like=node))
    if keeps:
        back = [order.index(axis) for axis in range(len(order))]
        return [*made, graph.make("Transpose", [pooled], [result], like=node, perm=back)]
    return [*made, graph.make("Flatten", [pooled], [result], like=node, axis=1)]


# ---- transposed convolutions ----------------------------------------------------------------------------------------


def convolve_directly(graph: Graph, records: Records) -> None:
    """Make each transposed convolution with a quantized weight a convolution whose channels are spread over positions.

    A transposed convolution with stride `s` gives ``s`` outputs for each position of its input. Each of these *phases*
    is a convolution with a part of the kernel, so all of them together are one convolution with `s` times as many
    channels, which a transpose interleaves.
    """
    producers = graph.producers()
    replacements: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op_type != "ConvTranspose" or node.domain:
            continue
        weight = producers.get(node.input[1])
        if weight is None or not is_quantizer(weight) or records[attribute(weight, "name")].codes is None:
            continue
        made = _phases(graph, node, records)
        if made is not None:
            replacements[id(node)] = made
    graph.replace(replacements)


def window_of(node: Node, rank: int) -> Window | None:
    """Return how a convolution's or pooling's kernel moves; None where padding is computed from the input's size."""
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET" or attribute(node, "output_shape"):
        return None
    return Window(
        tuple(attribute(node, "strides") or ()),
        tuple(attribute(node, "dilations") or ()),
        tuple(attribute(node, "pads") or ()),
        int(attribute(node, "group", 1)),
        tuple(attribute(node, "output_padding") or ()),
    ).of_rank(rank)


def _phases(graph: Graph, node: Node, records: Records) -> list[Node] | None:
    rank = graph.rank(node.input[0])
    shape = graph.shapes.get(node.input[0])
    window = None if rank is None else window_of(node, rank - 2)
    name = _weight_record(graph, node, records)
    if window is None or shape is None or name is None or None in shape[2:]:
        return None
    record = records[name]
    assert record.codes is not None  # noqa: S101 - asked by the caller
    phases = Phases(record.codes.shape, window)
    spread = f"{name}#spread"
    if spread not in records:
        records[spread] = phases.spread(record, spread)
    source, result = node.input[0], node.output[0]
    weight = graph.fresh(f"{result}_weight")
    placeholder = graph.add_constant(f"{weight}_codes", np.zeros((), np.float32))
    graph.shapes[weight] = records[spread].codes.shape  # type: ignore[union-attr] # a weight's record
    quantizer = graph.make(QUANTIZE, [placeholder], [weight], domain=DOMAIN, like=node)
    set_attribute(graph, quantizer, "name", spread)
    made = [quantizer]
    inputs = [source, weight]
    if len(node.input) > 2 and node.input[2]:  # noqa: PLR2004 - a bias
        bias = graph.constant(node.input[2])
        if bias is None:
            return None
        inputs.append(graph.add_constant(f"{node.input[2]}_spread", phases.spread_bias(bias)))
    product = graph.fresh(f"{result}_phases")
    made.append(
        graph.make(
            "Conv", inputs, [product], like=node, kernel_shape=phases.kernel, pads=phases.pads, group=window.groups
        )
    )
    sizes = [int(size or 0) for size in shape[2:]]
    graph.shapes[product] = (shape[0], phases.outputs * phases.number, *phases.counts(sizes))
    return [*made, *_interleave(graph, node, product, result, phases, sizes)]


def _weight_record(graph: Graph, node: Node, records: Records) -> str | None:
    producer = graph.producers().get(node.input[1])
    return (
        None
        if producer is None
        else str(attribute(producer, "name"))
        if attribute(producer, "name") in records
        else None
    )


def _interleave(
    graph: Graph, node: Node, product: str, result: str, phases: Phases, sizes: Sequence[int]
) -> list[Node]:
    """Return the nodes that put phases beside each other, and cut what is beyond the output."""
    counts, rank = phases.counts(sizes), phases.rank
    begins, lengths = phases.cut(sizes)
    wholes = [n * s for n, s in zip(counts, phases.strides, strict=True)]
    is_cut = list(lengths) != wholes
    joined = graph.fresh(f"{result}_joined") if is_cut else result
    made = (_channels_last if phases.are_first else _channels_first)(graph, node, product, joined, phases, counts)
    if is_cut:
        ends = [begin + length for begin, length in zip(begins, lengths, strict=True)]
        numbers = {"begins": begins, "ends": ends, "axes": range(2, 2 + rank)}
        arguments = [graph.add_constant(f"{result}_{part}", np.array(each, np.int64)) for part, each in numbers.items()]
        made.append(graph.make("Slice", [joined, *arguments], [result], like=node))
    return made


def _channels_first(
    graph: Graph, node: Node, product: str, joined: str, phases: Phases, counts: Sequence[int]
) -> list[Node]:
    """Return the nodes that put phases beside each other where they are the last part of the channels."""
    rank, outputs = phases.rank, phases.outputs
    wholes = [n * s for n, s in zip(counts, phases.strides, strict=True)]
    order = [0, 1, *itertools.chain.from_iterable((2 + rank + axis, 2 + axis) for axis in range(rank))]
    split = _reshaped(graph, node, product, [0, outputs, *phases.strides, *counts])
    woven = graph.make("Transpose", [split.output[0]], [graph.fresh(f"{joined}_woven")], like=node, perm=order)
    return [split, woven, _reshaped(graph, node, woven.output[0], [0, outputs, *wholes], joined)]


def _channels_last(
    graph: Graph, node: Node, product: str, joined: str, phases: Phases, counts: Sequence[int]
) -> list[Node]:
    """Return the nodes that put phases beside each other with the channels last, so that whole rows of them move.

    Integer convolutions of ONNX Runtime compute with the channels last anyway.
    """
    rank, outputs = phases.rank, phases.outputs
    wholes = [n * s for n, s in zip(counts, phases.strides, strict=True)]
    last, first = [0, *range(2, 2 + rank), 1], [0, 1 + rank, *range(1, 1 + rank)]
    order = [0, *itertools.chain.from_iterable((1 + axis, 1 + rank + axis) for axis in range(rank)), 1 + 2 * rank]
    turned = graph.make("Transpose", [product], [graph.fresh(f"{joined}_last")], like=node, perm=last)
    split = _reshaped(graph, node, turned.output[0], [0, *counts, *phases.strides, outputs])
    woven = graph.make("Transpose", [split.output[0]], [graph.fresh(f"{joined}_woven")], like=node, perm=order)
    whole = _reshaped(graph, node, woven.output[0], [0, *wholes, outputs])
    back = graph.make("Transpose", [whole.output[0]], [joined], like=node, perm=first)
    return [turned, split, woven, whole, back]


def _reshaped(graph: Graph, node: Node, source: str, shape: Sequence[int], result: str = "") -> Node:
    """Return the node that gives a tensor another shape."""
    constant = graph.add_constant(f"{source}_shape", np.asarray(shape, np.int64))
    return graph.make("Reshape", [source, constant], [result or graph.fresh(f"{source}_reshaped")], like=node)
