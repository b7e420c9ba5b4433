"""What an exported TensorFlow Lite file computes beside the Keras model it is of: codes, islands, speed and size.

Three networks and the small models of `keras.applications`. `verify` compares every quantized tensor three ways; speed
is LiteRT's with the file beside LiteRT's with the float model, as TensorFlow's converter writes it, taking turns.
``--rounds 0`` leaves the speed out.

Usage: ``python benchmarks/keras_export.py [--rounds N] [--write]``
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras_measuring import PART, arguments
from measuring import interleaved, report
from tensorflow.keras import layers

from trainable_core.errors import UnsupportedConfigError
from trainable_keras import calibrate, export, finalize, verify, wrap

RECIPES = {
    "W8A8 SYMMETRIC": ("SYMMETRIC", 8, "SYMMETRIC", 8, False),
    "W8A8 POWER_OF_TWO": ("POWER_OF_TWO", 8, "POWER_OF_TWO", 8, False),
    "W8A8 UNIFORM": ("SYMMETRIC", 8, "UNIFORM", 8, False),
    "W4A8": ("SYMMETRIC", 4, "SYMMETRIC", 8, False),
    "W4A8, packed": ("SYMMETRIC", 4, "SYMMETRIC", 8, True),
    "W4A4": ("SYMMETRIC", 4, "SYMMETRIC", 4, False),
    "W2A4": ("SYMMETRIC", 2, "SYMMETRIC", 4, False),
}
"""Method and bits of weights, those of activations, and whether weights of 4 bits are packed.

The target has no zero points for weights, so UNIFORM is for activations.
"""

APPLICATIONS = {
    "MobileNetV2": 96,
    "MobileNetV3Small": 96,
    "EfficientNetB0": 96,
    "ResNet50": 64,
    "Xception": 96,
    "DenseNet121": 64,
    "InceptionV3": 96,
    "NASNetMobile": 96,
}
"""Models with the height and width of what they are given, which must be small for a benchmark of minutes."""


def residual(width: int = 64) -> Any:
    """Return a residual network of eight blocks."""
    image = tf.keras.Input((32, 32, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(image)))
    for block in range(8):
        channels, stride = width * 2 ** (block // 4), 2 if block == 4 else 1  # noqa: PLR2004 - half of the blocks
        y = layers.Conv2D(channels, 3, stride, "same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", use_bias=False)(y))
        across = x if stride == 1 else layers.Conv2D(channels, 1, stride)(x)
        x = layers.ReLU()(layers.Add()([y, across]))
    return tf.keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def depthwise(width: int = 64) -> Any:
    """Return three blocks of a depthwise and a pointwise convolution with batch norms and ReLU6."""
    image = tf.keras.Input((32, 32, 3), name="image")
    x = layers.ReLU(6.0)(layers.Conv2D(width, 3, padding="same")(image))
    for _ in range(3):
        y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
        y = layers.BatchNormalization()(layers.Conv2D(width, 1, use_bias=False)(layers.ReLU(6.0)(y)))
        x = layers.Add()([x, y])
    return tf.keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def unet(width: int = 32) -> Any:
    """Return a network with one step down, one up by a transposed convolution, and a concatenation."""
    image = tf.keras.Input((32, 32, 3), name="image")
    across = layers.Conv2D(width, 3, padding="same", activation="relu")(image)
    x = layers.Conv2D(2 * width, 3, padding="same", activation="relu")(layers.MaxPooling2D(2)(across))
    x = layers.Conv2DTranspose(width, 2, strides=2, activation="relu")(x)
    return tf.keras.Model(image, layers.Conv2D(3, 1)(layers.Concatenate()([x, across])))


def networks() -> Iterator[tuple[str, Any, np.ndarray[Any, Any]]]:
    """Yield networks with their batches; numbers of 8 bits, as those of images are."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.float32) / 256
    for name, make in (("residual", residual), ("depthwise", depthwise), ("U-Net", unet)):
        tf.keras.utils.set_random_seed(1)
        yield name, make(), images


def applications() -> Iterator[tuple[str, Any, np.ndarray[Any, Any]]]:
    """Yield models of `keras.applications` with random weights, and their batches."""
    for name, size in APPLICATIONS.items():
        tf.keras.utils.set_random_seed(1)
        model = getattr(tf.keras.applications, name)(input_shape=(size, size, 3), weights=None, classes=10)
        images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.float32)
        preprocessed = any(type(layer).__name__ == "Rescaling" for layer in model.layers)
        yield name, model, images if preprocessed else images / 128 - 1


