"""Dynamic activations; defined by `trainable_core.reference.dynamic`."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.options import DynamicOptions
from trainable_core.reference import dynamic
from trainable_keras.functions import Tensor
from trainable_keras.granularity import DYNAMIC, dynamic_grid
from trainable_keras.quantizers.base import KerasQuantizer


class DynamicQuantizer(DynamicOptions, KerasQuantizer):
    """Scales are computed from the tensor itself; see `trainable_core.reference.dynamic`.

    Its arguments are those of `trainable_core.backend.options.DynamicOptions`.
    """

    declaration = dynamic.METHOD

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid that it has for itself, in training as in evaluation."""
        f, config = self.functions, self.quantization_config
        values = f.stop_gradient(x)
        grid = dynamic_grid(
            f,
            self.grids,
            values,
            config.quantization_method,
            config.n_bits,
            signed=self.signed,
            min_threshold=config.min_threshold,
            per_token=self.granularity == dynamic.TOKEN,
        )
        zero_point = None if grid.centered else grid.zero_point
        snapped = self.ops.snap(values, grid.scale, zero_point, grid.quant_min, grid.quant_max)
        return self.ops.straight_through(f.show_shape(snapped, x), x)

    def convert2inferable(self) -> Any:
        """Return the deployed quantizer, which computes its scales as this one does.

        Raises
        ------
        QuantizerStateError
            When the quantizer is not initialized, or its config switches quantization off.
        """
        self.require_deployable()
        config = self.quantization_config
        make: Any = self.inferable_class(config.target, config.quantization_method, DYNAMIC)
        return make(config.n_bits, signed=self.signed, min_threshold=config.min_threshold, granularity=self.granularity)
