"""Verification: the codes of a file, of NumPy, of the runtime and of the framework, compared layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trainable_core.errors import DocumentError, InvalidArgumentError
from trainable_core.export import files
from trainable_core.export.graph import Array, Graph
from trainable_core.export.interpreter import Interpreter
from trainable_core.export.passes import MOVES
from trainable_core.export.runtime import EXACT_SUMS, Processor, Runtime, processor
from trainable_core.integer.certificate import are_powers_of_two

TARGET = "onnx"
"""The target whose files the runtime can run."""

ALLOWED = 0.002
"""Share of all codes in which framework and runtime may differ where nothing certifies equality."""

Codes = Mapping[str, Sequence[Array]]
"""By the name of a quantizer: the codes that each of its calls gave, counted from zero."""


@dataclass
class Difference:
    """How the codes of one tensor differ between two computations.

    Parameters
    ----------
    codes : int
        How many were compared.
    different : int
        How many are not equal.
    largest : int
        The largest difference, in codes.
    channel : int or None
        The first channel in which one differs.
    """

    codes: int = 0
    different: int = 0
    largest: int = 0
    channel: int | None = None

    @property
    def share(self) -> float:
        """The share of codes that are not equal."""
        return self.different / self.codes if self.codes else 0.0

    def add(self, one: Array, other: Array) -> None:
        """Take in a batch."""
        self.codes += one.size
        if one.shape != other.shape:
            self.different += one.size
            self.channel = self.channel or 0
            return
        distance = np.abs(one.astype(np.int64) - other.astype(np.int64))
        wrong = distance != 0
        if wrong.any():
            self.different += int(wrong.sum())
            self.largest = max(self.largest, int(distance.max()))
            axis = 1 if wrong.ndim > 1 else 0
            first = int(np.argwhere(wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis)))[0][0])
            self.channel = first if self.channel is None else min(self.channel, first)


@dataclass
class LayerRow:
    """What was found of one quantized tensor.

    Parameters
    ----------
    layer, tensor : str
        As `describe` has them.
    codes : str
        Name of its codes in the file.
    kernel : str
        The runtime's kernel that gave the codes.
    certificate : str
        ``exact`` where framework and runtime must agree for any input, ``sums exact`` where the sums fit into 24 bits
        but a scale is no power of two, ``sums too long`` where they don't; empty where there is no certificate, as
        behind a float operation.
    numpy : Difference or None
        Between NumPy and the runtime; None behind a float island.
    framework : Difference or None
        Between the framework and the runtime; None where there is no model.
    alone : Difference or None
        Between the framework and what NumPy makes of the framework's own codes before the layer: the differences that
        arise in the layer, and not those that came with its inputs. None where there is no model, and behind a float
        operation.
    must_be_equal : bool
        Whether the layer and all before it are certified exact.
    """

    layer: str
    tensor: str
    codes: str
    kernel: str = ""
    certificate: str = ""
    numpy: Difference | None = None
    framework: Difference | None = None
    alone: Difference | None = None
    must_be_equal: bool = False


@dataclass
class VerificationReport:
    """The outcome of a verification.

    Parameters
    ----------
    path : str
        The file.
    rows : list of LayerRow
        One for each quantized activation, in the order of the graph.
    changed : dict of str to str
        Constants, and nodes, that are not as the model has them or as they were written, with the layer and what is
        wrong.
    islands : list of dict
        What is float in the file, and why.
    outputs : Difference
        Between the outputs of the file as it is, and of the one whose codes were watched: real numbers, so what is
        counted is whether they are equal bit for bit.
    results : dict of str to float
        The largest distance between the framework's and the runtime's values, by the name of the output.
    processor : Processor
        What it ran on.
    batches : int
        How many were run.
    """

    path: str
    rows: list[LayerRow] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    islands: list[dict[str, str]] = field(default_factory=list)
    outputs: Difference = field(default_factory=Difference)
    results: dict[str, float] = field(default_factory=dict)
    processor: Processor = field(default_factory=lambda: Processor("", ()))
    batches: int = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence each; empty when all is well."""
        found = [f"{name}: {problem}" for name, problem in self.changed.items()]
        for row in self.rows:
            where = f"{row.layer}: {row.tensor}"
            if row.numpy is not None and row.numpy.different:
                found.append(f"{where}: {_told(row.numpy)} between NumPy and the runtime")
            if row.framework is not None and row.framework.different and row.must_be_equal:
                found.append(f"{where}: {_told(row.framework)} between the model and the runtime, which are certified")
        arisen = self._arisen()
        share = sum(each.different for each in arisen) / max(sum(each.codes for each in arisen), 1)
        if share > ALLOWED:
            found.append(f"{share:.2%} of all codes differ between a layer of the model and the same layer in integers")
        if self.outputs.different:
            found.append("the file gives other outputs when its codes are not looked at")
        return found

    def _arisen(self) -> list[Difference]:
        """Return the differences that arise in layers; behind float operations, where all layers before are equal."""
        found, is_equal = [], True
        for row in self.rows:
            if row.alone is not None:
                found.append(row.alone)
            elif row.framework is not None and is_equal:
                found.append(row.framework)
            is_equal = is_equal and (row.framework is None or not row.framework.different)
        return found

    @property
    def share(self) -> float:
        """The share of all codes that differ between the model and the runtime, what follows from others included."""
        compared = [row.framework for row in self.rows if row.framework is not None]
        return sum(each.different for each in compared) / max(sum(each.codes for each in compared), 1)

    @property
    def ok(self) -> bool:
        """Whether the file is the model: nothing changed, and the codes are equal as far as they must be."""
        return not self.problems

    @property
    def first(self) -> LayerRow | None:
        """The first layer whose codes differ, between any two of the computations; None where all are equal."""
        for row in self.rows:
            if any(each is not None and each.different for each in (row.numpy, row.framework)):
                return row
        return None

    @property
    def equal(self) -> bool:
        """Whether every code of every layer is equal in all computations."""
        return self.ok and self.first is None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-clean document."""
        return {**asdict(self), "ok": self.ok, "equal": self.equal, "problems": self.problems}

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the titles and the cells of the report's table."""
        titles = ("layer", "tensor", "kernel", "certificate", "codes", "NumPy", "framework", "layer alone")
        return titles, [_cells(row) for row in self.rows]

    def __str__(self) -> str:
        """Return the report as a table, and what is wrong."""
        titles, rows = self.table()
        widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [titles, *rows]]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """Return what was run and found, without the table."""
        lines = [f"{self.path}: {self.batches} batches in {self.processor.runtime} ({' '.join(self.processor.flags)})"]
        if self.processor.saturates:
            entry = "=".join(EXACT_SUMS)
            lines.append(f"this processor has no VNNI: without the session's entry {entry}, sums saturate at 16 bits")
        total = sum((row.framework or row.numpy or Difference()).codes for row in self.rows)
        if self.ok and self.first is None:
            lines.append(f"all {total:,} codes are equal")
        elif self.first is not None:
            row = self.first
            channel = next(each.channel for each in (row.numpy, row.framework) if each is not None and each.different)
            lines.append(f"the first difference is in {row.layer}: {row.tensor}, channel {channel}")
        return "\n".join([*lines, *self.problems])


