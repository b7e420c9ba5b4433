"""Files for TensorFlow Lite: every code is the model's, and the runtime gives what Keras and NumPy give."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, functions, keras, kl, numpy, only_tensorflow, tensor
from tests.keras.models import vectors
from trainable_core import cli
from trainable_core.errors import DocumentError, InvalidArgumentError, UnsupportedConfigError
from trainable_core.export.tflite import document
from trainable_core.export.tflite.flatbuffer import to_bytes
from trainable_keras import calibrate, export, finalize, load, save, verify, wrap
from trainable_keras.exporting import input_names
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasWrapper

pytestmark = only_tensorflow("TensorFlow has the runtime")

RECIPE = {
    "target": "tflite",
    "bias": "int32",
    "weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"},
    "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE", "placement": "integer"},
}


def residual():
    """Convolutions, a folded batch norm, a residual sum, maximum and average pooling, a mean, a softmax."""
    given = keras.Input((8, 8, 2), name="image")
    a = kl.BatchNormalization(name="norm")(kl.Conv2D(4, 3, padding="same", use_bias=False, name="a")(given))
    a = kl.ReLU(name="relu")(a)
    b = kl.Conv2D(4, 3, padding="same", name="b")(a)
    c = kl.ReLU(6.0, name="relu6")(kl.Add(name="sum")([a, b]))
    c = kl.DepthwiseConv2D(3, depth_multiplier=2, name="wide")(kl.MaxPooling2D(2, name="pool")(c))
    c = kl.GlobalAveragePooling2D(name="mean")(c)
    return keras.Model(given, kl.Softmax(name="softmax")(kl.Dense(3, name="head")(c)))


def unet():
    """A nested model, a transposed convolution, a concatenation, functional operations, an average."""
    inner = keras.Sequential(
        [keras.Input((3, 3, 4)), kl.Conv2D(4, 3, padding="same", activation="relu", name="conv")], name="inner"
    )
    given = keras.Input((6, 6, 2), name="image")
    a = functions.relu(kl.Conv2D(4, 3, padding="same", name="down")(given))
    b = inner(kl.AveragePooling2D(2, name="pool")(a))
    b = kl.Conv2DTranspose(3, 3, strides=2, padding="same", activation="relu", name="up")(b)
    c = kl.Concatenate(name="cat")([a, b])
    return keras.Model(given, kl.Conv2D(1, 1, name="out")(kl.ZeroPadding2D(1, name="pad")(c * c)))


def sequence():
    """Dense layers on rows of vectors."""
    layers = [keras.Input((5, 4)), kl.Dense(6, activation="relu", name="one"), kl.Flatten(), kl.Dense(3, name="two")]
    return keras.Sequential(layers)


def gated():
    """What classifiers have beside: preprocessing, gates, functions that are more than clamps, averages at borders."""
    given = keras.Input((8, 8, 3), name="image")
    a = kl.Conv2D(6, 3, strides=2, padding="same", name="stem")(kl.Rescaling(0.5, -0.25, name="scaled")(given))
    a = kl.Activation("silu", name="silu")(a)
    gate = kl.Conv2D(2, 1, activation="silu", name="squeeze")(kl.GlobalAveragePooling2D(keepdims=True, name="seen")(a))
    gate = kl.Conv2D(6, 1, activation="sigmoid", name="excite")(gate)
    a = kl.Multiply(name="gated")([a, gate])
    b = kl.BatchNormalization(name="norm")(kl.AveragePooling2D(3, strides=1, padding="same", name="border")(a))
    c = kl.SeparableConv2D(6, 3, padding="same", name="separable")(kl.ReLU(name="relu")(b))
    d = kl.LeakyReLU(name="leaky")(kl.Add(name="three")([a, b, c]))
    return keras.Model(given, kl.Dense(3, activation="softmax", name="top")(kl.GlobalMaxPooling2D(name="most")(d)))


def decoder():
    """Nearest and bilinear upsampling, cropping, the order of a clamp and a concatenation."""
    given = keras.Input((5, 6, 3), name="image")
    a = kl.UpSampling2D(2, name="nearest")(kl.Conv2D(4, 3, name="conv")(given))
    b = kl.UpSampling2D(2, interpolation="bilinear", name="bilinear")(kl.Conv2D(4, 3, name="other")(given))
    c = functions.relu(kl.Concatenate(name="cat")([a, kl.Cropping2D(((0, 0), (0, 0)), name="whole")(b)]))
    c = kl.Cropping2D(((1, 2), (0, 1)), name="crop")(kl.Conv2D(4, 1, name="mixed")(c))
    return keras.Model(given, functions.relu(kl.GlobalAveragePooling2D(name="mean")(c)))


def signal():
    """Convolutions and pooling along one axis."""
    given = keras.Input((24, 3), name="signal")
    a = kl.Conv1D(4, 3, padding="same", activation="relu", name="one")(given)
    a = kl.MaxPooling1D(2, name="most")(a)
    a = kl.DepthwiseConv1D(3, strides=2, depth_multiplier=2, name="deep")(a)
    a = kl.AveragePooling1D(2, strides=1, name="mean")(kl.SeparableConv1D(3, 2, dilation_rate=2, name="split")(a))
    return keras.Model(given, kl.Dense(2, name="top")(kl.Flatten(name="flat")(a)))


LAYERS = {"gated": (gated, (8, 8, 3)), "decoder": (decoder, (5, 6, 3)), "signal": (signal, (24, 3))}
ISLANDS = {
    "gated": {"scaled", "silu", "squeeze", "excite", "border", "norm", "three", "leaky", "top"},
    "decoder": {"bilinear"},
    "signal": set(),
}

MODELS = {"residual": (residual, (8, 8, 2)), "unet": (unet, (6, 6, 2)), "sequence": (sequence, (5, 4))}


def deployed(build, shape, recipe=RECIPE):
    keras.utils.set_random_seed(1)
    return finalize(calibrate(wrap(build(), recipe), [vectors(16, *shape)]))


@pytest.fixture(scope="module")
def model():
    return deployed(*MODELS["residual"])


@pytest.fixture
def path(model, tmp_path):
    export(model, tmp_path / "model.tflite")
    return tmp_path / "model.tflite"


POWERS = {
    **RECIPE,
    "weights": {**RECIPE["weights"], "method": "POWER_OF_TWO"},
    "activations": {**RECIPE["activations"], "method": "POWER_OF_TWO"},
}


def batches(shape):
    return [vectors(count, *shape) for count in (1, 9)]


@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_gives_every_code_of_numpy_and_what_the_model_gives(name, tmp_path):
    build, shape = MODELS[name]
    made = deployed(build, shape)
    report = export(made, tmp_path / "model.tflite")
    found = verify(made, tmp_path / "model.tflite", batches(shape))
    assert not found.changed
    assert sum(row.numpy.different for row in found.rows if row.numpy is not None) == 0
    assert all(row.framework is not None for row in found.rows)
    assert found.ok, str(found)
    assert [each.op for each in report.islands] == (["SOFTMAX"] if name == "residual" else [])


@pytest.mark.parametrize(
    ("changes", "packed", "kind"),
    [
        ({"weights": {"n_bits": 4}}, False, "int8"),
        ({"weights": {"n_bits": 4}}, True, "int4"),
        ({"weights": {"per_channel": False}, "activations": {"method": "UNIFORM"}}, False, "int8"),
    ],
    ids=["4 bits", "packed", "per tensor, uniform"],
)
def test_numpy_predicts_other_recipes(changes, packed, kind, tmp_path):
    recipe = {**RECIPE, **{part: {**RECIPE[part], **each} for part, each in changes.items()}}
    made = deployed(*MODELS["residual"], recipe)
    export(made, tmp_path / "model.tflite", packed=packed)
    found = verify(made, tmp_path / "model.tflite", batches((8, 8, 2)))
    assert not found.changed
    assert sum(row.numpy.different for row in found.rows if row.numpy is not None) == 0
    assert found.ok is not packed  # kernels of packed weights round twice, which the report tells
    program, _ = document.read(tmp_path / "model.tflite")
    assert program.tensors["a.kernel"].kind == kind


@pytest.mark.parametrize("name", LAYERS)
def test_more_layers_are_integers_or_islands_that_are_told(name, tmp_path):
    build, shape = LAYERS[name]
    made = deployed(build, shape)
    report = export(made, tmp_path / "model.tflite")
    assert {each.layer for each in report.islands} == ISLANDS[name]
    found = verify(made, tmp_path / "model.tflite", batches(shape))
    assert not found.changed
    assert sum(row.numpy.different for row in found.rows if row.numpy is not None) == 0
    assert all(row.framework is not None for row in found.rows)
    assert found.ok, str(found)
    assert cli.main(["verify", str(tmp_path / "model.tflite")]) == 0


def on_ties(shape):
    """Return rows of numbers of a few bits, so that sums hit ties often."""
    return np.round(vectors(16, *shape) * 8) / 8


@pytest.mark.parametrize("name", MODELS)
def test_with_powers_of_two_every_code_is_certified_and_equal(name, tmp_path):
    build, shape = MODELS[name]
    made = deployed(build, shape, POWERS)
    export(made, tmp_path / "model.tflite")
    found = verify(made, tmp_path / "model.tflite", [on_ties(shape)])
    certified = [row for row in found.rows if row.must_be_equal]
    assert len(certified) > 2
    assert all(row.framework.different == 0 for row in certified)
    if found.processor.runtime.startswith("tensorflow"):  # its means and products may round ties otherwise
        return
    assert found.equal, str(found)
    apart = {"softmax", "cat"}  # one is computed in float, the other has no sums
    assert {row.certificate for row in found.rows if row.layer not in apart} <= {"exact", ""}
    assert {row.layer for row in found.rows} - {row.layer for row in certified} <= {"softmax"}


def test_without_the_targets_rule_ties_differ_and_the_table_says_so(tmp_path):
    made = deployed(*MODELS["residual"], {**POWERS, "target": "mctq"})
    export(made, tmp_path / "model.tflite")
    found = verify(made, tmp_path / "model.tflite", [on_ties((8, 8, 2))])
    assert found.share > 0
    assert "exact but ties" in {row.certificate for row in found.rows}
    assert {row.certificate for row in found.rows if row.kernel.startswith("ADD")} == {"exact"}


def test_a_model_rounds_as_its_target_in_training_and_after_it_was_saved(tmp_path):
    keras.utils.set_random_seed(1)
    x = on_ties((8, 8, 2))
    trained = calibrate(wrap(residual(), POWERS), [x])
    made = finalize(trained)
    expected = numpy(made(tensor(x), training=False))
    np.testing.assert_array_equal(numpy(trained(tensor(x), training=True)), expected)
    for model, file in ((trained, "trained.npz"), (made, "made.npz")):
        save(model, tmp_path / file)
        again = load(tmp_path / file, residual())
        np.testing.assert_array_equal(numpy(again(tensor(x), training=False)), expected)
    made.save(tmp_path / "made.keras")
    again = keras.models.load_model(tmp_path / "made.keras")
    np.testing.assert_array_equal(numpy(again(tensor(x), training=False)), expected)
    export(again, tmp_path / "model.tflite")
    found = verify(again, tmp_path / "model.tflite", [x])
    assert all(row.framework.different == 0 for row in found.rows if row.must_be_equal)


def test_layers_are_known_by_their_places(tmp_path):
    def build():
        image = keras.Input((6, 6, 2))
        x = kl.Conv2D(3, 3, activation="relu")(image)
        x = kl.MaxPooling2D(2)(x)
        return keras.Model(image, kl.Dense(2)(kl.Flatten()(x)))

    shape = (6, 6, 2)
    made = deployed(build, shape)
    other = deployed(build, shape)
    assert [layer.name for layer in made.layers] != [layer.name for layer in other.layers]
    export(made, tmp_path / "model.tflite")
    found = verify(other, tmp_path / "model.tflite", batches(shape))
    assert found.ok, str(found)
    assert all(row.framework is not None for row in found.rows)


def test_codes_scales_and_biases_of_the_file_are_the_models_to_the_bit(model, path):
    program, _ = document.read(path)
    wrappers = [layer for layer in layers_within(model) if isinstance(layer, KerasWrapper) and layer.weights_quantizers]
    assert len(wrappers) == 4
    for wrapper in wrappers:
        ((attribute, _, quantizer),) = wrapper.get_weights_vars()
        tensor = program.tensors[f"{wrapper.name}.{attribute}"]
        scale = numpy(quantizer.grid_scale).reshape(-1)
        value = numpy(wrapper.get_quantized_weights()[attribute])
        if wrapper.name == "wide":  # (H, W, C, M) as (1, H, W, C * M), and a scale for each output
            stored, scale = tensor.data[0].reshape(value.shape), np.repeat(scale, 2)
            ours = stored * np.repeat(numpy(quantizer.grid_scale), 2, -1).reshape(1, 1, 4, 2)
        else:
            stored = tensor.data.transpose(1, 2, 3, 0).reshape(value.shape)
            ours = stored * numpy(quantizer.grid_scale)
        np.testing.assert_array_equal(tensor.scale, scale)
        np.testing.assert_array_equal(ours, value)
        bias = wrapper.bias_quantizer
        stored = program.tensors[f"{wrapper.name}.bias"]
        held = wrapper.quantized_for_call(training=False)
        (value,) = [v for key, v in held.items() if key == id(vars(wrapper)["bias"])]
        np.testing.assert_array_equal(stored.data * stored.scale, numpy(value))
        np.testing.assert_array_equal(stored.scale, bias.scale())


def _one_more(tensor):
    return replace(tensor, data=tensor.data + (np.arange(tensor.data.size) == 7).reshape(tensor.shape).astype(np.int8))


@pytest.mark.parametrize(
    ("tensor_name", "change", "layer"),
    [
        ("b.kernel", _one_more, "b"),
        ("head.bias", lambda tensor: replace(tensor, data=tensor.data + np.int32([0, 300, 0])), "head"),
        ("wide: output", lambda tensor: replace(tensor, scale=tensor.scale * np.float32(1.5)), "wide"),
    ],
)
def test_a_change_is_named_with_its_layer(model, path, tensor_name, change, layer, capsys):
    program, _ = document.read(path)
    program.tensors[tensor_name] = change(program.tensors[tensor_name])
    path.write_bytes(to_bytes(program))
    found = verify(model, path, batches((8, 8, 2)))
    assert list(found.changed) == [f"{layer}, {tensor_name}"]
    assert not found.ok
    assert found.first is not None
    assert cli.main(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["changed"].keys() == found.changed.keys()


def test_the_command_line_runs_a_file_by_itself(path, tmp_path, capsys):
    assert cli.main(["verify", str(path), "--batches", "2"]) == 0
    assert "all" in capsys.readouterr().out
    np.savez(tmp_path / "inputs.npz", image=vectors(3, 8, 8, 2))
    assert cli.main(["verify", str(path), "--inputs", str(tmp_path / "inputs.npz")]) == 0


def test_the_runtimes_own_api_takes_codes_and_gives_the_models_output(model, path):
    from trainable_core.export.tflite.runtime import Runtime

    program, content = document.read(path)
    runtime = Runtime(content, program)
    details = runtime.interpreter.get_input_details()[0]
    scale, zero_point = details["quantization"]
    assert details["dtype"] is np.int8
    images = vectors(5, 8, 8, 2)
    codes = np.clip(np.floor(images / scale + 0.5) + zero_point, -128, 127).astype(np.int8)
    (found,) = runtime.run({"image": codes}).values()
    scale, zero_point = runtime.interpreter.get_output_details()[0]["quantization"]
    found = (found.astype(np.float32) - zero_point) * scale
    np.testing.assert_allclose(found, numpy(model(tensor(images))), atol=1.1 * scale)  # one code of a softmax in float
    signature = runtime.interpreter.get_signature_list()["serving_default"]
    assert signature["inputs"] == ["image"]


def _dense(**options):
    given = keras.Input((4,), name="vector")
    return keras.Model(given, kl.Dense(3, name="here", **options)(given))


def _behind(layer, shape=(6, 6, 2)):
    given = keras.Input(shape, name="image")
    return keras.Model(given, layer(kl.Conv2D(2, 1, name="conv")(given)))


class Odd(kl.Layer):
    """A layer of the user's own."""

    def call(self, inputs):
        """Return twice the input."""
        return inputs * 2.0


