"""Each verb asks the model which Keras it belongs to; a class is that of the Keras in the process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import FRAMEWORK, KERAS_VERSION, internal, keras, kl
from tests.keras.models import dense, weights_only
from trainable_core.errors import ModelError
from trainable_keras import which

BOTH_INSTALLED = importlib.util.find_spec("tf_keras") is not None and which.is_installed(3)
needs_both = pytest.mark.skipif(not BOTH_INSTALLED, reason="needs Keras 3 and tf-keras side by side")


def test_models_and_layers_belong_to_the_keras_that_made_them() -> None:
    for each in (dense(), kl.Dense(3), trainable_keras.wrap(dense(), weights_only())):
        assert which.framework_of(each, "it") is FRAMEWORK
    assert which.framework_of_class(kl.Dense) is FRAMEWORK
    assert which.generation_of(kl.Dense) == KERAS_VERSION


class Layer:
    """A class with the name of the one that is looked for, but of another package."""


@pytest.mark.parametrize("given", [None, 3, Layer(), keras], ids=["nothing", "number", "namesake", "module"])
def test_what_is_not_of_keras_is_refused_with_its_type(given: Any) -> None:
    with pytest.raises(ModelError, match="it must be a Keras model, got .*" + type(given).__name__):
        which.framework_of(given, "it")


def test_this_keras_is_installed() -> None:
    assert which.is_installed(KERAS_VERSION)
    assert which.part_in_charge("Grid") is importlib.import_module(f"trainable_keras.keras{KERAS_VERSION}")
    assert trainable_keras.QuantizationWrapper is internal("wrapper").QuantizationWrapper


def python(code: str, **environment: str) -> str:
    """Return what code prints in a process of its own; without `environment`, TensorFlow takes its usual Keras."""
    clean = {key: value for key, value in os.environ.items() if key not in {"TF_USE_LEGACY_KERAS", "KERAS_BACKEND"}}
    settings = {**clean, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env={**settings, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.partition("FOUND ")[2]


BOTH_IN_ONE_PROCESS = """
import json
import numpy as np
import keras, tf_keras
import trainable_keras
from trainable_core.errors import FrameworkError

x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
spec = {"method": "UNIFORM", "n_bits": 4, "training_method": "LSQ"}
kernel = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
found = {}
for k in (keras, tf_keras):
    model = k.Sequential([k.Input((4,)), k.layers.Dense(3, name="fc", use_bias=False)])
    model.layers[-1].kernel.assign(kernel)
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, {"weights": spec, "activations": spec}), [x])
    deployed = trainable_keras.finalize(qmodel)
    found[k.__name__] = {
        "of its own Keras": isinstance(deployed, k.Model),
        "rows": [row.params for row in trainable_keras.describe(deployed).rows],
        "outputs": np.asarray(deployed.predict(x, verbose=0)).tolist(),
        "same": bool((np.asarray(deployed.predict(x, verbose=0)) == np.asarray(qmodel.predict(x, verbose=0))).all()),
    }
try:
    trainable_keras.QuantizationWrapper
except FrameworkError as error:
    found["a class"] = str(error)
print("FOUND", json.dumps(found))
"""


@needs_both
def test_models_of_both_versions_are_wrapped_and_finalized_in_one_process() -> None:
    found = json.loads(python(BOTH_IN_ONE_PROCESS, TF_USE_LEGACY_KERAS="1", KERAS_BACKEND="tensorflow"))
    three, two = found["keras"], found["tf_keras"]
    for each in (three, two):
        assert each["of its own Keras"]
        assert each["same"]
    assert three["rows"] == two["rows"]
    assert np.allclose(three["outputs"], two["outputs"], rtol=0, atol=8 * 2.0**-24 * 8)  # sums of 4 products below 8
    assert "trainable_keras.keras3.QuantizationWrapper" in found["a class"]
    assert "trainable_keras.keras2.QuantizationWrapper" in found["a class"]


EVERYTHING_IS_LISTED = """
import {first}
import trainable_core
import trainable_keras

rows = trainable_core.list_quantizers()
print("FOUND", trainable_keras.QuantizationWrapper.backend, {{row.backend for row in rows}} >= {{"keras", "tf_keras"}})
"""


@needs_both
@pytest.mark.parametrize("first", ["os", "tensorflow", "tf_keras"])
def test_listing_every_quantizer_decides_on_no_keras(first: str) -> None:
    """It imports both, which the switch for TensorFlow's Keras must outlast."""
    assert python(EVERYTHING_IS_LISTED.format(first=first), TF_USE_LEGACY_KERAS="1").split() == ["tf_keras", "True"]


@needs_both
def test_listing_every_quantizer_leaves_keras_3_in_charge() -> None:
    assert python(EVERYTHING_IS_LISTED.format(first="keras")).split()[0] == "keras"


KERAS_2_WHERE_TENSORFLOW_HAS_KERAS_3 = """
import tf_keras
import trainable_keras
from trainable_core import get_trainable_quantizer_class
from trainable_core.errors import FrameworkError

model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])
verbs = [trainable_keras.describe, trainable_keras.finalize, trainable_keras.calibrate]
print("FOUND ")
for call in [
    lambda: trainable_keras.wrap(model, {"weights": {"method": "UNIFORM", "n_bits": 4, "training_method": "LSQ"}}),
    *(lambda verb=verb: verb(model) for verb in verbs),
    lambda: get_trainable_quantizer_class("Weights", "LSQ", "SYMMETRIC", backend="tf_keras"),
]:
    try:
        call()
    except (FrameworkError, LookupError) as error:
        print("REFUSED", error)
"""


@needs_both
def test_a_keras_2_model_where_tensorflow_has_keras_3_is_told_what_to_set() -> None:
    refusals = python(KERAS_2_WHERE_TENSORFLOW_HAS_KERAS_3).split("REFUSED")[1:]
    assert len(refusals) == 5
    for refusal in refusals:
        for fact in ("tf.keras is Keras 3", "TF_USE_LEGACY_KERAS=1", "pip install tf-keras"):
            assert fact in refusal


KERAS_3_WHERE_KERAS_IS_ANOTHER = """
import sys, types
keras = types.ModuleType("keras")
keras.__version__ = {version!r}
keras.ops = sys.modules["keras.ops"] = types.ModuleType("keras.ops")
sys.modules["keras"] = keras
import trainable_keras.keras3.plugin
try:
    import trainable_keras.keras3.engine
except ImportError as error:
    print("FOUND", type(error).__name__, error)
"""


@pytest.mark.parametrize("version", ["2.15.0", "3.9.2"])
def test_keras_3s_part_where_keras_is_too_old_is_told_what_to_install(version: str) -> None:
    """By what Keras is in the process, whatever versions are installed."""
    refusal = python(KERAS_3_WHERE_KERAS_IS_ANOTHER.format(version=version))
    for fact in ("FrameworkError", f"Keras {version}", "needs Keras 3", "3.10 or newer", "keras>=3.10"):
        assert fact in refusal


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, trainable_keras, trainable_keras.keras2.plugin, trainable_keras.keras3.plugin\n"
        "frameworks = {'tensorflow', 'keras', 'tf_keras', 'jax', 'torch', 'mct_quantizers'}\n"
        "print('FOUND', sorted(frameworks & set(sys.modules)))"
    )
    assert python(code).strip() == "[]"