def _told(difference: Difference) -> str:
    return f"{difference.different} of {difference.codes} codes differ, by {difference.largest} at most"


def _cells(row: LayerRow) -> tuple[str, ...]:
    count = next((each.codes for each in (row.framework, row.numpy) if each is not None), 0)
    return (
        row.layer,
        row.tensor,
        row.kernel,
        row.certificate,
        str(count),
        *map(_cell, (row.numpy, row.framework, row.alone)),
    )


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if not difference.different:
        return "equal"
    return f"{difference.share:.2%}, {difference.largest}, channel {difference.channel}"


class Verification:
    """A file under examination.

    Parameters
    ----------
    path : path
        What `export` wrote.

    Raises
    ------
    DocumentError
        When it is missing, damaged, or was not written by `export` for the target ``onnx``.
    MissingLibraryError
        When onnx or ONNX Runtime is not installed.
    ModelError
        When the runtime refuses the file.
    """

    def __init__(self, path: Any) -> None:
        self.model = files.read(path)
        self.metadata = files.metadata_of(self.model, path)
        if self.metadata.get("target") != TARGET:
            problem = f"it is for the target {self.metadata.get('target')!r}; files for {TARGET!r} can be verified"
            raise DocumentError(path, problem)
        self.report = VerificationReport(str(path), islands=list(self.metadata["islands"]), processor=processor())
        self.graph = Graph(self.model)
        self.calls = self._calls()
        self.report.changed |= self._named(files.changes_in(self.model, self.metadata))
        names = list(dict.fromkeys(codes for _, codes, _ in self.calls))
        made = self.graph.producers()
        self.zero_points = {name: self._zero_point(name) for name in names}
        self.sources = {name: self._source_of(name) for name in names}
        self.watched = [name for name in names if name in made]
        self.runtime = Runtime(self.model, self.watched)
        self.plain = Runtime(self.model)
        self.interpreter = Interpreter(self.graph)
        self.producers = self.graph.producers()
        self.certain = self._certain()
        self.behind_float = self._behind_float()
        self.rows = {codes: self._row(entry, codes) for entry, codes, _ in self.calls}
        order = {name: index for index, name in enumerate(made)}
        ordered = sorted(self.rows, key=lambda name: order.get(name, -1))
        self.report.rows = [self.rows[name] for name in ordered]

    def _calls(self) -> list[tuple[dict[str, Any], str, int]]:
        """Return each activation quantizer's entry, the name of the codes of a call of it, and which call it is."""
        found = []
        known = set(self.graph.constants) | set(self.graph.producers())
        for entry in self.metadata["quantizers"]:
            if not entry["is_weight"]:
                found += [
                    (entry, name, index) for index, name in enumerate(entry["codes"]) if name in known
                ]  # None: no output depends on it
        return found

    def _row(self, entry: Mapping[str, Any], codes: str) -> LayerRow:
        source = self._source_of(codes)
        kernel = self.runtime.kernels.get(source, self.runtime.kernels.get(codes, "constant"))
        told = ""
        certificate = self.interpreter.certificate(source)
        if certificate is not None:
            told = "exact" if certificate.exact else "sums exact" if certificate.fits else "sums too long"
        row = LayerRow(entry["layer"], entry["tensor"], codes, kernel, told)
        row.must_be_equal = source in self.certain
        return row

    def _certain(self) -> set[str]:
        """Return the codes that the framework must give too: from certified layers with nothing else before them."""
        found = {each.name for each in self.graph.inputs}
        for node in self.graph.nodes:
            result = node.output[0]
            unit = self.interpreter.units.get(result)
            if unit is not None:
                certificate = self.interpreter.certificate(result)
                before = {self.producers[each].input[0] for each in unit.inputs if each}
                if certificate is not None and certificate.exact and before <= found | set(self.graph.constants):
                    found.add(result)
            elif node.op_type == "QuantizeLinear":
                scale = self.graph.constants[node.input[1]]
                if node.input[0] in found and are_powers_of_two(scale):
                    found.add(result)
            elif node.op_type in ("Clip", "MaxPool", *MOVES) and node.input[0] in found:
                found.update(node.output)
        return found

    def _source_of(self, codes: str) -> str:
        """Return the name of the codes that a QuantizeLinear gives, before they are clipped and moved."""
        made = self.graph.producers()
        node = made.get(codes)
        while node is not None and node.op_type != "QuantizeLinear" and node.input:
            codes = node.input[0]
            node = made.get(codes)
        return codes

    def _behind_float(self) -> set[str]:
        """Return the codes that a QuantizeLinear makes of the result of a float operation."""
        inputs = {each.name for each in self.graph.inputs}
        found = set()
        for node in self.graph.nodes:
            is_unit = node.output[0] in self.interpreter.units
            if node.op_type == "QuantizeLinear" and not is_unit and node.input[0] not in inputs:
                found.add(node.output[0])
        return found

    def _named(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Return changes with the layer that a constant belongs to."""
        return {f"{self._owner(name)}{name}" if name != "nodes" else name: told for name, told in changes.items()}

    def _owner(self, constant: str) -> str:
        for entry in self.metadata["quantizers"]:
            if constant in entry["codes"] or constant.startswith(f"{entry['name']}."):
                return f"{entry['layer']}, "
        weight = self.metadata["biases"].get(f"{constant.rpartition('.')[0]}.codes")
        return "" if weight is None else self._owner(weight)

    def compare_constants(self, expected: Any) -> None:
        """Note each constant of the file that is not what a model's own file would have.

        Parameters
        ----------
        expected : onnx.ModelProto
            What `export` would write of the model now.
        """
        wanted = files.constants_of(expected)
        found: dict[str, str] = {}
        for name, value in wanted.items():
            have = self.graph.constants.get(name)
            if have is None:
                found[name] = "it is missing"
            elif have.dtype != value.dtype or have.shape != value.shape:
                found[name] = f"it is {have.dtype} {have.shape}, the model's is {value.dtype} {value.shape}"
            elif have.tobytes() != value.tobytes():
                wrong = np.argwhere(np.atleast_1d(have) != np.atleast_1d(value))
                where = tuple(int(each) for each in wrong[0]) if len(wrong) else ()
                found[name] = f"{max(len(wrong), 1)} of {value.size} values are not the model's, the first at {where}"
        self.report.changed |= self._named(found)

    def run(self, feeds: Mapping[str, Array], framework: Codes | None = None) -> dict[str, Array]:
        """Run a batch, compare its codes, and return the file's outputs.

        Parameters
        ----------
        feeds : mapping of str to array
            The graph's inputs.
        framework : mapping of str to sequence of array, optional
            What the framework's quantizers gave: codes counted from zero for each call, by the name of the quantizer.
        """
        found = self.runtime.run(feeds)
        plain = self.plain.run(feeds)
        for name in self.runtime.own:
            self.report.outputs.add(_bits(plain[name]), _bits(found[name]))
        given = self._given(found)
        predicted = self.interpreter.run(feeds, self.watched, given)
        stored = self._stored(found, framework or {})
        for entry, name, index in self.calls:
            row = self.rows[name]
            runtime = found.get(name, self.graph.constants.get(name))
            assert runtime is not None  # noqa: S101 - it is watched, or a constant
            if name in predicted and self._source_of(name) not in given:
                row.numpy = row.numpy or Difference()
                row.numpy.add(runtime, predicted[name])
            calls = (framework or {}).get(entry["name"], ())
            if index < len(calls):
                row.framework = row.framework or Difference()
                row.framework.add(self._counted(name, runtime), calls[index])
            if name in stored and self.sources[name] not in self.behind_float:
                row.alone = row.alone or Difference()
                row.alone.add(self._from_equal_inputs(name, feeds, {**given, **stored}), stored[name])
        self.report.batches += 1
        return {name: found[name] for name in self.runtime.own}

    def _stored(self, found: Mapping[str, Array], framework: Codes) -> dict[str, Array]:
        """Return the framework's codes as the file stores them, by their names in it."""
        stored = {}
        for entry, name, index in self.calls:
            calls = framework.get(entry["name"], ())
            if name in found and index < len(calls) and calls[index].shape == found[name].shape:
                stored[name] = (calls[index] + self.zero_points[name]).astype(found[name].dtype)
        return stored

    def _from_equal_inputs(self, name: str, feeds: Mapping[str, Array], known: Mapping[str, Array]) -> Array:
        """Return what NumPy makes of known codes in one layer."""
        source = self.sources.get(name, name)
        before = {each: codes for each, codes in known.items() if self.sources.get(each, each) != source}
        return self.interpreter.run(feeds, [name], before)[name]

    def note_result(self, name: str, runtime: Array, framework: Array) -> None:
        """Note how far an output of the runtime is from the framework's, in real numbers."""
        if runtime.shape == framework.shape and runtime.size:
            distance = float(np.max(np.abs(runtime.astype(np.float64) - framework.astype(np.float64))))
            self.report.results[name] = max(self.report.results.get(name, 0.0), distance)

    def _given(self, found: Mapping[str, Array]) -> dict[str, Array]:
        """Return the codes behind float islands as the runtime found them."""
        given = {name: found[name] for name in self.behind_float if name in found}
        for name in self.watched:  # clipped or moved codes, where the ones that a QuantizeLinear gave are not watched
            source = self._source_of(name)
            if source in self.behind_float and source not in given:
                given[name] = found[name]
        return given

    def _counted(self, name: str, codes: Array) -> Array:
        """Return stored codes counted from the code of zero."""
        return codes.astype(np.int64) - self.zero_points[name]

    def _zero_point(self, name: str) -> int:
        """Return the stored code of zero of an activation, from whoever quantizes or reads it."""
        readers = self.graph.readers()
        waiting = [self._source_of(name), name]
        made = self.graph.producers()
        node = made.get(waiting[0])
        if node is not None and node.op_type == "QuantizeLinear":
            return int(self.graph.constants[node.input[2]])
        while waiting:
            for node in readers.get(waiting.pop(), []):
                if node.op_type == "DequantizeLinear":
                    return int(self.graph.constants[node.input[2]])
                waiting += node.output
        return 0


def _bits(values: Array) -> Array:
    """Return the bits of real numbers as whole numbers; others as they are."""
    kinds = {4: np.int32, 8: np.int64, 2: np.int16}
    return values.view(kinds[values.dtype.itemsize]) if values.dtype.kind == "f" else values


def feeds_of(inputs: Iterable[Any], batch: Any) -> dict[str, Array]:
    """Return the arrays of a batch by the names of a graph's inputs.

    Parameters
    ----------
    inputs : iterable of onnx.ValueInfoProto
        Of the graph.
    batch : mapping of str to array, array, or sequence of array
        By name, or in the order of the inputs.

    Raises
    ------
    InvalidArgumentError
        When the batch lacks an input.
    """
    names = [each.name for each in inputs]
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise InvalidArgumentError("batch", f"it lacks {missing}; the file's inputs are {names}")
        return {name: np.asarray(batch[name]) for name in names}
    values = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(values) < len(names):
        raise InvalidArgumentError("batch", f"it has {len(values)} arrays; the file's inputs are {names}")
    return {name: np.asarray(value) for name, value in zip(names, values, strict=False)}
