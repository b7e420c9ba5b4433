"""Exported files: their integers are the model's, and ONNX Runtime, NumPy and PyTorch give the same codes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

import trainable_torch
from trainable_core.cli import main
from trainable_core.errors import (
    DocumentError,
    InvalidArgumentError,
    MissingLibraryError,
    ModelError,
    QuantizerStateError,
    UnsupportedConfigError,
)
from trainable_torch import calibrate, export, finalize, verify, wrap

onnx = pytest.importorskip("onnx", reason="onnx comes with the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime comes with the extra `onnx`")
pytest.importorskip("onnxscript", reason="onnxscript comes with the extra `onnx`")


def spec(method: str = "SYMMETRIC", n_bits: int = 8, **more: Any) -> dict[str, Any]:
    return {"method": method, "n_bits": n_bits, "training_method": "STE", **more}


def recipe(method: str = "POWER_OF_TWO", weights: int = 8, activations: int = 8, **more: Any) -> dict[str, Any]:
    """Return a recipe for a model in integers throughout."""
    return {
        "target": "onnx",
        "bias": "int32",
        "weights": spec(method, weights, per_channel=method != "UNIFORM"),
        "activations": spec(method, activations, placement="integer"),
        **more,
    }


def images(count: int = 4, size: int = 8) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(count))


def deployed(model: nn.Module, how: Any = None, x: Any = None) -> nn.Module:
    x = images() if x is None else x
    return finalize(calibrate(wrap(model.eval(), how or recipe()), [x]))


class Residual(nn.Module):
    """Convolutions with batch norms, an addition, a pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.a(x)))
        return self.fc(torch.relu(self.c(torch.relu(self.b(y) + y))).mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise convolutions with ReLU6, average pooling and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.point, self.fc = nn.Conv2d(4, 6, 1), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.wide(F.relu6(self.stem(x) * 1.0)))
        return self.fc(F.avg_pool2d(self.point(y), 2).flatten(1))


class UNet(nn.Module):
    """Maximum pooling, transposed convolutions and concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down(x))
        return self.out(torch.cat([torch.relu(self.up(torch.relu(self.mid(F.max_pool2d(a, 2))))), a], 1))


class Attention(nn.Module):
    """A transformer block on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.qkv = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x[:, 0])
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)) * 0.5, -1), v))
        return self.head((x + F.gelu(self.fc(x))).mean(1))


MODELS = {"residual": Residual, "depthwise": Depthwise, "unet": UNet, "attention": Attention}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Any:
    """A residual network in integers throughout, and its file."""
    torch.manual_seed(0)
    model = deployed(Residual())
    path = tmp_path_factory.mktemp("shipped") / "model.onnx"
    return model, path, export(model, path, example=images())


# ---- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_with_powers_of_two_every_code_is_equal_in_all_three(name, tmp_path):
    torch.manual_seed(1)
    model = deployed(MODELS[name]())
    report = export(model, tmp_path / "m.onnx", example=images())
    found = verify(model, tmp_path / "m.onnx", [images(5), 2 * images(3)])
    assert found.problems == []
    assert all(row.framework is not None for row in found.rows)
    if name == "attention":  # real functions: float on both sides, computed by different code
        assert {each.op for each in report.islands} == {"LayerNormalization", "Mul", "Softmax", "Gelu"}
    else:
        assert found.equal
        assert report.islands == ()
        assert found.results[next(iter(found.results))] == 0.0


@pytest.mark.parametrize(("method", "weights", "activations"), [("UNIFORM", 8, 8), ("SYMMETRIC", 2, 3)])
def test_numpy_predicts_every_code_of_every_width_and_grid(method, weights, activations, tmp_path):
    torch.manual_seed(2)
    model = deployed(Residual(), recipe(method, weights, activations))
    export(model, tmp_path / "m.onnx", example=images())
    found = verify(model, tmp_path / "m.onnx", [images(16)])
    assert found.problems == []
    assert all(row.numpy is not None and not row.numpy.different for row in found.rows)
    assert found.share < 0.002  # values next to ties, where a scale is no power of two
    assert max(row.framework.largest for row in found.rows) <= 1


def test_the_file_holds_the_codes_scales_and_biases_of_the_model(shipped):
    model, path, _ = shipped
    onnx.checker.check_model(str(path))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    layer, quantizer = model.b, model.b.weights_quantizers["weight"]
    with torch.no_grad():
        values = quantizer(layer.float_weight("weight"))
    codes = torch.round(values / quantizer.grid_scale).numpy()
    assert constants["b.weight.codes"].dtype == np.int8
    assert np.array_equal(constants["b.weight.codes"], codes)
    assert np.array_equal(constants["b.weight.scale"], quantizer.grid_scale.reshape(-1).numpy())
    bias = constants["b.bias.codes"].astype(np.float32) * constants["b.bias.scale"]
    assert constants["b.bias.codes"].dtype == np.int32
    assert np.array_equal(bias, model.b.integer_bias()[1].numpy())


