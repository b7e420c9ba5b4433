"""A Keras of a few lines: layers with variables, models with a graph; core's Keras modules are tested without any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.core.numpy_backend import NumpySte, Variable
from trainable_core.backend.inferable import KerasDeployed, by_grid, grid_of_arguments
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import ModelError
from trainable_core.hookspecs import Backend, hookimpl
from trainable_core.qparams import QParams
from trainable_core.reference import affine
from trainable_keras.copying import ModelCopier, attributes, layers_in
from trainable_keras.folding import Folding
from trainable_keras.graph import Call, Graph
from trainable_keras.layers import LayerTypes, find_weight, layer_info
from trainable_keras.parts import KerasHolder, KerasWrapper
from trainable_keras.wrapping import Framework


class Layer:
    """A layer that remembers its config; what is called with tensors returns one."""

    trainable = True

    def __init__(self, name: str = "layer") -> None:
        self.name, self.built = name, True

    @property
    def direct(self) -> list[Any]:
        held = [value for _, value in attributes(self)]
        flat = [item for value in held for item in (value if isinstance(value, list | tuple) else [value])]
        more = [item for value in held if isinstance(value, dict) for item in value.values()]
        return [each for each in [*flat, *more] if isinstance(each, Layer)]

    @property
    def variables(self) -> list[Variable]:
        own = [value for value in vars(self).values() if isinstance(value, Variable)]
        return own + [variable for each in self.direct for variable in each.variables]

    trainable_variables = variables

    def get_build_config(self) -> dict[str, Any]:
        return {}

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return x


class Dense(Layer):
    def __init__(self, name: str = "dense", kernel: Any = ((1.0, -2.0), (0.5, 0.25)), bias: Any = None) -> None:
        super().__init__(name)
        self.kernel, self.use_bias, self.activation = Variable(kernel), bias is not None, None
        self.bias = Variable(np.zeros(self.kernel.shape[-1]) if bias is None else bias) if self.use_bias else None

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return x @ self.kernel.value + (0 if self.bias is None else self.bias.value)


class ReLU(Layer):
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return np.maximum(x, 0)


class EinsumDense(Dense):
    equation = "ab,bc->ac"


class Add(Layer):
    def get_build_config(self) -> dict[str, Any]:
        return {"input_shape": [(None, 2), (None, 2)]}


class BatchNormalization(Layer):
    def __init__(self, name: str = "norm", axis: int = -1) -> None:
        super().__init__(name)
        self.axis, self.epsilon = axis, 1.0
        self.gamma, self.beta = Variable([2.0, 4.0]), Variable([1.0, -1.0])
        self.moving_mean, self.moving_variance = Variable([1.0, 2.0]), Variable([3.0, 15.0])


class Foreign(Layer):
    """A layer of no known kind with a weight of its own."""

    def __init__(self, name: str = "foreign") -> None:
        super().__init__(name)
        self.matrix = Variable([[1.0, 2.0]])


class Multiply:
    """A functional operation; no layer."""

    name = "multiply"

    def __call__(self, x: Any, y: Any) -> Any:
        return x * y


class Chain(Layer):
    """A model with a graph: layers and operations one after the other."""

    def __init__(self, *layers: Any, name: str = "chain") -> None:
        super().__init__(name)
        self.layers = list(layers)

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        for layer in self.layers:
            x = layer(x, x) if isinstance(layer, Multiply) else layer(x)
        return x

    @property
    def graph(self) -> Graph:
        tensors = [SimpleNamespace(shape=(None, 2)) for _ in range(len(self.layers) + 1)]
        calls = [Call(each, [tensors[i]], [tensors[i + 1]]) for i, each in enumerate(self.layers)]
        return Graph(calls, tensors[-1:])


LAYERS = SimpleNamespace(
    Layer=Layer, Dense=Dense, ReLU=ReLU, EinsumDense=EinsumDense, Add=Add, BatchNormalization=BatchNormalization
)
KERAS = SimpleNamespace(layers=LAYERS, activations=SimpleNamespace(linear="linear"))


class Trainable(NumpySte, Layer):
    """A quantizer that is a layer, as in both Kerases."""

    backend = "toy"

    def __init__(self, config: Any, freeze_quant_params: bool = False) -> None:
        Layer.__init__(self, "quantizer")
        NumpySte.__init__(self, config, freeze_quant_params)

    @property
    def variables(self) -> list[Variable]:
        return [self.get_quantizer_variable(name) for name in self.variable_names]

    def __call__(self, x: Any, training: Any = None) -> Any:
        return NumpySte.__call__(self, x, training)

    def convert2inferable(self) -> Any:
        self.require_calibrated()
        config = self.quantization_config
        cls = class_of(config.target, config.quantization_method)
        return cls(self.current_qparams(), config.n_bits, 0 if self.activation_quantization() else 2)


class ActivationTrainable(Trainable):
    quantization_target = QuantizationTarget.Activation


class Deployed(KerasDeployed, Layer):
    quantization_target = QuantizationTarget.Weights
    quantization_method = (QuantizationMethod.SYMMETRIC,)

    def __init__(self, qparams: QParams, n_bits: int, ndim: int) -> None:
        Layer.__init__(self, "deployed")
        self.start(qparams, n_bits, ndim)
        along = qparams.along(ndim)
        self.grid_scale, self.grid_zero_point = Variable(along.scale), Variable(along.zero_point)

    @staticmethod
    def to_numpy(value: Any) -> np.ndarray:
        return value.value

    def __call__(self, x: Any) -> Any:
        return affine.fake_quantize(x, self.qparams)

    def get_config(self) -> dict[str, Any]:
        return self.mctq_arguments()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Deployed:
        return cls(*grid_of_arguments(config, cls.method()))


class ActivationDeployed(Deployed):
    quantization_target = QuantizationTarget.Activation


_CLASSES = by_grid(Deployed, ActivationDeployed)


def class_of(target: QuantizationTarget, method: QuantizationMethod) -> type[Any]:
    return _CLASSES[target, method]


class Holder(KerasHolder, Layer):
    backend = "toy"
    class_of = staticmethod(class_of)

    def __init__(self, quantizer: Any, name: str | None = None) -> None:
        Layer.__init__(self, name or "holder")
        self.activation_holder_quantizer = quantizer
        self.start(quantizer)

    def __call__(self, x: Any, training: Any = None) -> Any:
        if self.observer is not None:
            self.observe(np.asarray(x, np.float32))
            return x
        return self.activation_holder_quantizer(x)


class Wrapper(KerasWrapper, Layer):
    backend = "toy"
    class_of = staticmethod(class_of)
    holder_class = Holder
    value_of = staticmethod(lambda variable: variable.value)

    def __init__(self, layer, weights_quantizers, *, input_holders=None, input_names=("inputs",), output_holder=None,
                 name=None):  # fmt: skip
        self.check(layer, Layer, weights_quantizers)
        Layer.__init__(self, name or layer.name)
        self.layer, self.weights_quantizers = layer, dict(weights_quantizers)
        self.input_holders, self.input_names = dict(input_holders or {}), tuple(input_names)
        self.output_holder, self.quantizes_weights = output_holder, True
        self.keep(plan=None, notes=None)
        self.initialize_quantizers()

    @staticmethod
    def find_weight(layer: Any, attribute: str) -> Any | None:
        return find_weight(layer, attribute, Variable)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values, kwargs = self.quantize_inputs(args, kwargs, None)
        layer = Dense(kernel=self.layer.kernel.value)
        if self.quantizes_weights:
            layer.kernel.value = self.get_quantized_weights().get("kernel", layer.kernel.value)
        return self.quantize_output(layer(*values, **kwargs), None)


def is_layer(operation: Any) -> bool:
    return isinstance(operation, Layer)


def graph_of(layer: Any) -> Graph | None:
    return layer.graph if isinstance(layer, Chain) else None


def children(layer: Any) -> list[tuple[str, Any]]:
    held = {id(each) for each in layer.direct}
    return [pair for name, value in attributes(layer) for pair in layers_in(value, name, held)]


def layers_within(layer: Any) -> list[Any]:
    found = {id(layer): layer}
    for each in layer.direct:
        found |= {id(inner): inner for inner in layers_within(each)}
    return list(found.values())


def check(model: Any, what: str) -> None:
    if not isinstance(model, Layer):
        raise ModelError(f"{what} is no toy")


def copied(layer: Any, name: str) -> Any:
    new = object.__new__(type(layer))
    vars(new).update({key: Variable(v.value) if isinstance(v, Variable) else v for key, v in vars(layer).items()})
    return new


class Copier(ModelCopier):
    def is_graph(self, layer):
        return isinstance(layer, Chain)

    def holds_layers(self, layer):
        return TYPES.kind_of(layer) is None and bool(children(layer))

    def copy_graph(self, model, prefix):
        made = []
        for each in model.layers:
            name = f"{prefix}.{each.name}" if prefix else each.name
            if is_layer(each) or self.call_operation is None:
                made.append(self.copy(each, name) if is_layer(each) else each)
            else:
                made.append(self.called(each, name))
        return Chain(*made, name=model.name)

    def called(self, operation, name):
        layer = Layer(operation.name)
        layer.call = lambda x, y=None: self.call_operation(operation, name, (x, x), {})
        return layer

    def copy_holding(self, layer, prefix):
        new = copied(layer, prefix)
        held = {id(each) for each in layer.direct}
        for name, value in attributes(layer):
            if any(True for _ in layers_in(value, name, held)):
                setattr(new, name, self.copied_value(value, f"{prefix}.{name}" if prefix else name, held))
        return new

    def copy_plain(self, layer, name):
        return copied(layer, name)


TYPES = LayerTypes(LAYERS)


def op_of(operation: Any) -> str | None:
    if isinstance(operation, Multiply):
        return "mul"
    kind = TYPES.kind_of(operation)
    return None if kind is None else kind.op


def framework(**changes: Any) -> Framework[Any]:
    """Return the toy as `Framework`, with other parts in the place of some."""
    parts: dict[str, Any] = {
        "backend": "toy",
        "package": "trainable_toy",
        "layer": Layer,
        "quantizer": Trainable,
        "wrapper": Wrapper,
        "holder": Holder,
        "copier": Copier,
        "check": check,
        "layers_within": layers_within,
        "children": children,
        "graph": graph_of,
        "is_layer": is_layer,
        "kind": TYPES.kind_of,
        "op": op_of,
        "info": lambda name, layer, kind: layer_info(name, layer, kind, Wrapper.find_weight),
        "folding": lambda model: Folding(),
        "plain_copy": copied,
        "folded_copy": lambda layer, norm, name: copied(layer, name),
        "passing": lambda norm: Layer(norm.name),
        "map_symbolic": lambda function, values: ([function(each) for each in values[0]], values[1]),
    }
    return Framework(**{**parts, **changes})


class ToyPlugin:
    @hookimpl
    def trainable_register_backend(self) -> Backend:
        return Backend("toy", "trainable-toy", ("numpy",), TieRule.HALF_EVEN, "toy")

    @hookimpl
    def trainable_register_quantizers(self, backend: str) -> list[type]:
        return [Trainable, ActivationTrainable] if backend == "toy" else []
