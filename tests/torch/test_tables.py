"""Look-up tables: trained, deployed, saved, and given to mct-quantizers bit for bit."""

import numpy as np
import pytest
import torch
from mct_quantizers.pytorch import quantizers as mctq
from torch import nn

from tests.table_models import ACTIVATIONS, RECIPES, REFUSED_OF_ACTIVATIONS, refused
from tests.torch.models import ready, train, vectors
from trainable_core.documents.model import place_levels
from trainable_core.errors import DocumentError, InvalidArgumentError, TrainableError, UnsupportedConfigError
from trainable_core.reference import affine, apot, dkm
from trainable_core.reference.oracle import State
from trainable_torch import describe, diagnose, export, finalize, load, report, save, suggest, to_mctq, wrap
from trainable_torch.training import quantizers_of


def trained(recipe, *batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    qmodel = ready(model, recipe, *batches)
    before = [p.detach().clone() for q in quantizers_of(qmodel).values() for p in q.parameters()]
    train(qmodel, [vectors(4, 8)] * 3, lr=0.05)
    after = [p for q in quantizers_of(qmodel).values() for p in q.parameters()]
    assert before
    assert all(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
    return model, qmodel.eval()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_trained_is_what_mctqs_own_class_computes(recipe, tmp_path):
    model, qmodel = trained(recipe)
    x = vectors(16, 8)
    deployed = finalize(qmodel)
    assert torch.equal(deployed(x), qmodel(x))
    assert torch.equal(qmodel.train()(x), deployed(x))
    stock = to_mctq(deployed)
    assert torch.equal(stock(x), deployed(x))
    assert {type(m).__module__.partition(".")[0] for m in stock.modules()} == {"torch", "mct_quantizers"}
    for name, saved in (("deployed", deployed), ("trained", qmodel)):
        save(saved, tmp_path / f"{name}.safetensors")
        assert torch.equal(load(tmp_path / f"{name}.safetensors", model).eval()(x), deployed(x))
    assert all(row.params["lut_values"] for row in describe(deployed).rows)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 5])
def test_every_value_gets_mctqs_level_and_keeps_what_it_is(n_bits):
    recipe = {"weights": {"method": "LUT_SYM_QUANTIZER", "n_bits": n_bits, "training_method": "APOT"}}
    qmodel = ready(nn.Linear(4, 3), recipe)
    (quantizer,) = quantizers_of(qmodel).values()
    deployed = quantizer.convert2inferable()
    assert isinstance(deployed, mctq.WeightsLUTSymmetricInferableQuantizer)
    quarters = torch.arange(-4 * 140, 4 * 140) / 4 / 128  # every level, every tie, beyond the ends
    x = quarters[None] * quantizer.threshold.detach()[:, None]
    wide = ready(nn.Linear(x.shape[1], 3), recipe)
    (of_wide,) = quantizers_of(wide).values()
    of_wide.assign(of_wide.threshold, quantizer.threshold.detach().numpy())
    values = of_wide(x)
    assert torch.equal(values, of_wide.convert2inferable()(x))
    assert torch.equal(values, of_wide.convert2inferable().to_mctq()(x.clone()))
    expected = affine.fake_quantize(x.numpy(), of_wide.current_qparams())
    np.testing.assert_array_equal(values.detach().numpy(), expected)
    assert values.unique().numel() <= 3 * 2**n_bits
    extreme = torch.tensor([[torch.inf, -torch.inf, torch.nan]]).expand(3, 3)
    few = ready(nn.Linear(3, 3), recipe)
    (of_few,) = quantizers_of(few).values()
    for each in (of_few, of_few.convert2inferable()):
        got, top = each(extreme), of_few.threshold.detach() * (max(apot.levels(n_bits, "q")) / 128)
        assert torch.equal(got[:, 0], top)
        assert torch.equal(got[:, 1], -top)
        assert got[:, 2].isnan().all()


def test_infinite_weights_give_finite_gradients():
    qmodel = ready(nn.Linear(2, 1, bias=False), RECIPES["stretched LUT_SYM_QUANTIZER per channel"])
    (quantizer,) = quantizers_of(qmodel).values()
    x = torch.tensor([[torch.inf, -torch.inf]], requires_grad=True)
    quantizer.train()(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0]]
    assert quantizer.threshold.grad.tolist() == [0.0]  # 96 - 96