@pytest.mark.parametrize(
    ("build", "facts"),
    [
        (lambda: _dense(activation="selu"), ("here", "selu")),
        (lambda: _behind(kl.ELU(0.5, name="here")), ("here", "0.5")),
        (lambda: _behind(kl.UpSampling2D(interpolation="bicubic", name="here")), ("here", "bicubic")),
        (lambda: _behind(kl.ReLU(5.0, name="here")), ("here", "5")),
        (lambda: _behind(kl.LayerNormalization(name="here")), ("here", "LayerNormalization")),
        (lambda: _behind(Odd(name="here")), ("here", "Odd")),
    ],
)
def test_what_the_target_can_not_express_is_refused_before_training(build, facts):
    with pytest.raises(UnsupportedConfigError) as caught:
        wrap(build(), RECIPE)
    assert all(fact in str(caught.value) for fact in facts)


def test_nothing_is_written_where_something_is_refused(tmp_path):
    file = tmp_path / "model.tflite"
    file.write_bytes(b"before")
    recipe = {**RECIPE, "target": "mctq", "activations": {**RECIPE["activations"], "placement": "inputs"}}
    made = deployed(*MODELS["residual"], recipe)
    with pytest.raises(UnsupportedConfigError, match=r"^a: .*its output is"):
        export(made, file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_file_and_one_of_somebody_else_are_refused(model, path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DocumentError):
        verify(model, path, batches((8, 8, 2)))
    program = document.build(_network(model))
    path.write_bytes(to_bytes(replace(program, metadata="")))
    with pytest.raises(DocumentError, match="not written by"):
        verify(model, path, batches((8, 8, 2)))


def _network(model):
    from trainable_keras.exporting import network_of

    return network_of(FRAMEWORK, model)


def test_a_batch_without_an_input_is_refused(model, path):
    with pytest.raises(InvalidArgumentError, match="inputs"):
        verify(model, path, [{}])


def test_inputs_are_called_as_the_user_called_them():
    class Named:
        def __init__(self, name):
            self.name = name

    assert input_names([Named("keras_tensor_12")]) == ["input"]
    assert input_names([Named("left"), Named("input_3"), Named("right:0")]) == ["left", "input_1", "right"]