def recipe(weights: str, weight_bits: int, activations: str, activation_bits: int) -> dict[str, Any]:
    """Return a recipe for integers throughout."""
    return {
        "target": "tflite",
        "bias": "int32",
        "weights": {"method": weights, "n_bits": weight_bits, "training_method": "STE"},
        "activations": {
            "method": activations,
            "n_bits": activation_bits,
            "training_method": "STE",
            "placement": "integer",
        },
    }


def runner(content: bytes, images: np.ndarray[Any, Any]) -> Callable[[], object]:
    """Return a run of a file on a batch, with one thread."""
    interpreter = Interpreter(model_content=content, num_threads=1)
    details = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(details["index"], images.shape)
    interpreter.allocate_tensors()
    values = images
    if details["dtype"] is np.int8:
        scale, zero_point = details["quantization"]
        values = np.clip(np.rint(images / scale) + zero_point, -128, 127).astype(np.int8)
    interpreter.set_tensor(details["index"], values)
    return interpreter.invoke


def row_of(name: str, width: str, deployed: Any, images: Any, plain: bytes, rounds: int) -> list[object]:
    """Return a line of the table: what `verify` finds in a file, and its speed and size beside the float one's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        written = export(deployed, path, packed=RECIPES[width][-1])
        found = verify(deployed, path, [images])
        content = path.read_bytes()
    rows = [each for each in found.rows if each.framework is not None]
    certain = [each for each in rows if each.must_be_equal]
    codes = sum(each.framework.codes for each in rows if each.framework)
    apart = sum(each.framework.different for each in rows if each.framework)
    alone = [each.alone for each in rows if each.alone is not None]
    share = sum(each.different for each in alone) / max(sum(each.codes for each in alone), 1)
    numpy = sum(each.numpy.different for each in found.rows if each.numpy)
    islands = Counter(each.op.lower() for each in written.islands)
    speed: object = "-"
    if rounds:
        speed = 1 / interleaved(runner(plain, images), {"": runner(content, images)}, rounds)[""]
    return [
        name,
        width,
        f"{codes:,}",
        numpy,
        f"{apart} (by {max(each.framework.largest for each in rows if each.framework)})" if apart else 0,
        f"{1e6 * share:.1f} (by {max(each.largest for each in alone)})" if share else 0,
        f"{sum(each.framework.different for each in certain if each.framework)} in {len(certain)} of {len(rows)} rows",
        len(found.changed),
        sum(written.operations.values()),
        ", ".join(f"{count} {op}" for op, count in islands.items()) or 0,
        speed,
        len(content) / len(plain),
    ]


def float_file(model: Any) -> bytes:
    """Return the float model as TensorFlow's converter writes it."""
    content: bytes = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    return content


def line(name: str, width: str, model: Any, images: Any, plain: bytes, rounds: int) -> list[object]:
    """Return a line of the table for a recipe, or why there is none."""
    *numbers, _ = RECIPES[width]
    try:
        deployed = finalize(calibrate(wrap(model, recipe(*numbers)), [images]))
    except UnsupportedConfigError as error:
        return [name, width, f"refused: {error.problem}", *["-"] * (len(HEADER) - 3)]
    return row_of(name, width, deployed, images, plain, rounds)


HEADER = (
    "network",
    "recipe",
    "codes",
    "NumPy against the runtime: differ",
    "framework against the runtime: differ",
    "the same in each layer alone, per million",
    "of which certified",
    "constants that are not the model's",
    "integer operators",
    "float islands",
    "times as fast as float",
    "size, of float",
)


def main() -> None:
    """Print the tables."""
    options = arguments(__doc__ or "", rounds=15)
    runtime = f"LiteRT {metadata.version('ai-edge-litert')}, {PART}"
    rows = []
    for name, model, images in networks():
        plain = float_file(model)
        for width in RECIPES:
            rows.append(line(name, width, model, images, plain, options.rounds))
            print(rows[-1], flush=True)
    report("keras_export", runtime, measuring.table(HEADER, rows), write=options.write)
    rows = []
    for name, model, images in applications():
        plain = float_file(model)
        for width in ("W8A8 SYMMETRIC", "W8A8 POWER_OF_TWO"):
            rows.append(line(name, width, model, images, plain, options.rounds))
            print(rows[-1], flush=True)
    report("keras_export", f"keras.applications, {runtime}", measuring.table(HEADER, rows), write=options.write)


if __name__ == "__main__":
    main()
