"""From a deployed model to a file for a runtime: what only Keras can tell; the rest is `trainable_core.export`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.documents.files import as_path, require_writable
from trainable_core.enums import TieRule
from trainable_core.errors import InvalidArgumentError, ModelError, QuantizerStateError, UnsupportedConfigError, nearest
from trainable_core.export import channels_first, qdq, qonnx, verification
from trainable_core.export.network import Network, Step
from trainable_core.export.report import ExportReport
from trainable_core.export.source import NAME_TARGET, QuantizerRecord
from trainable_core.export.tflite import document
from trainable_core.export.tflite.lowering import lower
from trainable_core.export.tflite.ties import tie_rules
from trainable_core.qparams import QParams
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.targets.known import TARGETS as KNOWN_TARGETS
from trainable_keras.flow import FlatCall, Flow, flow_of
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.inferable import KerasInferableQuantizer
from trainable_keras.parts import KerasHolder, KerasWrapper, key_of, plan_of, told_of, variable_of
from trainable_keras.steps import ACTIVATIONS, Shape, Told, activation_of, told
from trainable_keras.wrapping import state_of

TARGETS = (document.TARGET, verification.TARGET, qonnx.TARGET)
"""What `export` can write."""


def export(
    framework: Framework, deployed: Any, path: Any, target: str, *, packed: bool, external_data: bool | None
) -> ExportReport:
    """Write a deployed model for a runtime; see `trainable_keras.export`."""
    if target not in TARGETS:
        problem = f"there is no target {target!r}; there are {', '.join(TARGETS)}{nearest(target, TARGETS)}"
        raise InvalidArgumentError("export", problem)
    require_finalized(framework, deployed, "export")
    require_writable(as_path(path))
    if packed and target != document.TARGET:
        raise InvalidArgumentError("export", f"packed=True is for the target tflite, not for {target}")
    network = network_of(framework, deployed)
    if target == document.TARGET:
        return document.write(network, path, packed=packed)
    write = qonnx.write if target == qonnx.TARGET else qdq.write
    return write(channels_first.source_of(network), path, external_data)


def require_finalized(framework: Framework, model: Any, verb: str) -> None:
    """Refuse a model with quantizers that are still trainable, or were made by others.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`.
    QuantizerStateError
        When it is not finalized.
    UnsupportedConfigError
        When it has a quantizer of another package.
    """
    state_of(framework, model)
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, BaseTrainableQuantizer):
            if quantizer.quantization_config.enabled:
                problem = f"{name} is still trainable"
                raise QuantizerStateError(type(model).__name__, problem, f"{verb}(finalize(qmodel), ...).")
        elif not isinstance(quantizer, KerasInferableQuantizer):
            kind = f"{type(quantizer).__module__}.{type(quantizer).__name__}"
            problem = f"{name} is a {kind}, whose codes are not known"
            raise UnsupportedConfigError(verb, problem, "a quantizer's convert2inferable returns one of this package.")
        elif quantizer.native:
            problem = f"{name} is of the kind {quantizer.native}, whose scales no file format here holds"
            raise UnsupportedConfigError(verb, problem, NAME_TARGET)
        elif quantizer.levels:
            problem = f"{name} has values of a table, which integer kernels don't have"
            raise UnsupportedConfigError(verb, problem, NAME_TARGET)


def named_quantizers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield every quantizer in use with a name."""
    for layer in layers_within(model):
        if isinstance(layer, KerasWrapper):
            name = plan_of(layer).layer.name
            yield from ((f"{name}.{attribute}", quantizer) for attribute, quantizer in layer.weights_quantizers.items())
        elif isinstance(layer, KerasHolder):
            yield key_of(layer), layer.activation_holder_quantizer


def network_of(
    framework: Framework, deployed: Any, *, numbers: bool = True, called: Mapping[str, str] | None = None
) -> Network:
    """Return a deployed model as `trainable_core.export` takes it.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    deployed : model
        The model.
    numbers : bool
        False tells any wrapped model, with a scale of 1 in the place of each, to see what becomes of its layers.
    called : mapping of str to str, optional
        Other names for layers than the model's.

    Raises
    ------
    ModelError
        When it has no graph, or values of another dtype than float32.
    """
    graph = framework.graph(deployed)
    if graph is None:
        problem = f"{type(deployed).__name__} has no graph; functional and Sequential models can be exported"
        raise ModelError(problem, "write the model with keras.Model(inputs, outputs) or keras.Sequential.")
    for layer in layers_within(deployed):
        if layer.weights and getattr(layer, "compute_dtype", None) not in ("float32", None):
            problem = f"{layer.name} computes in {layer.compute_dtype}; integer kernels know float32 alone"
            raise UnsupportedConfigError("export", problem, "train it with the dtype policy float32.")
    flow = flow_of(graph, framework.model_graph)
    return _Telling(framework, deployed, flow, numbers=numbers, called=called or {}).network()


def fit_to_target(framework: Framework, qmodel: Any) -> None:
    """Let a wrapped model round ties as the kernels of its recipe's target do.

    Raises
    ------
    ModelError
        When the target needs a model with a graph, and it has none.
    UnsupportedConfigError
        When integer kernels can't compute a layer, before it is trained; names it, and says why.
    """
    target = KNOWN_TARGETS[state_of(framework, qmodel).recipe.target]
    rules: Mapping[str, TieRule] = {}
    if target.name == document.TARGET:
        rules = tie_rules(lower(network_of(framework, qmodel, numbers=False)))
    for layer in layers_within(qmodel):
        if isinstance(layer, KerasHolder):
            told_of(layer).tie_rule = rules.get(key_of(layer), target.tie_rule)


class _Telling:
    """Tells a model's calls as steps; without numbers, every grid has the scale 1."""

    def __init__(
        self, framework: Framework, deployed: Any, flow: Flow, *, numbers: bool, called: Mapping[str, str]
    ) -> None:
        self.framework, self.deployed, self.flow, self.numbers = framework, deployed, flow, numbers
        self.called = called
        self.steps: list[Step] = []
        self.records: dict[str, QuantizerRecord] = {}
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.names: dict[int, str] = {}

    def network(self) -> Network:
        """Return the whole model."""
        graph = self.framework.graph(self.deployed)
        assert graph is not None  # noqa: S101 - `network_of` asked
        for number, name in zip(self.flow.inputs, input_names(graph.inputs), strict=True):
            self.names[number] = name
            self.shapes[name] = self.flow.shapes[number]
        inputs = [self.names[number] for number in self.flow.inputs]
        for call in self.flow.calls:
            self._call(call)
        state = state_of(self.framework, self.deployed)
        library = self.framework.module.__name__.partition(".")[0]
        versions = {name: metadata.version(name) for name in ("trainable-keras", "mct-quantizers")}
        versions[library] = str(import_module(library).__version__)
        return Network(
            inputs=inputs,
            outputs=[self.names[number] for number in self.flow.outputs],
            steps=self.steps,
            shapes=self.shapes,
            quantizers=self.records,
            tie_rule=TieRule.HALF_UP,
            recipe=state.recipe.model_dump(mode="json", exclude_none=True),
            versions=versions,
        )

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _call(self, call: FlatCall) -> None:
        operation = call.operation
        given = [self.names[number] for number in call.inputs]
        if isinstance(operation, KerasHolder):
            self.names[call.outputs[0]] = self._quantized(operation, given[0])
            return
        wrapper = operation if isinstance(operation, KerasWrapper) else None
        layer = self._name(plan_of(wrapper).layer.name if wrapper is not None else _place(call))
        if wrapper is not None:
            given = self._inputs(wrapper, given)
        output = self.flow.shapes[call.outputs[0]]
        shapes = [self.shapes[name] for name in given]
        found = told(self.framework, operation, call.call, shapes, output)
        result = self._computed(call, layer, found, given, output) if found.op else given[0]
        beside = not self.framework.function(operation) and found.op not in _NO_ACTIVATION
        activation = activation_of(operation) if beside else None
        if activation is not None:
            result = self._add(Step(activation.op, layer, (result,), self._fresh(layer), activation.options), output)
        if wrapper is not None and wrapper.output_holder is not None:
            result = self._quantized(wrapper.output_holder, result)
        self.names[call.outputs[0]] = result
        for number in call.outputs[1:]:
            step = Step(f"another output of {found.op}", layer, tuple(given), self._fresh(layer))
            self.names[number] = self._add(step, self.flow.shapes[number])

    def _computed(self, call: FlatCall, layer: str, found: Told, given: list[str], output: Shape) -> str:
        weight, bias = None, None
        if isinstance(call.operation, KerasWrapper):
            weight, bias = self._weight(call.operation, layer), self._bias(call.operation)
        inputs = tuple(given if found.inputs is None else given[: found.inputs])
        facts = (found.options, weight, bias, found.obstacle)
        if not found.is_row or found.obstacle:
            return self._add(Step(found.op, layer, inputs, self._fresh(layer), *facts), output)
        before = self._reshaped(layer, inputs[0], _of_image(self.shapes[inputs[0]]))
        if weight is not None:
            facts = (found.options, _weight_of_image(weight), bias, found.obstacle)
        made = self._add(Step(found.op, layer, (before,), self._fresh(layer), *facts), _of_image(output))
        return self._reshaped(layer, made, output)

    def _reshaped(self, layer: str, source: str, shape: Shape) -> str:
        return self._add(Step("reshape", layer, (source,), self._fresh(layer), {"shape": tuple(shape[1:])}), shape)

    def _inputs(self, wrapper: KerasWrapper, given: list[str]) -> list[str]:
        """Return what a layer computes with: its inputs behind the quantizers that it has for them."""
        names = told_of(wrapper).input_names
        found = list(given)
        for key, holder in wrapper.input_holders.items():
            index = names.index(key) if key in names else 0
            if index < len(found):
                found[index] = self._quantized(holder, found[index])
        return found

    def _quantized(self, holder: Any, source: str) -> str:
        """Add the step of a quantizer, if it is switched on."""
        quantizer = holder.activation_holder_quantizer
        if not self._counts(quantizer):
            return source
        layer, tensor = self._name(plan_of(holder).layer.name), told_of(holder).tensor
        name = f"{layer}: {tensor}"
        if name not in self.records:
            n_bits, grid = self._grid(quantizer)
            rule = told_of(holder).tie_rule
            self.records[name] = QuantizerRecord(name, layer, tensor, n_bits, grid, tie_rule=rule)
        step = Step("quantize", layer, (source,), self._fresh(name), {"quantizer": name})
        return self._add(step, self.shapes[source])

    def _name(self, layer: str) -> str:
        return self.called.get(layer, layer)

    def _weight(self, wrapper: KerasWrapper, layer: str) -> QuantizerRecord | None:
        """Return the record of a layer's only quantized weight."""
        known = [(a, w, q) for a, w, q in wrapper.get_weights_vars() if self._counts(q)]
        if len(known) != 1:
            return None
        attribute, weight, quantizer = known[0]
        name = f"{layer}.{attribute}"
        if name not in self.records:
            n_bits, grid = self._grid(quantizer)
            codes = np.zeros(tuple(weight.shape), np.int32)
            if self.numbers:
                values = wrapper.get_quantized_weights(training=False)[attribute]
                codes = codes_of(self.framework.functions.to_numpy(values), quantizer)
            self.records[name] = QuantizerRecord(name, layer, attribute, n_bits, grid, codes)
        return self.records[name]

    def _counts(self, quantizer: Any) -> bool:
        """Return whether a quantizer quantizes anything."""
        if self.numbers:
            return isinstance(quantizer, KerasInferableQuantizer)
        return not isinstance(quantizer, BaseTrainableQuantizer) or bool(quantizer.quantization_config.enabled)

    def _grid(self, quantizer: Any) -> tuple[int, QParams]:
        """Return the width of a quantizer's codes, and their grid."""
        if self.numbers:
            return quantizer.num_bits, quantizer.qparams
        is_trainable = isinstance(quantizer, BaseTrainableQuantizer)
        n_bits = quantizer.quantization_config.n_bits if is_trainable else quantizer.num_bits
        low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
        return n_bits, QParams(np.ones((), np.float32), np.zeros((), np.int32), low, high)

    def _bias(self, wrapper: KerasWrapper) -> NDArray[np.float32] | None:
        """Return the bias that a layer computes with."""
        bias = wrapper.bias_quantizer
        if not self.numbers:
            return None
        if bias is None:
            variable = vars(wrapper).get("bias", vars(wrapper).get("_bias"))
            return None if variable is None else self._real(variable)
        return self._real(bias(wrapper.value_of(variable_of(wrapper, bias.attribute))))

    def _real(self, value: Any) -> NDArray[np.float32]:
        return np.asarray(self.framework.functions.to_numpy(value), np.float32)

    def _fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.shapes:
            count += 1
            name = f"{wish}_{count}"
        return name

    def _add(self, step: Step, shape: tuple[int | None, ...]) -> str:
        self.steps.append(step)
        self.shapes[step.output] = tuple(shape)
        return step.output


_NO_ACTIVATION = frozenset({"", "clip", "softmax", *ACTIVATIONS.values()})
"""What a layer whose activation function is all that it does comes out as."""


def _of_image(shape: Shape) -> Shape:
    """Return the shape of an image of one row."""
    return (shape[0], 1, *shape[1:])


def _weight_of_image(record: QuantizerRecord) -> QuantizerRecord:
    """Return the weight of a convolution over a row as that of one over an image of one row."""
    axis = record.grid.channels_axis
    axis = axis if axis is None or axis < 0 else axis + 1
    codes = record.codes
    assert codes is not None  # noqa: S101 - a weight's record
    return replace(record, grid=replace(record.grid, channels_axis=axis), codes=codes[np.newaxis])


def _place(call: FlatCall) -> str:
    name = str(call.operation.name)
    return f"{call.prefix}.{name}" if call.prefix else name


def input_names(tensors: Sequence[Any]) -> list[str]:
    """Return the names of a model's inputs; those that Keras gave count up in a process, and are left out."""
    names = [str(tensor.name).partition(":")[0] for tensor in tensors]
    given = [name if not _BY_KERAS.fullmatch(name) and names.count(name) == 1 else "" for name in names]
    own = "input" if len(names) == 1 else "input_{}"
    return [name or own.format(index) for index, name in enumerate(given)]


def same_places(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Return the name that each layer has in a file, where only the numbers differ that Keras gives to names.

    It counts layers in a process, so a model that is made again has others.

    Parameters
    ----------
    names, others : sequence of str
        The names of the layers in the model, and in the file, each in order.

    Examples
    --------
    >>> same_places(["conv2d_7", "top"], ["conv2d", "top"]), same_places(["left"], ["right"])
    ({'conv2d_7': 'conv2d'}, {})
    """
    plain = [[re.sub(r"[_\d]+(?=\.|$)", "", name) for name in each] for each in (names, others)]
    if plain[0] != plain[1]:
        return {}
    return {name: other for name, other in zip(names, others, strict=True) if name != other}


_BY_KERAS = re.compile(r"(keras_tensor|input|input_layer|.*_input)(_\d+)?")
"""Names that Keras gives to inputs."""


def codes_of(values: NDArray[Any], quantizer: KerasInferableQuantizer) -> NDArray[np.int32]:
    """Return the codes of values that are on a quantizer's grid."""
    along = quantizer.qparams.along(values.ndim)
    steps = np.rint(values.astype(np.float64) / along.scale.astype(np.float64))
    return np.asarray((steps.astype(np.int64) + along.zero_point).astype(np.int32))