@pytest.mark.parametrize(
    ("weights", "error", "fact"),
    [
        ({"training_method": "PARETOQ", "n_bits": 3}, UnsupportedConfigError, "LSQ"),
        ({"training_method": "APOT", "n_bits": 7}, UnsupportedConfigError, "2, 3, 4, 5, 6"),
        ({"training_method": "PARETOQ", "n_bits": 1, "arguments": {"ternary": True}}, InvalidArgumentError, "2 bits"),
        ({"training_method": "PARETOQ", "n_bits": 2, "arguments": {"ternary": 1}}, InvalidArgumentError, "ternary"),
        ({"training_method": "DKM", "n_bits": 5}, UnsupportedConfigError, "1 to 4 bits"),
        (
            {"training_method": "DKM", "n_bits": 2, "arguments": {"temperature": {"t_start": 0}}},
            InvalidArgumentError,
            "temperature",
        ),
        ({"training_method": "APOT", "n_bits": 4, "method": "SYMMETRIC"}, LookupError, "APOT"),
    ],
)
def test_levels_that_there_are_not_are_refused(weights, error, fact):
    with pytest.raises(error, match=fact):
        wrap(nn.Linear(2, 2), {"weights": {"method": "LUT_SYM_QUANTIZER", **weights}})


def test_params_with_another_table_are_refused():
    qmodel = ready(nn.Linear(2, 2), RECIPES["stretched LUT_SYM_QUANTIZER per channel"])
    (quantizer,) = quantizers_of(qmodel).values()
    with pytest.raises(InvalidArgumentError, match="lut_values"):
        quantizer.set_quantization_params({2: {"threshold": 1.0, "lut_values": [-64, 0, 64]}})


def soft_case(n_bits, seed):
    """Return a quantizer in its first training step, and an input with all that may be in a weight."""
    arguments = {"temperature": {"t_start": 0, "t_end": 9, "initial_val": 0.3, "target_val": 0.1}}
    weights = {"method": "LUT_SYM_QUANTIZER", "n_bits": n_bits, "training_method": "DKM", "arguments": arguments}
    generator = np.random.default_rng(seed)
    qmodel = ready(nn.Linear(40, 3), {"weights": weights})
    (quantizer,) = quantizers_of(qmodel).values()
    quantizer.assign(quantizer.centroids, generator.uniform(-140, 140, 2**n_bits).astype(np.float32))  # some clipped
    x = generator.normal(0, 0.1, (3, 40)).astype(np.float32)
    x[0, :4] = np.nan, np.inf, -np.inf, 0.0
    quantizer.advance()
    return quantizer.train(), x, generator.normal(size=x.shape).astype(np.float32)


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
def test_soft_values_and_their_gradients_are_the_reference_s(n_bits):
    quantizer, x, upstream = soft_case(n_bits, n_bits)
    grid, centroids = quantizer.current_qparams(), quantizer.to_numpy(quantizer.centroids)
    state = State({n_bits: grid}, n_bits, {"centroids": centroids}, quantizer.get_arguments(), quantizer.counted_steps)
    given = torch.from_numpy(x).requires_grad_()
    values = quantizer(given)
    values.backward(torch.from_numpy(upstream))
    expected = dkm.METHOD.oracle.values(x, state, True)
    found = values.detach().numpy()
    assert np.array_equal(np.isnan(found), np.isnan(x))
    assert (np.abs(found - expected.values) <= expected.allowed)[~np.isnan(x)].all()
    right = dkm.METHOD.oracle.gradients(x, upstream, state)
    assert (np.abs(given.grad.numpy() - right.x) <= right.x_allowed).all()
    off = np.abs(quantizer.centroids.grad.numpy() - right.variables["centroids"])
    assert (off <= right.variables_allowed["centroids"]).all()
    assert np.abs(right.variables["centroids"]).max() > 10 * right.variables_allowed["centroids"].max()
    for _ in range(9):
        quantizer.advance()
    assert torch.equal(quantizer(given).nan_to_num(), quantizer.eval()(given).nan_to_num())


def test_learned_levels_may_fall_together(tmp_path):
    """Two centroids that are rounded to one number make a smaller table, which is deployed and loaded."""
    qmodel = ready(nn.Linear(8, 3), RECIPES["learned LUT_SYM_QUANTIZER per channel"])
    (quantizer,) = quantizers_of(qmodel).values()
    quantizer.assign(quantizer.centroids, np.array([50.2, -60.0, 49.9, 100.0], np.float32))
    deployed = finalize(qmodel)
    assert describe(deployed).rows[0].params["lut_values"] == [-60, 50, 100]
    assert torch.equal(deployed(vectors(4, 8)), qmodel.eval()(vectors(4, 8)))
    save(deployed, tmp_path / "deployed.safetensors")
    loaded = load(tmp_path / "deployed.safetensors", nn.Linear(8, 3))
    assert torch.equal(loaded(vectors(4, 8)), deployed(vectors(4, 8)))
    again = type(quantizer).from_config(quantizer.get_config())
    assert again.levels == quantizer.levels == (-60, 50, 100)
    fresh = type(quantizer)(quantizer.current_config())
    fresh.initialize_quantization((3, 8), "weight", None)
    assert fresh.levels == (-60, 50, 100)
    with pytest.raises(InvalidArgumentError, match="at most 4"):
        quantizer.set_quantization_params({2: {"threshold": 1.0, "lut_values": [1, 2, 3, 4, 5]}})


