"""Verification: the codes of a file, of NumPy, of LiteRT and of the framework, compared layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainable_core.enums import TieRule
from trainable_core.errors import DocumentError, InvalidArgumentError
from trainable_core.export.graph import Array
from trainable_core.export.network import Network
from trainable_core.export.tflite import document
from trainable_core.export.tflite.document import TARGET
from trainable_core.export.tflite.interpreter import Interpreter
from trainable_core.export.tflite.program import PASSING
from trainable_core.export.tflite.runtime import Runtime, kernel_ties, processor
from trainable_core.export.tflite.ties import tie_rule_of
from trainable_core.export.verification import Codes, Difference, LayerRow, VerificationReport
from trainable_core.integer import elementwise
from trainable_core.integer.lite import XNNPACK, Ties

_MOVES = PASSING | {"CONCATENATION"}
"""Operators that compute nothing."""


class Verification:
    """A file under examination.

    Parameters
    ----------
    path : path
        What `export` wrote.
    kernels : {"default", "builtin", "reference"}
        Which kernels of the runtime are looked at.

    Raises
    ------
    DocumentError
        When it is missing, damaged, or was not written by `export` for the target ``tflite``.
    MissingLibraryError
        When LiteRT is not installed.
    ModelError
        When the runtime refuses the file.
    """

    def __init__(self, path: Any, kernels: str = "default") -> None:
        self.program, content = document.read(path)
        self.metadata = document.metadata_of(self.program, path)
        if self.metadata.get("target") != TARGET:
            raise DocumentError(path, f"it is for the target {self.metadata.get('target')!r}, not for {TARGET!r}")
        self.report = VerificationReport(str(path), islands=list(self.metadata["islands"]), processor=processor())
        self.report.changed |= self._named(document.changes_in(self.program, self.metadata))
        self.makers = self.program.makers()
        self.calls = [
            (entry, name, index)
            for entry in self.metadata["quantizers"]
            if not entry["is_weight"]
            for index, name in enumerate(entry["codes"])
            if name in self.program.tensors
        ]
        self.watched = [name for name in self.makers if self.program.tensors[name].is_quantized]
        self.runtime = Runtime(content, self.program, self.watched, kernels)
        self.plain = Runtime(content, self.program, kernels=kernels)
        self.kernel_ties = kernel_ties()
        self.interpreter = Interpreter(self.program, self.runtime.families, self.kernel_ties)
        self.tie_rules = self._tie_rules()
        self.exact = self._exact()
        self.rows = {name: self._row(entry, name) for entry, name, _ in self.calls}
        order = {name: index for index, name in enumerate(self.makers)}
        self.report.rows = [self.rows[name] for name in sorted(self.rows, key=lambda name: order.get(name, -1))]

    def _row(self, entry: Mapping[str, Any], name: str) -> LayerRow:
        told, kernel = "", "input"
        source = self.program.source(name)
        if source in self.makers:
            kernel = f"{self.makers[source].code} ({self.runtime.families[source]})"
            certificate = self.interpreter.certificate(source)
            if certificate is not None:
                told = "exact" if certificate.exact else "sums exact" if certificate.fits else "sums too long"
                if certificate.exact and not self._same_ties(source):
                    told = "exact but ties"
        row = LayerRow(entry["layer"], entry["tensor"], name, kernel, told)
        row.must_be_equal = name in self.exact
        return row

    def _same_ties(self, name: str) -> bool:
        """Return whether a certified operator and the quantizer behind it treat ties alike."""
        if not self.interpreter.ties(name):
            return True
        if self.runtime.families.get(name) != XNNPACK or self.tie_rules.get(name) is not tie_rule_of(
            self.program, name
        ):
            return False
        if self.makers[name].code not in ("MEAN", "MUL") or self.kernel_ties is Ties.EVEN:
            return True
        # these go to the even code, and a quantizer's to the even number of steps
        zero_point = int(self.program.tensors[name].zero_point)  # type: ignore[arg-type] # a number
        return self.kernel_ties is Ties.EVEN_CODE and zero_point % 2 == 0

    def _tie_rules(self) -> dict[str, TieRule]:
        """Return the rule of the quantizer behind each tensor; concatenated ones are put on the grid of the result."""
        found: dict[str, TieRule] = {}
        for entry, name, _ in self.calls:
            source, rule = self.program.source(name), TieRule(entry["tie_rule"])
            found[source] = rule
            if source in self.makers and self.makers[source].code == "CONCATENATION":
                found |= {each: rule for each in self.makers[source].inputs if each not in found}
        return found

    def _exact(self) -> set[str]:
        """Return the tensors that the framework must give too: from certified layers with nothing else before them."""
        found = set(self.program.inputs)
        for operator in self.program.operators:
            (name,) = operator.outputs
            codes = [each for each in operator.inputs if self.program.tensors[each].data is None]
            if not set(codes) <= found:
                continue
            certificate = self.interpreter.certificate(name)
            if operator.code in _MOVES or (certificate is not None and certificate.exact and self._same_ties(name)):
                found.add(name)
        return found

    def _named(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Return changes with the layer that a tensor belongs to."""
        return {f"{self._owner(name)}{name}" if name != "nodes" else name: told for name, told in changes.items()}

    def _owner(self, tensor: str) -> str:
        for entry in self.metadata["quantizers"]:
            if tensor in entry["codes"]:
                return f"{entry['layer']}, "
        weight = self.metadata["biases"].get(tensor)
        return "" if weight is None else self._owner(weight)

    def compare_with(self, network: Network) -> None:
        """Note each constant and each grid of the file that is not what a model's own file would have."""
        self.report.changed |= self._named(
            document.compared(self.program, document.build(network, packed=self.metadata["packed"]))
        )

    def quantized(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return inputs as codes; real numbers are quantized on the grid of the file's input, ties to even."""
        found = {}
        for name in self.program.inputs:
            if name not in feeds:
                raise InvalidArgumentError("batch", f"it lacks {name!r}; the file's inputs are {self.program.inputs}")
            values = np.asarray(feeds[name])
            if not self.program.tensors[name].is_quantized:
                values = values.astype(np.float32)
            elif values.dtype.kind == "f":
                values = elementwise.quantize(values, self.program.tensors[name].grid).codes.astype(np.int8)
            found[name] = values
        return found

    def run(self, feeds: Mapping[str, Array], framework: Codes | None = None) -> dict[str, Array]:
        """Run a batch, compare its codes, and return the file's outputs in real numbers.

        Parameters
        ----------
        feeds : mapping of str to array
            By the names of the file's inputs: codes, or real numbers. Of an input whose quantizer's codes are among
            those of the framework, these are taken.
        framework : mapping of str to sequence of array, optional
            What the framework's quantizers gave: codes counted from zero for each call, by the name of the quantizer.
        """
        told = framework or {}
        codes = {**feeds, **self._of_framework(told)}
        codes = self.quantized(codes)
        found = self.runtime.run(codes)
        plain = self.plain.run(codes)
        for name in self.runtime.own:
            self.report.outputs.add(_bits(plain[name]), _bits(found[name]))
        self.interpreter.kernels = self.runtime.families
        given = {n: found[n] for n in self.watched if self.makers[n].code == "QUANTIZE"}
        float_outputs = [n for n in self.runtime.own if self.program.tensors[n].kind == "float32"]
        given |= {name: found[name] for name in float_outputs}
        predicted = self.interpreter.run(codes, self.watched, given)
        stored = self._stored(found, told)
        for entry, name, index in self.calls:
            row = self.rows[name]
            if name in self.watched and name not in given:
                row.numpy = row.numpy or Difference()
                row.numpy.add(_last_first(found[name]), _last_first(predicted[name]))
            calls = told.get(entry["name"], ())
            if index < len(calls):
                runtime = found.get(name, codes.get(name))
                assert runtime is not None  # noqa: S101 - it is watched, or an input
                counted = runtime.astype(np.int64) - int(self.program.tensors[name].zero_point)  # type: ignore[arg-type] # a number
                row.framework = row.framework or Difference()
                row.framework.add(_last_first(counted), _last_first(calls[index]))
            if name in stored and name not in given:
                row.alone = row.alone or Difference()
                before = {each: values for each, values in {**given, **stored}.items() if each != name}
                alone = self.interpreter.run(codes, [name], before)[name]
                row.alone.add(_last_first(alone), _last_first(stored[name]))
        self.report.batches += 1
        return {name: self._real(name, found[name]) for name in self.runtime.own}

    def _stored(self, found: Mapping[str, Array], told: Codes) -> dict[str, Array]:
        """Return the codes that the framework's quantizers gave as the file stores them, without those of inputs."""
        stored = {}
        for entry, name, index in self.calls:
            calls = told.get(entry["name"], ())
            if name in self.watched and index < len(calls) and np.shape(calls[index]) == found[name].shape:
                zero = int(self.program.tensors[name].zero_point)  # type: ignore[arg-type] # a number
                stored[name] = (np.asarray(calls[index]) + zero).astype(np.int8)
        return stored

    def _of_framework(self, told: Codes) -> dict[str, Array]:
        """Return the codes of inputs that the framework's quantizers gave."""
        found = {}
        for entry, name, index in self.calls:
            calls = told.get(entry["name"], ())
            if name in self.program.inputs and index < len(calls):
                zero = int(self.program.tensors[name].zero_point)  # type: ignore[arg-type] # a number
                found[name] = (np.asarray(calls[index]) + zero).astype(np.int8)
        return found

    def _real(self, name: str, values: Array) -> Array:
        tensor = self.program.tensors[name]
        if not tensor.is_quantized:
            return values
        return np.asarray((values.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale))

    def note_result(self, name: str, runtime: Array, framework: Array) -> None:
        """Note how far an output of the runtime is from the framework's, in real numbers."""
        if runtime.shape == framework.shape and runtime.size:
            distance = float(np.max(np.abs(runtime.astype(np.float64) - framework.astype(np.float64))))
            self.report.results[name] = max(self.report.results.get(name, 0.0), distance)


def _last_first(values: Array) -> Array:
    """Return values with the channels where reports look for them."""
    return np.moveaxis(np.asarray(values), -1, 1) if np.ndim(values) > 2 else np.asarray(values)  # noqa: PLR2004 - rows and channels


def _bits(values: Array) -> Array:
    return values.view(np.int32) if values.dtype == np.float32 else values
