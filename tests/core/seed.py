"""The two examples of the document this library grew from, and how to run them."""

from __future__ import annotations

import ast
from typing import Any

OLD_IMPORTS = """\
from model_compression_toolkit.target_platform_capabilities.target_platform_capabilities import QuantizationMethod
from model_compression_toolkit.constants import THRESHOLD, MIN_THRESHOLD
"""

WEIGHTS = (
    OLD_IMPORTS
    + """
TrainableQuantizerWeightsConfig(weights_quantization_method=QuantizationMethod.SYMMETRIC,
                                           weights_n_bits=8,
                                           weights_quantization_params={THRESHOLD: 2.0},
                                           enable_weights_quantization=True,
                                           weights_channels_axis=3,
                                           weights_per_channel_threshold=True,
                                           min_threshold=MIN_THRESHOLD)
"""
)

# As printed, `activation_quantization_params=={THRESHOLD: 2.0}` compares a name that isn't there.
ACTIVATION = (
    OLD_IMPORTS
    + """
TrainableQuantizerActivationConfig(activation_quantization_method=QuantizationMethod.UNIFORM,
                                              activation_n_bits=8,
                                              activation_quantization_params=={THRESHOLD: 2.0},
                                              enable_activation_quantization=True,
                                              min_threshold=MIN_THRESHOLD)
"""
).replace("params=={", "params={")


def run(example: str, imports: str) -> Any:
    """Run an example with other import lines and return the value of its last expression."""
    assert example.startswith(OLD_IMPORTS)
    *first, last = ast.parse(example.replace(OLD_IMPORTS, imports)).body
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(ast.Module(first, []), "example", "exec"), names)  # noqa: S102 - that it runs is the test
    return eval(compile(ast.Expression(last.value), "example", "eval"), names)  # noqa: S307 - as above
