"""What models go through between the verbs: copies, EMA, rebuilding, import order, another Keras."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tests.callbacks import backed_up, same, stopped_early

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, dqa, kl, output, small, train, values

BOTH = pytest.mark.skipif(
    importlib.util.find_spec("tf_keras") is None, reason="needs Keras 3 beside tf-keras: TensorFlow 2.16 or newer"
)


def python(code: str, **environment: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    clean = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    path = os.pathsep.join(each for each in sys.path if each)
    settings = {**clean, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_float_checkpoint_fits_the_wrapped_model_layer_by_layer() -> None:
    model, other = small(), small()
    qmodel = trainable_keras.keras2.wrap(model, {**LSQ, "fold_batch_norm": False})
    for layer in other.layers:
        qmodel.get_layer(layer.name).set_weights(
            [*layer.get_weights(), *qmodel.get_layer(layer.name).get_weights()[len(layer.weights) :]]
        )
    kernel = qmodel.get_layer("conv").kernel
    assert np.array_equal(kernel.numpy(), other.get_layer("conv").kernel.numpy())


def test_an_average_of_weights_is_a_model_of_its_own() -> None:
    qmodel, x = calibrated()
    average = tf.keras.models.clone_model(qmodel)
    average.set_weights(qmodel.get_weights())
    first = output(qmodel, x)
    train(qmodel, x)
    assert np.array_equal(output(average, x), first)
    blend = [0.5 * one + 0.5 * other for one, other in zip(average.get_weights(), qmodel.get_weights(), strict=True)]
    average.set_weights(blend)
    assert np.array_equal(output(trainable_keras.keras2.finalize(average), x), output(average, x))


def test_a_quantizer_is_copied_deeply() -> None:
    quantizer = calibrated()[0].get_layer("conv").weights_quantizers["kernel"]
    twin = copy.deepcopy(quantizer)
    before = quantizer.threshold.numpy()
    twin.threshold.assign_add(tf.ones_like(twin.threshold))
    assert np.array_equal(quantizer.threshold.numpy(), before)
    assert twin.quantization_config == quantizer.quantization_config


def test_parts_of_a_wrapped_model_go_into_another_model() -> None:
    qmodel, x = calibrated()
    features = tf.keras.Model(qmodel.inputs, qmodel.get_layer("flatten").output)
    both = tf.keras.Model(qmodel.inputs, [qmodel.output, features.output])
    assert np.array_equal(np.array(both(x)[0]), output(qmodel, x))


def test_gradient_accumulation_sums_what_one_batch_gives() -> None:
    qmodel, x = calibrated()

    def gradients(x: Any) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(qmodel(x, training=True) ** 2)
        return [each.numpy() for each in tape.gradient(loss, qmodel.get_layer("head").layer.trainable_variables)]

    parts = [sum(each) for each in zip(gradients(x[:8]), gradients(x[8:]), strict=True)]
    for whole, summed in zip(gradients(x), parts, strict=True):
        # float32 sums of 16 terms in another order
        assert np.allclose(whole, summed, rtol=0, atol=16 * 2.0**-24 * 16 * np.abs(whole).max())


def test_a_model_with_unknown_spatial_size_is_wrapped_and_trained() -> None:
    given = tf.keras.Input((None, None, 2))
    y = kl.Dense(3)(kl.GlobalAveragePooling2D()(kl.Conv2D(4, 3, name="conv")(given)))
    qmodel, x = calibrated(LSQ, tf.keras.Model(given, y))
    train(qmodel, x)
    assert np.array_equal(output(trainable_keras.keras2.finalize(qmodel), x), output(qmodel, x))


@BOTH
def test_with_keras_3_in_charge_every_use_says_what_to_set() -> None:
    printed = python(
        "import tensorflow, trainable_keras.keras2\n"
        "from trainable_core.errors import FrameworkError\n"
        "try:\n"
        "    trainable_keras.keras2.wrap\n"
        "except FrameworkError as error:\n"
        "    print(error)\n"
        "from trainable_core import get_trainable_quantizer_class\n"
        "try:\n"
        "    get_trainable_quantizer_class('Weights', 'LSQ', 'SYMMETRIC', backend='tf_keras')\n"
        "except LookupError as error:\n"
        "    print(error)\n"
    )
    first, second = printed.split("no quantizer is registered")
    for text in (first, second):
        assert "tf.keras is Keras 3" in text
        assert "TF_USE_LEGACY_KERAS=1" in text
        assert "pip install tf-keras" in text


def test_files_load_in_a_process_that_lists_no_custom_objects(tmp_path: Any) -> None:
    qmodel, x = calibrated()
    np.save(tmp_path / "x.npy", x)
    for name in ("model.keras", "model.h5"):
        qmodel.save(tmp_path / name)
    legacy = {"TF_USE_LEGACY_KERAS": "1"} if importlib.util.find_spec("tf_keras") else {}
    python(
        "import numpy as np, tensorflow as tf, trainable_keras.keras2\n"
        f"x = np.load({str(tmp_path / 'x.npy')!r})\n"
        "for name in ('model.keras', 'model.h5'):\n"
        f"    model = tf.keras.models.load_model({str(tmp_path)!r} + '/' + name)\n"
        f"    np.save({str(tmp_path)!r} + '/' + name + '.npy', model(x, training=False).numpy())\n",
        **legacy,
    )
    for name in ("model.keras", "model.h5"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), output(qmodel, x))


def test_the_plugin_imports_no_framework() -> None:
    printed = python(
        "import sys, trainable_keras.keras2.plugin\n"
        "print(sorted({'tensorflow', 'keras', 'tf_keras', 'mct_quantizers'} & set(sys.modules)))"
    )
    assert printed.strip() == "[]"


TEMPERATURE = {"t_start": 0, "t_end": 6, "initial_val": 1.0, "target_val": 0.1}


@pytest.mark.parametrize("recipe", [LSQ, dqa(temperature=TEMPERATURE)], ids=["LSQ", "DQA"])
def test_training_that_was_interrupted_goes_on_to_the_same_bits(recipe: Any, tmp_path: Any) -> None:
    x, target = values(16, 6, 6, 2), np.ones((16, 3), np.float32)
    whole, resumed = backed_up(tf.keras, lambda: calibrated(recipe)[0], x, target, tmp_path / "backup")
    assert same(whole, resumed)


@pytest.mark.parametrize("recipe", [LSQ, dqa(temperature=TEMPERATURE)], ids=["LSQ", "DQA"])
def test_early_stopping_restores_the_best_weights_and_thresholds(recipe: Any) -> None:
    x, target = values(16, 6, 6, 2), np.ones((16, 3), np.float32)
    best, restored = stopped_early(tf.keras, lambda: calibrated(recipe)[0], x, target)
    assert same(best, restored)
