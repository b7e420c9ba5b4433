"""The seed's two examples as somebody runs them who has mctq: its enum members, and a quantizer built from each."""

from __future__ import annotations

from typing import Any

import mct_quantizers
import pytest
import torch

from tests.core.seed import ACTIVATION, WEIGHTS, run
from trainable_core.enums import QuantizationMethod
from trainable_core.registry.process import get_trainable_quantizer_class

IMPORTS = """\
from mct_quantizers import QuantizationMethod
from trainable_core import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import THRESHOLD, MIN_THRESHOLD
"""


@pytest.mark.parametrize(
    ("example", "method"),
    [(WEIGHTS, mct_quantizers.QuantizationMethod.SYMMETRIC), (ACTIVATION, mct_quantizers.QuantizationMethod.UNIFORM)],
    ids=["weights", "activation"],
)
def test_mctqs_own_members_are_taken(example: str, method: Any):
    config = run(example, IMPORTS)
    assert config.quantization_method is QuantizationMethod[method.name]
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("training_method", ["STE", "LSQ", "DQA"])
@pytest.mark.parametrize(
    ("example", "shape", "expected"),
    [
        # 8 bits, threshold 2: codes -128 to 127 in steps of 2 / 128
        (WEIGHTS, (2, 2, 2, 3), [-2.0, 0.0, 2.0 - 2.0 / 128]),
        (ACTIVATION, None, [-2.0, 0.0, 2.0]),
    ],
    ids=["weights", "activation"],
)
def test_an_example_is_all_a_quantizer_needs(
    example: str, shape: tuple[int, ...] | None, expected: list[float], training_method: str
):
    config = run(example, IMPORTS)
    cls = get_trainable_quantizer_class(config.target, training_method, config.quantization_method)
    quantizer = cls(config)
    quantizer.initialize_quantization(shape, "example", None)
    x = torch.tensor([-100.0, 0.0, 100.0]).expand(shape or (3,))
    low, zero, high = quantizer.eval()(x).reshape(-1, 3)[0].tolist()
    assert zero == 0.0
    # The ends of a range move by at most half a step so that zero is a code, and the step is rounded up to 8 bits less
    # than a float32 has: less than a step of 4 / 255 in all.
    tolerance = 0.0 if shape else 4 / 255
    assert abs(low - expected[0]) <= tolerance
    assert abs(high - expected[2]) <= tolerance
