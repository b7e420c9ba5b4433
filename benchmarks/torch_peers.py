"""One fake quantization by another library beside ours, in one process: multiples of copying input and gradient once.

Run by ``nox -s bench_peers``, which gives each library an environment of its own; by hand, in such an environment:

Usage: ``python benchmarks/torch_peers.py --peer NAME [--rounds N]``
"""

from __future__ import annotations

import importlib
import importlib.metadata
import statistics
from collections.abc import Callable
from typing import Any

import torch
from columns import BITS, COLUMNS
from measuring import interleaved, report, table
from torch import Tensor
from torch_kernels import CHANNELS, floor, step
from torch_measuring import arguments, conditions

from trainable_core import QuantizationMethod

SHAPES = {"act": [(16, 256, 28, 28), (8, 512, 768)], "weight": [(512, 512, 3, 3), (3072, 768)]}

Make = Callable[[str, bool, int | None, int, tuple[int, ...]], Callable[[Tensor], Tensor] | None]
"""From target (``act`` or ``weight``), learned, axis, bits and shape to a function; None for what it doesn't offer."""


def _torchao(_target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    count = 1 if axis is None else shape[axis]
    block = shape if axis is None else (1, *shape[1:])
    scale = torch.full((count,), 2.0 / 2 ** (n_bits - 1), requires_grad=learned)
    zero_point = torch.zeros(count, dtype=torch.int32)
    ends = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    return lambda x: primitives._fake_quantize_affine(x, block, scale, zero_point, torch.int8, *ends)  # noqa: SLF001 - what its modules call


def _brevitas(target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    layers, quant = importlib.import_module("brevitas.nn"), importlib.import_module("brevitas.quant")
    if target == "act":
        return layers.QuantIdentity(
            act_quant=quant.Int8ActPerTensorFloat,
            bit_width=n_bits,
            scaling_impl_type="PARAMETER" if learned else "CONST",
            scaling_init=2.0,
        )
    layer = layers.QuantLinear(
        shape[1] if len(shape) == 2 else shape[1] * shape[2] * shape[3],  # noqa: PLR2004 - a linear layer's weight
        shape[0],
        bias=False,
        weight_quant=quant.Int8WeightPerTensorFloat if axis is None else quant.Int8WeightPerChannelFloat,
        weight_bit_width=n_bits,
        weight_scaling_impl_type="PARAMETER_FROM_STATS" if learned else "STATS",
    )
    layer.quant_weight()  # takes its statistics
    return lambda x: _value(layer.weight_quant(x.flatten(1))).view_as(x)


def _value(quantized: Any) -> Tensor:
    value: Tensor = getattr(quantized, "value", quantized)
    return value


def _modelopt(_target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    if learned:
        return None
    nn = importlib.import_module("modelopt.torch.quantization.nn")
    config = importlib.import_module("modelopt.torch.quantization.config")
    made = nn.TensorQuantizer(config.QuantizerAttributeConfig(num_bits=n_bits, axis=axis))
    sizes = [1] * len(shape)
    if axis is not None:
        sizes[axis] = shape[axis]
    made.amax = torch.full(sizes, 2.0) if axis is not None else torch.tensor(2.0)
    return made


def _nncf(_target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    layers = importlib.import_module("nncf.torch.quantization.layers")
    structs = importlib.import_module("nncf.common.quantization.structs")
    sizes = (1,) if axis is None else (shape[0], *[1] * (len(shape) - 1))
    spec = layers.PTQuantizerSpec(
        num_bits=n_bits,
        mode=structs.QuantizationScheme.SYMMETRIC,
        signedness_to_force=True,
        narrow_range=False,
        half_range=False,
        scale_shape=sizes,
        logarithm_scale=False,
    )
    made = layers.SymmetricQuantizer(spec)
    made.scale = torch.nn.Parameter(torch.full(sizes, 2.0), requires_grad=learned)
    return made


def _aimet(_target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    importlib.import_module("torchvision_names")
    affine = importlib.import_module("aimet_torch.v2.quantization.affine")
    sizes = (1,) if axis is None else (shape[0], *[1] * (len(shape) - 1))
    made = affine.QuantizeDequantize(sizes, bitwidth=n_bits, symmetric=True)
    made.set_range(torch.full(sizes, -2.0), torch.full(sizes, 2.0))
    made.requires_grad_(learned)
    return made


def _mct(target: str, learned: bool, axis: int | None, n_bits: int, shape: tuple[int, ...]) -> Any:  # noqa: FBT001
    importlib.import_module("torchvision_names")
    root = "model_compression_toolkit"
    common = importlib.import_module(f"{root}.trainable_infrastructure.common.trainable_quantizer_config")
    method = importlib.import_module("mct_quantizers").QuantizationMethod.SYMMETRIC
    layer = torch.nn.Module()
    if target == "act":
        folder = f"{root}.trainable_infrastructure.pytorch.activation_quantizers"
        name, part = ("LSQ", "lsq.symmetric_lsq") if learned else ("STE", "ste.symmetric_ste")
        cls = getattr(importlib.import_module(f"{folder}.{part}"), f"{name}SymmetricActivationTrainableQuantizer")
        params = {"threshold": 2.0, "is_signed": True}
        config = common.TrainableQuantizerActivationConfig(
            activation_quantization_method=method,
            activation_n_bits=n_bits,
            activation_quantization_params=params,
            enable_activation_quantization=True,
            min_threshold=2**-16,
        )
        made = cls(config) if learned else cls(config, freeze_quant_params=True)
    else:
        folder = f"{root}.qat.pytorch.quantizer"
        name, part = ("LSQ", "lsq.symmetric_lsq") if learned else ("STE", "ste_rounding.symmetric_ste")
        cls = getattr(importlib.import_module(f"{folder}.{part}"), f"{name}WeightQATQuantizer")
        sizes = [1] * len(shape)
        if axis is not None:
            sizes[axis] = shape[axis]
        params = {"threshold": torch.full(sizes, 2.0).numpy()}
        config = common.TrainableQuantizerWeightsConfig(
            weights_quantization_method=method,
            weights_n_bits=n_bits,
            weights_quantization_params=params,
            enable_weights_quantization=True,
            weights_channels_axis=axis or 0,
            weights_per_channel_threshold=axis is not None,
            min_threshold=2**-16,
        )
        made = cls(config)
    made.initialize_quantization(shape, "x", layer)
    return lambda x: made(x, True)  # noqa: FBT003 - its order


PEERS: dict[str, Make] = {
    "torchao": _torchao,
    "brevitas": _brevitas,
    "nvidia-modelopt": _modelopt,
    "nncf": _nncf,
    "aimet-torch": _aimet,
    "model-compression-toolkit": _mct,
}


def main() -> None:
    """Print two rows: ours and the peer's."""
    options = arguments(__doc__ or "", rounds=9, peers=PEERS)
    peer: str = options.peer
    rows: dict[str, list[Any]] = {"ours": [], peer: []}
    for column in COLUMNS:
        axis = CHANNELS if column.per_channel else None
        cells: dict[str, list[float]] = {"ours": [], peer: []}
        for shape in SHAPES[column.target]:
            x, upstream = torch.randn(shape), torch.randn(shape)
            for n_bits in BITS:
                ours = column.quantizer("torch", QuantizationMethod.SYMMETRIC, n_bits, shape, CHANNELS)
                runs = {"ours": step(ours, x, upstream)}
                theirs = PEERS[peer](column.target, column.learned, axis, n_bits, shape)
                if theirs is not None:
                    runs[peer] = step(theirs, x, upstream)
                for who, ratio in interleaved(floor(x, upstream), runs, options.rounds).items():
                    cells[who].append(ratio)
        for who, ratios in cells.items():
            rows[who].append(statistics.median(ratios) if ratios else "-")
    version = importlib.metadata.version(peer)
    header = ["", *map(str, COLUMNS)]
    lines = [
        ["target", *(column.aim for column in COLUMNS)],
        ["ours", *rows["ours"]],
        [f"{peer} {version}", *rows[peer]],
    ]
    report(
        "torch_peers",
        peer,
        f"{conditions()}; medians of {options.rounds} rounds.\n\n{table(header, lines)}",
        write=options.write,
    )


if __name__ == "__main__":
    main()
