"""Every registered Keras 2 quantizer keeps every law of the kit."""

from __future__ import annotations

import pytest

from trainable_core.conformance import LAWS, check_quantizer, conformance_checks
from trainable_keras.keras2.quantizers import BUILTIN, SteWeightsQuantizer

# An eager call of TensorFlow costs milliseconds, and the kit makes some thousands: few cases here, and
# `trainable check --backend tf_keras --examples N` for many.
FEW = 4
SLOW = "no_framework_leak"
"""A law about the class: it starts an interpreter and imports TensorFlow, for each class and grid."""

EVERY_LAW_BUT_THAT = [name for name in LAWS if name != SLOW]


@conformance_checks(backend="tf_keras", plugin="tf_keras", laws=EVERY_LAW_BUT_THAT, examples=FEW)
def test_built_in_quantizers_keep_every_law(check):
    check()


def test_importing_a_quantizer_loads_no_other_framework():
    verdict = next(v for v in check_quantizer(SteWeightsQuantizer, "tf_keras", laws=[SLOW]))
    assert verdict.holds, verdict.counterexample


def test_every_built_in_class_is_checked():
    marked = test_built_in_quantizers_keep_every_law.pytestmark[0].args[1]
    assert {parameter.values[0].subject.cls for parameter in marked} == set(BUILTIN)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_adapter_gives_the_dtypes_it_says(dtype):
    from trainable_core import TrainableQuantizerWeightsConfig
    from trainable_keras.keras2.conformance import ADAPTER

    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC", weights_n_bits=4, weights_quantization_params={"threshold": 1.0}
    )
    import numpy as np

    quantizer = ADAPTER.build(SteWeightsQuantizer, config, (3,), {})
    run = ADAPTER.run(
        quantizer, np.ones(3, np.float32), training=True, dtype=dtype, device="CPU", upstream=np.ones(3, np.float32)
    )
    assert (run.dtype, run.device) == (dtype, "CPU")
    assert run.x.tolist() == [0.0, 0.0, 0.0]  # beyond 7/8, the last grid point
