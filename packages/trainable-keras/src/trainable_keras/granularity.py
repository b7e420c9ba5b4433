"""Deployed quantizers that mct-quantizers lacks: of weights in blocks, and of activations with scales of their own.

`keras2.granularity` and `keras3.granularity` join them with the layer of that Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

from mct_quantizers import QuantizationMethod as MctqMethod
from mct_quantizers import QuantizationTarget as MctqTarget
from mct_quantizers import mark_quantizer
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer, QuantizerID

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import ModelError
from trainable_core.granularity import Blocks
from trainable_core.qparams import QParams, code_range
from trainable_core.reference import dynamic
from trainable_keras.functions import Functions, Tensor
from trainable_keras.grid import GridMaker
from trainable_keras.inferable import SHORT, KerasInferableQuantizer, grid_of_arguments

ROWS_NDIM = 2
"""Number of dimensions of a tensor that is laid out with one block per row."""

BLOCKS, DYNAMIC = "blocks", "dynamic"
"""Kinds of deployed quantizers that mctq lacks."""

Q = TypeVar("Q", bound="KerasInferableQuantizer")


def rows_of(f: Functions, x: Tensor, blocks: Blocks) -> Tensor:
    """Return a tensor of known shape laid out with one row per block."""
    layout = blocks.layout(tuple(x.shape))
    return f.reshape(f.transpose(f.reshape(x, layout.split), layout.order), layout.rows)


def tensor_of(f: Functions, rows: Tensor, blocks: Blocks, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of a shape that `rows_of` was called on."""
    layout = blocks.layout(shape)
    return f.reshape(f.transpose(f.reshape(rows, layout.permuted), layout.back), layout.shape)


class _Native(KerasInferableQuantizer):
    """What the quantizers that mctq lacks share."""

    def to_mctq(self) -> Any:
        """Refuse.

        Raises
        ------
        ModelError
            Always: mctq has no such quantizer.
        """
        raise ModelError(f"mctq has no counterpart of {type(self).__name__}")