def exact(path):
    """Return a session whose sums are exact on processors without VNNI too, as the documentation tells."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_nothing_is_float_between_the_first_quantizer_and_the_last(shipped):
    _, path, report = shipped
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.parent / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = [node.op_type for node in onnx.load(path.parent / "optimized.onnx").graph.node]
    moves = {"Transpose", "Reshape", "Flatten", "Clip"}
    integer = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
    assert set(kernels) - moves - integer == {"QuantizeLinear", "DequantizeLinear"}
    assert kernels.count("QuantizeLinear") == kernels.count("DequantizeLinear") == 1
    assert report.operations == {"Conv": 3, "Add": 1, "GlobalAveragePool": 1, "Gemm": 1}
    assert "nothing between" in str(report)


def test_any_number_of_rows_goes_in(shipped):
    model, path, _ = shipped
    session = exact(path)
    for count in (1, 2, 7):
        (y,) = session.run(None, {session.get_inputs()[0].name: images(count).numpy()})
        with torch.no_grad():
            assert np.array_equal(y, model(images(count)).numpy())


def test_the_metadata_say_what_wrote_the_file_and_the_recipe(shipped):
    _, path, _ = shipped
    model = onnx.load(path)
    (document,) = [json.loads(each.value) for each in model.metadata_props if each.key == "trainable"]
    assert document["versions"].keys() >= {"trainable-core", "trainable-torch", "torch"}
    assert document["recipe"]["weights"]["method"] == "POWER_OF_TWO"
    assert "/" not in "".join(node.doc_string for node in model.graph.node)
    assert all(not node.metadata_props for node in model.graph.node)  # a tracer's notes have paths of the machine


# ---- what can't be in integers --------------------------------------------------------------------------------------


def test_a_float_bias_keeps_its_value_and_is_told(tmp_path):
    model = deployed(Residual(), {**recipe(), "bias": "float"})
    report = export(model, tmp_path / "m.onnx", example=images())
    assert any("bias: int32" in each.reason for each in report.islands)
    assert verify(model, tmp_path / "m.onnx", [images(8)]).ok


def test_16_bit_activations_are_float_operations_and_told(tmp_path):
    model = deployed(UNet(), recipe("SYMMETRIC", 8, 16))
    report = export(model, tmp_path / "m.onnx", example=images())
    told = {each.reason for each in report.islands if each.op == "Conv"}
    assert told == {"its codes are 16-bit, and integer kernels take 8 bits", "what it reads is not quantized"}  # pooled
    found = verify(model, tmp_path / "m.onnx", [images(3)])
    assert not found.changed
    assert max(row.framework.largest for row in found.rows) <= 1


def test_clipped_codes_of_more_than_8_bits(tmp_path):
    how = recipe("SYMMETRIC", 8, 9)
    model = deployed(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), how)
    export(model, tmp_path / "m.onnx", example=images())
    found = verify(model, tmp_path / "m.onnx", [3 * images(4)])  # beyond the calibrated range
    assert max(row.framework.largest for row in found.rows) <= 1


def test_channels_with_zero_points_of_their_own_keep_their_codes(tmp_path):
    how = {"weights": spec("UNIFORM", 8), "activations": spec("UNIFORM", 8, placement="integer"), "target": "qonnx"}
    model = deployed(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3, bias=False)), how)
    report = export(model, tmp_path / "m.onnx", example=images())
    assert any("zero points" in each.reason for each in report.islands)
    found = verify(model, tmp_path / "m.onnx", [images(3)])
    assert not found.changed
    assert found.share < 0.002


def test_weights_alone_are_integers_and_everything_else_float(tmp_path):
    how = {"target": "onnx", "weights": spec("SYMMETRIC", 4)}
    model = deployed(Attention(), how)
    report = export(model, tmp_path / "m.onnx", example=images())
    assert all(each.op != "Gemm" or "not quantized" in each.reason for each in report.islands)
    codes = {each.name: each.data_type for each in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert codes["qkv.weight.codes"] == onnx.TensorProto.INT8
    found = verify(model, tmp_path / "m.onnx", [images(3)])
    assert found.ok
    assert found.rows == []
    assert max(found.results.values()) < 1e-5  # sums of at most 64 float32 products of numbers near one, in two orders


def test_an_embedding_of_one_scale_is_looked_up_in_codes(tmp_path):
    how = recipe("SYMMETRIC")
    how["weights"]["per_channel"] = False
    ids = torch.arange(6).reshape(2, 3)
    model = deployed(nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2)), how, ids)
    report = export(model, tmp_path / "m.onnx", example=ids)
    assert not [each for each in report.islands if each.op == "Gather"]
    assert verify(model, tmp_path / "m.onnx", [ids.flip(0)]).ok


def test_two_quantizers_in_a_row_stay_two(tmp_path):
    """ONNX Runtime merges QuantizeLinear and DequantizeLinear pairs with a scale of its own where it can."""
    how = {**recipe(), "rules": [{"match": {"name": "1"}, "activations": {"n_bits": 6, "placement": "inputs"}}]}
    model = deployed(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, bias=False)), how)
    export(model, tmp_path / "m.onnx", example=images())
    assert verify(model, tmp_path / "m.onnx", [images(3)]).equal


# ---- files that are not the model -----------------------------------------------------------------------------------


def damaged(path, folder, name, index=0, by=1):
    """Write a copy of a file with one number of a constant changed; returns its path."""
    model = onnx.load(path)
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    value = onnx.numpy_helper.to_array(tensor).copy()
    value.reshape(-1)[index] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, folder / "damaged.onnx")
    return folder / "damaged.onnx"


@pytest.mark.parametrize(("constant", "layer"), [
    ("b.bias.codes", "b"), ("c.weight.codes", "c"), ("fc.weight.scale", "fc"), ("a.weight.codes", "a"),
])  # fmt: skip
def test_one_changed_number_is_named_with_its_layer(shipped, tmp_path, constant, layer):
    model, path, _ = shipped
    found = verify(model, damaged(path, tmp_path, constant, by=3), [images(6)])
    assert not found.ok
    assert list(found.changed) == [f"{layer}, {constant}"]
    assert constant in found.problems[0]


def test_the_first_layer_and_channel_that_differ_are_named(shipped, tmp_path):
    model, path, _ = shipped
    found = verify(model, damaged(path, tmp_path, "b.bias.codes", index=2, by=4000), [images(6)])
    assert found.first.layer in ("add", "b", "relu_1")
    assert found.first.framework.channel == 2
    assert all(not row.numpy.different for row in found.rows)  # NumPy computes what the file says


def test_a_deep_network_is_judged_layer_by_layer(tmp_path):
    torch.manual_seed(3)
    deep = nn.Sequential(*[nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()) for _ in range(24)])
    x = torch.rand(2, 6, 8, 8, generator=torch.Generator().manual_seed(5))
    model = deployed(deep, recipe("SYMMETRIC"), x)
    export(model, tmp_path / "m.onnx", example=x)
    found = verify(model, tmp_path / "m.onnx", [x])
    assert found.ok, str(found)
    assert all(row.alone is not None and row.alone.largest <= 1 for row in found.rows)
    assert sum(row.alone.different for row in found.rows) <= sum(row.framework.different for row in found.rows)


def test_a_layer_that_computes_otherwise_is_not_hidden_by_those_before_it(shipped):
    model, path, _ = shipped
    other = copy.deepcopy(model)
    holder = other.get_submodule("relu_2_output_holder")
    step = holder.activation_holder_quantizer.grid_scale
    holder.register_forward_pre_hook(lambda _, args: (args[0] + 0.6 * step,))
    found = verify(other, path, [images(3)])
    assert not found.ok
    assert any("in integers" in problem or "certified" in problem for problem in found.problems)


def test_another_model_is_not_the_files(shipped):
    _, path, _ = shipped
    torch.manual_seed(9)
    found = verify(deployed(Residual()), path, [images(3)])
    assert {name.split(", ")[0] for name in found.changed} >= {"a", "b", "c", "fc"}


def test_a_changed_node_is_found_without_a_model(shipped, tmp_path, capsys):
    _, path, _ = shipped
    assert main(["verify", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    assert document["rows"][1]["kernel"] == "QLinearConv"
    model = onnx.load(path)
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    next(each for each in convolution.attribute if each.name == "pads").ints[:] = [0, 2, 2, 0]
    onnx.save(model, tmp_path / "changed.onnx")
    assert main(["verify", str(tmp_path / "changed.onnx")]) == 1
    assert "nodes" in capsys.readouterr().out
    assert main(["verify", str(damaged(path, tmp_path, "b.bias.codes"))]) == 1
    assert "b, b.bias.codes" in capsys.readouterr().out


def test_a_file_of_inputs_is_taken(shipped, tmp_path, capsys):
    _, path, _ = shipped
    name = onnx.load(path).graph.input[0].name
    np.savez(tmp_path / "inputs.npz", **{name: images(2).numpy()})
    assert main(["verify", str(path), "--inputs", str(tmp_path / "inputs.npz")]) == 0
    assert "are equal" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", wrong=np.zeros(1))
    assert main(["verify", str(path), "--inputs", str(tmp_path / "other.npz")]) == 2
    assert main(["verify", str(tmp_path / "missing.onnx")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no onnx at all", None])
def test_what_is_no_file_of_ours_is_refused(shipped, tmp_path, content):
    model, path, _ = shipped
    other = tmp_path / "other.onnx"
    if content is None:
        foreign = onnx.load(path)
        del foreign.metadata_props[:]
        onnx.save(foreign, other)
    else:
        other.write_bytes(content)
    with pytest.raises(DocumentError):
        verify(model, other, [images(2)])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_what_is_not_deployed_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ModelError, match=r"trainable_torch\.wrap"):
        export(Residual(), path, example=images())
    qmodel = wrap(Residual(), recipe())
    with pytest.raises(QuantizerStateError, match="finalize"):
        export(qmodel, path, example=images())
    with pytest.raises(QuantizerStateError, match="finalize"):
        verify(qmodel, path, [images()])
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_wrongly_is_refused(shipped, tmp_path):
    model, path, _ = shipped
    with pytest.raises(InvalidArgumentError, match="did you mean 'onnx'"):
        export(model, tmp_path / "m.onnx", "onxn", example=images())
    with pytest.raises(InvalidArgumentError, match="example"):
        export(model, tmp_path / "m.onnx")
    with pytest.raises(InvalidArgumentError, match="no batches"):
        verify(model, path, [])
    with pytest.raises(UnsupportedConfigError, match="bfloat16"):
        export(finalize(model).bfloat16(), tmp_path / "m.onnx", example=images())
    with pytest.raises(ModelError, match="can't be traced"):
        export(model, tmp_path / "m.onnx", example=torch.zeros(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_the_extra(shipped, tmp_path, monkeypatch):
    model, _, _ = shipped
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingLibraryError, match=r"onnxscript(.|\n)*\[onnx\]"):
        export(model, tmp_path / "m.onnx", example=images())
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_done(shipped, tmp_path):
    model, _, _ = shipped
    for path in (tmp_path / "nowhere" / "m.onnx", tmp_path, "a\0b"):
        with pytest.raises(DocumentError, match="can't be written"):
            export(model, path, example=images())
    assert list(tmp_path.iterdir()) == []


# ---- other ways of writing ------------------------------------------------------------------------------------------


def test_large_constants_go_into_a_file_beside(shipped, tmp_path):
    model = deployed(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 2)))
    path = tmp_path / "m.onnx"
    for _ in range(2):  # the second time it replaces the first; one row is enough of an example
        export(model, path, example=images(1), external_data=True)
        (data,) = [each for each in tmp_path.iterdir() if each != path]
        assert data.stat().st_size >= 64 * 64
        assert path.stat().st_size < 64 * 64 * 2
    session = exact(path)
    with torch.no_grad():
        expected = model(images(3)).numpy()
    assert np.array_equal(session.run(None, {session.get_inputs()[0].name: images(3).numpy()})[0], expected)
    assert verify(model, path, [images(3)]).equal


def test_qonnx_has_quant_nodes_of_the_true_widths(tmp_path):
    model = deployed(Residual(), {**recipe("SYMMETRIC", 3, 5), "target": "qonnx"})
    export(model, tmp_path / "m.onnx", "qonnx", example=images())
    graph = onnx.load(tmp_path / "m.onnx").graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "Quant"]
    widths = [float(constants[node.input[3]]) for node in quantizers]
    assert {node.domain for node in quantizers} == {"qonnx.custom_op.general"}
    assert sorted(set(widths)) == [3.0, 5.0]
    assert widths.count(3.0) == 4  # one for each weight
    with pytest.raises(DocumentError, match="'qonnx'"):
        verify(model, tmp_path / "m.onnx", [images()])


def test_mctq_is_what_to_mctq_returns(tmp_path):
    model = deployed(Residual(), {**recipe(), "target": "mctq"})
    report = export(model, tmp_path / "m.pt", "mctq", example=images())
    opened = torch.load(tmp_path / "m.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(opened(images()), model(images()))
    assert report.size == (tmp_path / "m.pt").stat().st_size


def test_the_model_is_left_as_it_is(shipped, tmp_path):
    model, _, _ = shipped
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        y = model(images())
    export(model, tmp_path / "m.onnx", example=images())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(images()), y)


def test_nothing_of_onnx_is_imported_until_it_is_needed():
    look = "print([name for name in sys.modules if name.startswith('onnx')])"
    code = f"import sys, trainable_torch as t; t.wrap, t.export, t.verify; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert trainable_torch.export is export
