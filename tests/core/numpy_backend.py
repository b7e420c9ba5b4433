"""A backend in NumPy, small and whole: the kit is tested without any framework."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np

from trainable_core.conformance import Run
from trainable_core.conformance.adapter import PLAIN, BaseAdapter
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule, TrainingMethod, VariableGroup
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.reference import affine, ste


class Variable:
    """A mutable array with an identity, as frameworks have."""

    def __init__(self, value: Any) -> None:
        self.value = np.array(value, np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


class NumpySte(BaseTrainableQuantizer):
    """The straight-through estimator: the reference itself."""

    backend = "numpy"
    quantization_target = QuantizationTarget.Weights
    quantization_method = (QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM)
    identifier = TrainingMethod.STE

    def add_quantizer_variable(self, name, variable, group=VariableGroup.QPARAMS, *, trained=None):
        setattr(self, name, Variable(variable))
        self._variable_groups[name] = group

    def get_trainable_variables(self, group):
        return []

    def to_numpy(self, variable):
        return variable.value

    def assign(self, variable, value):
        variable.value = np.array(value, np.float32)

    def freeze(self, frozen=True):
        self.freeze_quant_params = frozen

    def __call__(self, x, training=False):
        if not self.quantization_config.enabled:
            return x.copy()
        self.require_calibrated()
        return self.snap(x)

    def snap(self, x):
        return affine.fake_quantize(x, self.current_qparams())

    def convert2inferable(self):
        self.require_calibrated()
        return copy.deepcopy(self)


class NumpyAdapter(BaseAdapter):
    backend = "numpy"
    tie_rule = TieRule.HALF_EVEN
    counts_calls, subnormals = False, True
    dtypes = ("float32", "float64")
    devices = ("cpu",)
    modules = ("numpy",)

    def run(self, quantizer, x, *, training, dtype, device, upstream, way=PLAIN):
        given = x.astype(dtype)
        values = quantizer(given, training)
        gradient = None if upstream is None else upstream
        if gradient is not None and quantizer.quantization_config.enabled:
            gradient = ste.gradients(given, upstream, quantizer.current_qparams()).x
        return Run(values, str(values.dtype), device, given, gradient, {})

    def deployed(self, quantizer):
        inferable = quantizer.convert2inferable()

        def call(x, dtype, way):
            values = inferable(x.astype(dtype))
            return Run(values, str(values.dtype), "cpu", x)

        return call

    def entries(self, quantizer):
        return {name: getattr(quantizer, name).value for name in quantizer.variable_names}

    def restore_entries(self, quantizer, state):
        if set(state) != set(quantizer.variable_names):
            raise KeyError(sorted(state))
        self.restore(quantizer, pickle.dumps((dict(state), quantizer.signed)))

    def trained(self, quantizer):
        return {}

    def descend(self, quantizer, gradients):
        pass

    def copy(self, quantizer):
        return copy.deepcopy(quantizer)

    def save(self, quantizer):
        state = {name: getattr(quantizer, name).value for name in quantizer.variable_names}
        return pickle.dumps((state, quantizer.signed))

    def restore(self, quantizer, state):
        values, quantizer.signed = pickle.loads(state)  # noqa: S301 - our own, of a moment ago
        for name, value in values.items():
            quantizer.assign(getattr(quantizer, name), value)
        quantizer.calibrated = True

    def model(self):
        raise NotImplementedError  # nothing is registered for it, so no law asks


ADAPTER = NumpyAdapter()