class InBlocks(_Native):
    """Deployed weights with one scale per block.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers, one per block along axis 0.
    n_bits : int
        Width of the codes.
    blocks : Blocks
        Which elements share a scale.
    name : str, optional
        Name of the layer.
    """

    native: ClassVar[str] = BLOCKS
    blocks: Blocks

    def __init__(self, qparams: QParams, n_bits: int, blocks: Blocks, name: str | None = None) -> None:
        super().__init__(qparams, n_bits, ROWS_NDIM, name)
        self.blocks = blocks

    def snapped(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; no gradient is defined."""
        rows = super().snapped(rows_of(self.functions, inputs, self.blocks))
        return tensor_of(self.functions, rows, self.blocks, tuple(inputs.shape))

    def get_config(self) -> dict[str, Any]:
        """Return the numbers as mctq's arguments have them, and the blocks: JSON-clean and lossless."""
        return {**super().get_config(), "blocks": {**asdict(self.blocks), "axes": list(self.blocks.axes)}}

    @classmethod
    def from_config(cls: type[Any], config: Mapping[str, Any]) -> Any:
        """Return a quantizer equal to the one that `get_config` was called on."""
        qparams, n_bits, _ = grid_of_arguments(config, cls.method())
        blocks = config["blocks"]
        made = Blocks(tuple(blocks["axes"]), blocks["group_axis"], blocks["group_size"])
        return cls(qparams, n_bits, made, name=config.get("name"))


def dynamic_grid(
    f: Functions,
    grids: GridMaker[Any],
    x: Tensor,
    method: QuantizationMethod,
    n_bits: int,
    *,
    signed: bool,
    min_threshold: float,
    per_token: bool,
) -> Any:
    """Return the grid that a float32 tensor has for itself; see `trainable_core.reference.dynamic`.

    Parameters
    ----------
    f, grids
        The framework's functions, and what makes its grids.
    x : Tensor, float32, any shape
        What is to be quantized.
    method, n_bits, signed, min_threshold
        The kind of the grid.
    per_token : bool
        Whether each vector along the last axis has a scale of its own.
    """
    x = f.stop_gradient(x)
    x = f.where(f.isnan(x), f.zeros_like(x), x)
    along: dict[str, Any] = {"axis": -1, "keepdims": True} if per_token and f.rank(x) != 0 else {}
    quant_min, quant_max = code_range(method, n_bits, signed=signed)
    if method is QuantizationMethod.UNIFORM:
        range_min, range_max = -f.largest(-x, **along), f.largest(x, **along)
        return grids.uniform(range_min, range_max, n_bits, min_threshold=min_threshold)
    threshold = f.largest(f.abs(x) if quant_min < 0 else x, **along) * dynamic.headroom(quant_min, quant_max)
    power_of_two = method is QuantizationMethod.POWER_OF_TWO
    return grids.symmetric(threshold, n_bits, signed=signed, power_of_two=power_of_two, min_threshold=min_threshold)


class OfItself(_Native):
    """Deployed activations whose scales are computed from the tensor itself.

    Parameters
    ----------
    n_bits : int
        Width of the codes.
    signed : bool
        Whether a symmetric grid reaches below zero.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    granularity : {"token", "tensor"}
        What has a scale of its own.
    name : str, optional
        Name of the layer.
    """

    native: ClassVar[str] = DYNAMIC
    grids: ClassVar[GridMaker[Any]]

    def __init__(
        self, n_bits: int, *, signed: bool, min_threshold: float, granularity: str, name: str | None = None
    ) -> None:
        super().__init__(None, n_bits, 0, name)
        self.signed, self.min_threshold, self.granularity = signed, min_threshold, granularity

    @property
    def params(self) -> dict[str, Any]:
        """Nothing: no number is kept."""
        return {}

    def snapped(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to its own grid, in the input's dtype; the gradient passes, as in training."""
        f = self.functions
        x = f.cast(inputs, "float32")
        values = self.ops.straight_through(self._on_own_grid(f.stop_gradient(x)), x)
        return f.cast(values, f.dtype_of(inputs))

    def _on_own_grid(self, x: Tensor) -> Tensor:
        grid = dynamic_grid(
            self.functions,
            self.grids,
            x,
            self.method(),
            self.num_bits,
            signed=self.signed,
            min_threshold=self.min_threshold,
            per_token=self.granularity == dynamic.TOKEN,
        )
        zero_point = None if grid.centered else grid.zero_point
        snapped = self.ops.snap(x, grid.scale, zero_point, grid.quant_min, grid.quant_max)
        return self.functions.show_shape(snapped, x)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments: JSON-clean and lossless."""
        names = ("num_bits", "signed", "min_threshold", "granularity", "name")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls: type[Any], config: Mapping[str, Any]) -> Any:
        """Return a quantizer equal to the one that `get_config` was called on."""
        fields = {name: config[name] for name in ("signed", "min_threshold", "granularity")}
        return cls(config["num_bits"], **fields, name=config.get("name"))


def native_classes_for(
    base: type[Any], grids: GridMaker[Any], module: str, register: Callable[[Any], Any]
) -> dict[str, type[Any]]:
    """Return the deployed quantizer classes that mctq lacks of one Keras, by their names.

    Parameters
    ----------
    base : type
        That Keras's layer, its `InferableQuantizer`.
    grids : GridMaker
        Makes grids of that Keras's tensors.
    module : str
        Module that will have the classes.
    register : callable
        Decorates a class with the name that Keras saves it under.
    """
    kinds = {
        "Blocks": (InBlocks, QuantizationTarget.Weights, "weights with one scale per block"),
        "Dynamic": (OfItself, QuantizationTarget.Activation, "activations with scales of their own"),
    }
    classes: dict[str, type[Any]] = {}
    for word, (mixin, target, what) in kinds.items():
        for method, short in SHORT.items():
            name = f"{target.name}{short}{word}InferableQuantizer"
            members = {"__doc__": f"Deployed {method.name} {what}.", "__module__": module, "grids": grids}
            cls: Any = UnlistedSubclass(name, (mixin, base), members, of=BaseInferableQuantizer)
            mark = mark_quantizer(MctqTarget[target.name], [MctqMethod[method.name]], QuantizerID.INFERABLE)
            classes[name] = register(mark(cls))
    return classes