@pytest.mark.parametrize("levels", [None, [], [0.5], [128], [1, 2, 3, 4, 5], "table", [[float("nan")]]])
def test_a_file_with_levels_that_there_cant_be_is_refused(levels):
    qmodel = ready(nn.Linear(8, 3), RECIPES["learned LUT_SYM_QUANTIZER per channel"])
    (quantizer,) = quantizers_of(qmodel).values()
    before = quantizer.levels
    with pytest.raises(DocumentError, match="no table of at most 4 codes"):
        place_levels("file", quantizer, levels)
    assert quantizer.levels == before


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_trained_activations_are_what_mctqs_own_class_computes(recipe, tmp_path):
    model, qmodel = trained(recipe, vectors(4, 8))
    signs = [quantizer.signed for quantizer in quantizers_of(qmodel).values()]
    assert signs == [True, False]  # what the ReLU gives is not negative
    x = vectors(16, 8)
    deployed = finalize(qmodel)
    assert torch.equal(deployed(x), qmodel(x))
    assert torch.equal(qmodel.train()(x), deployed(x))
    stock = to_mctq(deployed)
    assert torch.equal(stock(x), deployed(x))
    assert {type(m).__module__.partition(".")[0] for m in stock.modules()} == {"torch", "mct_quantizers"}
    for name, saved in (("deployed", deployed), ("trained", qmodel)):
        save(saved, tmp_path / f"{name}.safetensors")
        assert torch.equal(load(tmp_path / f"{name}.safetensors", model).eval()(x), deployed(x))
    tables = [row.params for row in describe(deployed).rows]
    assert [table["is_signed"] for table in tables] == signs
    assert tables[0]["lut_values"][0] < 0 <= tables[1]["lut_values"][0]
    again = wrap(model, recipe)
    again.load_state_dict(qmodel.state_dict())
    assert torch.equal(again.eval()(x), deployed(x))


def activation_of(signed, n_bits, method="APOT", seen=(-1.0, 0.0, 1.0)):
    """Return the quantizer of a layer's input, calibrated."""
    section = {"method": "LUT_POT_QUANTIZER", "n_bits": n_bits, "training_method": method, "signed": signed}
    qmodel = ready(nn.Linear(len(seen), 1), {"activations": section}, torch.tensor([seen], dtype=torch.float32))
    (quantizer,) = quantizers_of(qmodel).values()
    return quantizer.eval()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n_bits", "method"), [(2, "APOT"), (3, "APOT"), (4, "APOT"), (5, "APOT"), (3, "DKM")])
def test_every_activation_gets_mctqs_level_and_keeps_what_it_is(signed, n_bits, method):
    quantizer = activation_of(signed, n_bits, method, tuple(np.linspace(-1.0, 1.9, 50)))
    quantizer.assign(quantizer.threshold, np.float32(0.3))  # rounded up to 0.5
    deployed = quantizer.convert2inferable()
    assert isinstance(deployed, mctq.ActivationLutPOTInferableQuantizer)
    assert (quantizer.levels[0] < 0) is signed
    steps = 128 if signed else 256
    x = torch.arange(-4 * 300, 4 * 300) / 4 / steps * 0.5  # every level, every tie, beyond the ends
    values = quantizer(x)
    assert torch.equal(values, deployed(x))
    assert torch.equal(values, deployed.to_mctq()(x.clone()))
    expected = affine.fake_quantize(x.numpy(), quantizer.current_qparams())
    np.testing.assert_array_equal(values.detach().numpy(), expected)
    assert set((values / 0.5 * steps).tolist()) == set(quantizer.levels)
    extreme = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    for each in (quantizer, deployed):
        got = each(extreme)
        assert got[:2].tolist() == [quantizer.levels[-1] / steps * 0.5, quantizer.levels[0] / steps * 0.5]
        assert got[2].isnan()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", ["APOT", "DKM"])
