"""The targets that recipes can name."""

from __future__ import annotations

from trainable_core.enums import LUT_METHODS, QuantizationMethod, TieRule
from trainable_core.targets.target import Grids, Requantization, Target

_UNIFORM, _LINEAR = QuantizationMethod.UNIFORM, [each for each in QuantizationMethod if each not in LUT_METHODS]

MCTQ = Target(
    name="mctq",
    title="mct-quantizers: the inferable quantizers of the framework that trained the model, in real numbers",
    # mctq's look-up tables hold codes of 8 bits, and it has no LUT_SYM_QUANTIZER for activations
    weights=Grids(dict.fromkeys(_LINEAR, range(1, 17)) | dict.fromkeys(LUT_METHODS, range(1, 9))),
    activations=Grids(
        dict.fromkeys(_LINEAR, range(1, 17)) | {QuantizationMethod.LUT_POT_QUANTIZER: range(1, 9)},
    ),
    biases=("float", "int32"),
    tie_rule=None,
    requantization=None,
)

ONNX = Target(
    name="onnx",
    title="ONNX with QuantizeLinear and DequantizeLinear, for ONNX Runtime's integer kernels",
    # QLinearConv refuses weights whose channels have different zero points ("must be same") when it runs
    weights=Grids(dict.fromkeys(_LINEAR, range(2, 9)), {_UNIFORM: ("conv", "depthwise_conv")}),
    activations=Grids(dict.fromkeys(_LINEAR, range(2, 17))),
    biases=("float", "int32"),
    tie_rule=TieRule.HALF_EVEN,
    requantization=Requantization.FLOAT32,
)

TFLITE = Target(
    name="tflite",
    title="TensorFlow Lite in 8-bit integers throughout",
    # its 8-bit scheme has weights without zero point, and activations that fill the whole range of int8
    weights=Grids({each: range(2, 9) for each in _LINEAR if each is not _UNIFORM}),
    activations=Grids(dict.fromkeys(_LINEAR, (8,))),
    biases=("int32",),
    tie_rule=TieRule.HALF_EVEN,
    requantization=Requantization.FLOAT32,
    tie_rules={"add": TieRule.HALF_UP},  # XNNPACK adds in fixed point, and its shift rounds up
)

QONNX = Target(
    name="qonnx",
    title="QONNX with Quant nodes of any width, for FPGA flows",
    weights=Grids(dict.fromkeys(_LINEAR, range(2, 17))),
    activations=Grids(dict.fromkeys(_LINEAR, range(2, 17))),
    biases=("float", "int32"),
    tie_rule=TieRule.HALF_EVEN,
    requantization=None,
)

NATIVE = Target(
    name="native",
    title="this library's own inferable quantizers, in the framework that trained the model, in real numbers",
    weights=MCTQ.weights,
    activations=MCTQ.activations,
    biases=("float", "int32"),
    tie_rule=None,
    requantization=None,
    groups=True,
    experts=True,
    dynamic=True,
)

TARGETS = {target.name: target for target in (MCTQ, ONNX, TFLITE, QONNX, NATIVE)}
"""The targets by their names in recipes."""
