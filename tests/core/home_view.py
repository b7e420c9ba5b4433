"""A model whose tensors are NumPy arrays, as core looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.core.home_backend import activation_config, activation_quantizer, weights_config, weights_quantizer
from trainable_core.backend.view import ModelView, QuantizedTensor, See
from trainable_core.calibration.batches import inputs_of
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.qparams import Float32
from trainable_core.reference.affine import fake_quantize

PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


class HomeView(ModelView):
    """A layer ``fc`` with a weight of two channels and an input, and a batch norm ``norm``."""

    def __init__(self, threshold: Any = (1.0, 2.0), weight: Any = ((0.1, -0.6, 0.9), (0.2, 0.3, 4.0))) -> None:
        super().__init__(None)
        self.weight = np.asarray(weight, np.float32)
        self.weights = weights_quantizer(weights_config({THRESHOLD: list(threshold)}, **PER_CHANNEL))
        of_input = activation_config({RANGE_MIN: -1.0, RANGE_MAX: 1.0}, method="UNIFORM", n_bits=8)
        self.activations = activation_quantizer(of_input)
        self.holder = object()
        self.seen: Mapping[Any, See] = {}
        self.statistics = np.zeros(2, np.float32), np.ones(2, np.float32)

    def tensors(self) -> list[QuantizedTensor]:
        """Return the weight and the input."""
        return [
            QuantizedTensor("fc", "weight", self.weights, weight=self.weight),
            QuantizedTensor("fc", "input", self.activations, holder=self.holder),
        ]

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return an array."""
        return np.asarray(tensor.weight, np.float32)

    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return the weight on its grid."""
        assert tensor.grid is not None
        return np.asarray(fake_quantize(tensor.weight, tensor.grid))

    @contextmanager
    def seeing(self, seen: Mapping[Any, See]) -> Iterator[None]:
        """Show batches."""
        self.seen = seen
        yield
        self.seen = {}

    def call(self, batch: Any) -> Any:
        """Show a batch to whoever looks at the input."""
        for see in self.seen.values():
            see(inputs_of(batch))

    def is_tensor(self, batches: Any) -> bool:
        """Return whether it is an array."""
        return isinstance(batches, np.ndarray)

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return the statistics."""
        return {"norm": self.statistics}
