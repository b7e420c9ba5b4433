"""A model whose tensors are NumPy arrays, as core looks at it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.core.home_backend import activation_config, activation_quantizer, weights_config, weights_quantizer
from trainable_core.backend.view import Forward, ModelView, QuantizedTensor, See, VariableKey
from trainable_core.calibration.batches import inputs_of
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.qparams import Float32
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.plan import QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_core.reference.affine import fake_quantize

PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}
STEP = 2**-12
"""Half the distance of the two values of a variable between which a slope is measured."""


class HomeView(ModelView):
    """A layer ``fc`` with a weight of two channels and an input, and a batch norm ``norm``.

    Each value of a batch goes into all inputs of the layer.
    """

    package = "home"

    def __init__(
        self,
        threshold: Any = (1.0, 2.0),
        weight: Any = ((0.1, -0.6, 0.9), (0.2, 0.3, 4.0)),
        *,
        forward: Forward | None = None,
        **weights: Any,
    ) -> None:
        self.weight = np.asarray(weight, np.float32)
        config = weights_config({THRESHOLD: list(threshold)}, **PER_CHANNEL, **weights)
        self.weights = weights_quantizer(config)
        of_input = activation_config({RANGE_MIN: -1.0, RANGE_MAX: 1.0}, method="UNIFORM", n_bits=8)
        self.activations = activation_quantizer(of_input)
        layer = LayerInfo("fc", "linear", {"weight": WeightInfo(self.weight.shape, 0, 1)})
        tensors = [
            QuantizedTensor(layer, "weight", QuantizerPlan(config, "HOME"), self.weights, "wrapper"),
            QuantizedTensor(layer, "input", QuantizerPlan(of_input, "HOME"), self.activations, "holder"),
        ]
        recipe = QuantizationRecipe.model_validate(
            {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "HOME"}}
        )
        super().__init__(None, WrappedState(recipe), tensors, forward)
        self.seen: Mapping[QuantizedTensor, See] = {}
        self.layers: Collection[str] | None = None
        self.replaced: Mapping[QuantizedTensor, Float32] = {}
        self.outputs: list[Float32] | None = None
        self.statistics = np.zeros(2, np.float32), np.ones(2, np.float32)

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return the weight."""
        assert tensor.is_weight
        return self.weight

    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return the weight on its grid."""
        return self._on_grid(tensor, self.weight)

    @staticmethod
    def _on_grid(tensor: QuantizedTensor, values: Float32) -> Float32:
        return values if tensor.grid is None else np.asarray(fake_quantize(values, tensor.grid))

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return the statistics."""
        return {"norm": self.statistics}

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Do nothing: a call changes nothing."""
        yield

    @contextmanager
    def watching(self, seen: Mapping[QuantizedTensor, See]) -> Iterator[None]:
        """Show batches."""
        self.seen = seen
        yield
        self.seen = {}

    @contextmanager
    def quantizing(self, layers: Collection[str] | None) -> Iterator[None]:
        """Let the layer quantize or not."""
        self.layers = layers
        yield
        self.layers = None

    @contextmanager
    def replacing(self, values: Mapping[QuantizedTensor, Float32]) -> Iterator[None]:
        """Let the weight be another one."""
        self.replaced = values
        yield
        self.replaced = {}

    @contextmanager
    def outputs_of(self, tensor: QuantizedTensor) -> Iterator[list[Float32]]:
        """Note what the layer returns."""
        assert tensor.is_weight
        self.outputs = []
        yield self.outputs
        self.outputs = None

    def call(self, batch: Any) -> Float32:
        """Return the layer's output, (N, 2), and show its input to whoever looks at it."""
        weight, x = self.tensors()
        values = np.asarray(inputs_of(batch), np.float32).reshape(-1, 1)
        quantizes = self.layers is None or "fc" in self.layers
        quantized = self._on_grid(x, values) if quantizes else values
        for see in self.seen.values():
            see(values.reshape(-1), lambda: quantized.reshape(-1))
        own = self.quantized(weight) if quantizes else self.weight
        output = quantized * self.replaced.get(weight, own).sum(axis=1)
        if self.outputs is not None:
            self.outputs.append(output)
        return np.asarray(output, np.float32)

    def call_teacher(self, teacher: Any, batch: Any) -> Any:
        """Call a function."""
        return teacher(batch)

    def main_output(self, outputs: Any) -> Float32:
        """Return the only output."""
        return np.asarray(outputs, np.float32)

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Float32], Float32]
    ) -> Mapping[VariableKey, Float32 | None]:
        """Return slopes between neighbouring values of each variable."""
        given = upstream(self.run(batch))
        found = {}
        for key, variable in variables.items():
            found[key] = slopes = np.zeros_like(variable)
            for place in np.ndindex(variable.shape):
                before = variable[place]
                ends = []
                for step in (STEP, -STEP):
                    variable[place] = before + step
                    ends.append(float((given * self.run(batch)).sum()))
                variable[place] = before
                slopes[place] = (ends[0] - ends[1]) / (2 * STEP)
        return found