def test_the_gradient_passes_deployed_tables_where_there_are_codes(signed, method):
    quantizer = activation_of(signed, 3, method, (-1.0, 0.2, 0.6, 1.0))
    quantizer.assign(quantizer.threshold, np.float32(1.0))
    low, high = (-1.0, 127 / 128) if signed else (0.0, 255 / 256)
    x = torch.tensor([low, high, low - 2**-9, high + 2**-9, 0.3, torch.nan, torch.inf, -torch.inf])
    for each in (quantizer, quantizer.convert2inferable()):
        given = x.clone().requires_grad_()
        each(given).backward(torch.arange(1.0, 9.0))
        expected = [1.0, 2.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0]
        if method == "APOT" and each is quantizer:  # the gradient of a method goes as far as half a gap
            expected[:4] = given.grad[:4].tolist()
        assert given.grad.tolist() == expected
    half = torch.tensor([0.3], dtype=torch.bfloat16, requires_grad=True)
    out = quantizer.convert2inferable()(half)
    assert out.dtype == torch.bfloat16
    out.backward()
    assert half.grad.item() == 1.0


def test_a_negative_activation_counts_as_zero_where_the_recipe_says_that_there_is_no_sign():
    quantizer = activation_of(False, 4, "DKM", (-5.0, -1.0, 0.25, 1.0))
    assert not quantizer.signed
    assert quantizer.current_config().quantization_params["is_signed"] is False
    assert quantizer(torch.tensor([-5.0])).item() == quantizer.levels[0] == 0
    assert quantizer.threshold.item() == 2.0  # the power of two above 256/255


@pytest.mark.parametrize(("activations", "others", "fact"), REFUSED_OF_ACTIVATIONS)
def test_activations_that_there_are_not_are_refused(activations, others, fact):
    with pytest.raises(TrainableError, match=fact):
        wrap(nn.Sequential(nn.Linear(2, 2)), refused(activations, others))


def test_params_with_the_table_of_the_other_sign_are_refused():
    quantizer = activation_of(True, 2)
    levels = [0, 32, 64, 128]
    with pytest.raises(InvalidArgumentError, match="from -128 to 127"):
        quantizer.set_quantization_params({2: {"threshold": 1.0, "is_signed": True, "lut_values": levels}})
    assert quantizer.signed
    quantizer.set_quantization_params({2: {"threshold": 1.0, "is_signed": False, "lut_values": levels}})
    assert quantizer.levels == tuple(levels)
    x = torch.tensor([-1.0, 0.2, 0.3, 2.0])
    assert quantizer(x).tolist() == [0.0, 0.25, 0.25, 0.5]
    assert quantizer.convert2inferable()(x).tolist() == [0.0, 0.25, 0.25, 0.5]
    again = type(quantizer).from_config(quantizer.get_config())
    assert (again.signed, again.levels) == (False, tuple(levels))
    with pytest.raises(InvalidArgumentError, match="lut_values"):
        quantizer.set_quantization_params({2: {"threshold": 1.0, "is_signed": False, "lut_values": [0, 64]}})


@pytest.mark.parametrize("kind", ["weights", "activations"])
@pytest.mark.parametrize("target", ["onnx", "qonnx"])
def test_files_without_tables_are_refused(kind, target, tmp_path):
    """Nothing in the recipe says that the model is for such a file, so `export` is what has to say it."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    recipe = {"weights": RECIPES["powers LUT_POT_QUANTIZER per channel"], "activations": ACTIVATIONS["powers 5 bits"]}
    deployed = finalize(ready(nn.Linear(8, 3), recipe[kind], vectors(4, 8)))
    with pytest.raises(UnsupportedConfigError, match="values of a table"):
        export(deployed, tmp_path / "model.onnx", target=target, example=vectors(4, 8))
    assert not list(tmp_path.iterdir())
    export(deployed, tmp_path / "model.pt", target="mctq")


@pytest.mark.parametrize("recipe", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_what_looks_at_models_knows_tables_of_activations(recipe, tmp_path):
    pytest.importorskip("matplotlib", reason="reports need matplotlib")
    batches = [vectors(16, 8)]
    plain = {"weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "LSQ"}}
    qmodel = ready(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), {**recipe, **plain}, *batches)
    for each in (qmodel, finalize(qmodel)):
        figures = [each for each in diagnose(each, batches).quantizers if each.target == "Activation"]
        assert [figure.most_bits for figure in figures] == [recipe["activations"]["n_bits"]] * 2
        assert all(figure.quality.sqnr > 0 for figure in figures)
        report(each, tmp_path / "page.html", batches=batches)
    widths = suggest(qmodel, batches, 6, widths=[4, 8]).rows
    assert {name for row in widths for name in row.layers} == {"0", "2"}
