"""One pass over batches sets every threshold, or changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.torch.models import (
    GRIDS,
    TRAINED_BY,
    images,
    network,
    quantizer_at,
    ready,
    recipe,
    same_state,
    spec,
    train,
    vectors,
    weights_only,
)
from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import CalibrationMethod
from trainable_core.errors import (
    CalibrationError,
    ModelError,
    NothingQuantizedWarning,
    QuantizerStateError,
    ShapeMismatchError,
    ThresholdsKeptWarning,
    UnseenTensorsError,
)
from trainable_torch import calibrate, describe, finalize, freeze_quant_params, load, save, wrap
from trainable_torch.training import quantizers_of

WEIGHT, INPUT = "weights_quantizers.weight", "input_holders.input.activation_holder_quantizer"


def numbers(quantizer):
    """Return a quantizer's variables as float32 arrays, by plain name."""
    return {key: variable.detach().numpy() for key, variable in quantizer.grid_variables(quantizer.widths[0]).items()}


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", list(CalibrationMethod))
def test_every_method_gives_cores_numbers(method, grid):
    """Core is told exactly the values that pass: those of float weights, in eval mode."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 2)), vectors(40, 6)
    how = recipe(method=grid, calibration={"weights": method.value, "activations": method.value, "p": 3.0})
    qmodel = ready(model, how, x[:10], x[10:])
    model.eval()
    options = {"calibration_method": method, "quantization_method": grid, "n_bits": 4, "p": 3.0}
    with torch.no_grad():
        for name, seen in (("0", x), ("2", model[0](x))):
            observer = Observer()
            observer.update(seen.numpy())
            expected = calibrate_activation(observer, **options)
            expected.pop(SIGNED, None)
            found = numbers(quantizer_at(qmodel, f"{name}.{INPUT}"))
            assert {key: np.float32(value) for key, value in expected.items()} == found
            weight = model.get_submodule(name).weight.numpy()
            expected = calibrate_weights(weight, channels_axis=0, **options)
            found = numbers(quantizer_at(qmodel, f"{name}.{WEIGHT}"))
            assert expected.keys() == found.keys()
            assert all(np.array_equal(np.float32(expected[key]), found[key]) for key in expected)


def test_percentile_and_exponent_come_from_the_recipe():
    def threshold(**calibration):
        how = {"activations": spec(), "calibration": calibration}
        return float(quantizer_at(ready(nn.Linear(6, 5), how, vectors(400, 6)), INPUT).threshold)

    assert threshold(activations="percentile", percentile=50) < threshold(activations="percentile", percentile=99)
    assert threshold(activations="lp", p=0.5) < threshold(activations="lp", p=8.0)


def test_the_extremes_by_hand():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -2.0], [0.25, 0.125]]))
    minmax = {"weights": "minmax", "activations": "minmax"}
    qmodel = ready(layer, recipe(calibration=minmax), torch.tensor([[-3.0, 1.0]]), torch.tensor([[0.0, 5.0]]))
    assert quantizer_at(qmodel, WEIGHT).threshold.tolist() == [2.0, 0.25]
    assert (quantizer_at(qmodel, INPUT).threshold.item(), quantizer_at(qmodel, INPUT).signed) == (5.0, True)
    qmodel = ready(layer, recipe(method="UNIFORM", calibration=minmax), torch.tensor([[-3.0, 5.0]]))
    assert numbers(quantizer_at(qmodel, INPUT)) == {RANGE_MIN: -3.0, RANGE_MAX: 5.0}
    qmodel = ready(layer, recipe(method="POWER_OF_TWO", calibration=minmax), torch.tensor([[0.0, 5.0]]))
    assert numbers(quantizer_at(qmodel, INPUT)) == {THRESHOLD: 8.0}
    assert quantizer_at(qmodel, INPUT).signed is False


@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_training_method_is_calibrated(training_method):
    qmodel = ready(network(), recipe(training_method), images())
    assert all(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())
    assert {row.state for row in describe(qmodel).rows} == {"trainable"}


def test_each_width_of_a_method_with_several_gets_its_own_numbers():
    quantizer = quantizer_at(ready(nn.Linear(6, 5), {"activations": spec("DQA")}, vectors(40, 6)), INPUT)
    observer = Observer()
    observer.update(vectors(40, 6).numpy())
    for width in (4, 8, 16):
        expected = calibrate_activation(
            observer, calibration_method="percentile", quantization_method="SYMMETRIC", n_bits=width
        )
        assert quantizer.grid_variables(width)[THRESHOLD].item() == np.float32(expected[THRESHOLD])


def test_how_values_come_in_batches_does_not_matter():
    x = images(8)
    assert same_state(ready(network(), recipe(), x), ready(network(), recipe(), *x.flip(0).split(3)))


def test_quantizers_further_down_see_float_values():
    """Not what the quantizers before them make of it, which differ in width here."""
    models = [
        ready(network(), recipe(rules=[{"match": {"name": "stem.*"}, "weights": {"n_bits": n}}]), images())
        for n in (2, 8)
    ]
    first, second = (quantizer_at(qmodel, f"head.{INPUT}").threshold for qmodel in models)
    assert first == second


def test_it_returns_the_model_it_was_given():
    qmodel = wrap(network(), recipe())
    assert calibrate(qmodel, [images()]) is qmodel


def test_no_gradients_and_no_graph_are_left():
    qmodel = ready(network(), recipe("LSQ"), images())
    assert all(parameter.grad is None for parameter in qmodel.parameters())


def test_weights_that_are_tied_are_calibrated_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight

    qmodel = ready(Tied(), weights_only())
    assert len(quantizers_of(qmodel)) == 1
    assert all(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_dtype_are_calibrated(dtype):
    qmodel = ready(network(dtype), recipe(), images().to(dtype))
    assert qmodel(images().to(dtype)).dtype == dtype
    numbers = [value for quantizer in quantizers_of(qmodel).values() for value in quantizer.buffers()]
    assert {value.dtype for value in numbers} == {torch.float32, torch.bool}  # thresholds, and whether they are signed


def test_the_whole_state_stays_as_it_was_apart_from_quantizers():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5))
    qmodel = wrap(model, recipe(fold_batch_norm=False)).train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items() if "quantizer" not in name}
    calibrate(qmodel, [vectors(40, 6)])
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())  # statistics too


# ---- batches --------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, left, right=0.0):
        return self.fc(left + right)


def threshold(model, batches, **options):
    qmodel = wrap(model, recipe(calibration={"activations": "minmax"}))
    return quantizer_at(calibrate(qmodel, batches, **options), f"fc.{INPUT}").threshold.item()


def test_a_batch_may_be_a_tensor_a_mapping_a_tuple_or_a_list():
    x = vectors(4, 6)
    expected = x.abs().max().item()
    for batch in (x, {"left": x}, (x, torch.zeros(4)), [x, torch.zeros(4)]):
        assert threshold(Named(), [batch]) == expected
    assert threshold(Named(), [{"left": x, "right": x}]) == 2 * expected


def test_forward_says_how_to_call_the_model():
    x = vectors(4, 6)
    seen = []

    def forward(model, batch):
        seen.append(model)
        return model(batch[0], right=batch[1])

    assert threshold(Named(), [(x, 3 * x)], forward=forward) == 4 * x.abs().max().item()
    assert isinstance(seen[0], Named)


def test_batches_may_come_from_a_generator_or_a_loader():
    x = vectors(12, 6)
    expected = x.abs().max().item()
    assert threshold(Named(), (part for part in x.split(5))) == expected
    assert threshold(Named(), DataLoader(TensorDataset(x, torch.zeros(12)), batch_size=5)) == expected


def test_each_batch_is_read_once():
    read = []
    calibrate(wrap(network(), recipe()), (read.append(None) or images() for _ in range(3)))
    assert len(read) == 3


def test_no_batches_are_needed_for_weights_and_none_are_read():
    calibrate(wrap(network(), weights_only()))
    calibrate(wrap(network(), weights_only()), (1 / 0 for _ in range(2)))


def test_a_model_without_quantizers_has_nothing_to_calibrate():
    with pytest.warns(NothingQuantizedWarning):
        qmodel = wrap(network(), {})
    assert describe(calibrate(qmodel)).rows == ()


def test_progress_is_shown_when_asked(capsys):
    calibrate(wrap(network(), recipe()), [images()], progress=True)
    assert "calibrate" in capsys.readouterr().err
    calibrate(wrap(network(), recipe()), [images()], progress=False)
    assert capsys.readouterr().err == ""


def test_progress_is_not_shown_where_no_terminal_is(capsys):
    calibrate(wrap(network(), recipe()), [images()])
    assert capsys.readouterr().err == ""


# ---- calibrating again ----------------------------------------------------------------------------------------------


def test_thresholds_that_are_set_are_not_overwritten():
    qmodel = train(ready(network(), recipe("LSQ"), images()), [images()])
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    with pytest.raises(QuantizerStateError, match="force=True"):
        calibrate(qmodel, [9 * images()])
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())


def test_by_force_they_are():
    qmodel = ready(network(), recipe("LSQ"), images())
    again = wrap(network(), recipe("LSQ"))
    calibrate(calibrate(qmodel, [9 * images()], force=True), [2 * images()], force=True)
    assert same_state(qmodel, calibrate(again, [2 * images()]))


def test_a_forced_calibration_takes_the_trained_weights():
    qmodel = ready(network(), weights_only(calibration={"weights": "minmax"}))
    with torch.no_grad():
        qmodel.head.weight.mul_(3)
    calibrate(qmodel, force=True)
    assert torch.equal(qmodel.head.weights_quantizers["weight"].threshold, qmodel.head.weight.abs().amax(1))


def test_a_forced_calibration_keeps_parameters_that_an_optimizer_holds():
    qmodel = ready(network(), recipe("LSQ"), images())
    held = dict(qmodel.named_parameters())
    calibrate(qmodel, [2 * images()], force=True)
    assert all(parameter is held[name] for name, parameter in qmodel.named_parameters())


def test_only_what_is_missing_is_calibrated():
    qmodel = ready(network(), recipe("LSQ"), images())
    first, second = (quantizer_at(qmodel, f"{name}.{INPUT}") for name in ("body", "head"))
    before = first.threshold.item()
    with torch.no_grad():
        first.threshold.mul_(2)
        second.threshold.fill_(float("nan"))
    qmodel.load_state_dict(qmodel.state_dict())  # a state without a number: that quantizer is not calibrated
    assert not second.calibrated
    calibrate(qmodel, [5 * images()])
    assert first.threshold.item() == 2 * before
    assert second.threshold.item() > before


def test_a_finalized_model_is_not_calibrated():
    deployed = finalize(ready(network(), recipe(), images()))
    for force in (True, False):
        with pytest.raises(QuantizerStateError, match="finalized"):
            calibrate(deployed, [images()], force=force)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def uncalibrated():
    """Return a wrapped model with modules in both modes."""
    qmodel = wrap(network(), recipe("LSQ")).train()
    qmodel.body.eval()
    return qmodel


def modes(qmodel):
    layers = [m.layer for m in qmodel.modules() if hasattr(m, "layer")]
    return [module.training for module in (*qmodel.modules(), *layers)]


class Interrupted(Exception):  # noqa: N818 - what happens, not what is wrong
    """Stands for whatever a loader raises."""


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_calibration_leaves_the_model_as_it_was(error):
    def batches():
        yield images()
        raise error

    qmodel = uncalibrated()
    before, expected = modes(qmodel), describe(qmodel)
    with pytest.raises(error):
        calibrate(qmodel, batches())
    assert modes(qmodel) == before
    assert describe(qmodel) == expected
    assert {row.state for row in expected.rows} == {"not calibrated"}
    assert not any(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())
    assert all(module.quantizes_weights for module in qmodel.modules() if hasattr(module, "quantizes_weights"))
    assert all(module.observer is None for module in qmodel.modules() if hasattr(module, "observer"))
    assert torch.is_grad_enabled()
    calibrate(qmodel, [images()])
    assert same_state(qmodel, calibrate(uncalibrated(), [images()]))


def test_an_interrupted_recalibration_leaves_the_trained_numbers():
    def batches():
        yield 9 * images()
        raise Interrupted

    qmodel = train(ready(network(), recipe("LSQ"), images()), [images()])
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    with pytest.raises(Interrupted):
        calibrate(qmodel, batches(), force=True)
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())
    qmodel(images())


def test_modes_are_put_back_after_a_calibration():
    qmodel = uncalibrated()
    before = modes(qmodel)
    seen = []
    qmodel.head.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    calibrate(qmodel, [images()])
    assert seen == [(False, False)]
    assert modes(qmodel) == before


def test_a_layers_mode_of_its_own_is_put_back():
    qmodel = wrap(nn.Sequential(nn.Linear(3, 3)), recipe()).train()
    qmodel[0].layer.eval()
    calibrate(qmodel, [vectors(5, 3)])
    assert not qmodel[0].layer.training


@pytest.mark.parametrize("batches", [[], (image for image in ()), DataLoader([])])
def test_empty_batches_are_told(batches):
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(wrap(network(), recipe()), batches)


def test_a_generator_that_was_read_is_empty():
    generator = (batch for batch in [images()])
    calibrate(wrap(network(), recipe()), generator)
    with pytest.raises(CalibrationError, match="only once"):
        calibrate(wrap(network(), recipe()), generator)


@pytest.mark.parametrize("batches", [images(), {"input": images()}, "batches", b"x", 3, images])
def test_what_is_no_iterable_of_batches_is_told(batches):
    with pytest.raises(CalibrationError, match="batches"):
        calibrate(wrap(network(), recipe()), batches)


def test_activations_need_batches():
    with pytest.raises(CalibrationError, match="3 activation quantizers need batches"):
        calibrate(wrap(network(), recipe()))


def test_an_empty_batch_is_told():
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(wrap(network(), recipe()), [()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_told_with_the_layer(value):
    bad = images()
    bad[3, 0, 2, 2] = value
    qmodel = uncalibrated()
    before = modes(qmodel)
    with pytest.raises(CalibrationError, match=r"stem\.conv.*(NaN|infinite)"):
        calibrate(qmodel, [images(), bad])
    assert modes(qmodel) == before
    assert not any(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


def test_weights_that_are_not_finite_are_told_with_the_layer():
    model = network()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    qmodel = wrap(model, recipe())
    with pytest.raises(CalibrationError, match=r"head\.weight.*NaN"):
        calibrate(qmodel, [images()])
    assert not any(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


def test_a_layer_that_no_batch_reaches_is_told():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(x)

    qmodel = wrap(Unused(), recipe())
    with pytest.raises(CalibrationError, match=r"spare.*no batch reached its layer(.|\n)*skip"):
        calibrate(qmodel, [vectors(4, 6)])
    assert not any(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())
    ready(Unused(), recipe(rules=[{"match": {"name": "spare"}, "skip": True}]), vectors(4, 6))


def test_what_the_model_raises_comes_through():
    with pytest.raises(RuntimeError, match="size"):
        calibrate(wrap(network(), recipe()), [torch.zeros(1, 5, 6, 6)])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_what_was_not_wrapped_is_refused(model):
    with pytest.raises(ModelError, match="wrap"):
        calibrate(model, [])


# ---- what is not seen -----------------------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """Has another name for its input."""

    def forward(self, hidden):
        return super().forward(hidden)


class Branches(nn.Module):
    """Layers that are reached in all the ways in which a batch can miss a quantizer."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.read, self.never, self.empty, self.turned = (nn.Linear(6, 6) for _ in range(6))
        self.renamed, self.norm, self.drop = Renamed(6, 6), nn.BatchNorm1d(6), nn.Dropout()
        self.bilinear = nn.Bilinear(6, 6, 6)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        y = self.body(x)
        if self.training:
            y = y + self.aux(self.drop(self.norm(y)))
        self.empty(y[:0])
        return nn.functional.linear(y, self.read.weight) + y @ self.turned.weight.T + self.renamed(hidden=y)


def reasons(batches, **options):
    """Return why what was not seen; nothing is changed."""
    torch.manual_seed(0)
    qmodel = wrap(Branches(), recipe(fold_batch_norm=False)).train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    random = torch.random.get_rng_state()
    with pytest.raises(UnseenTensorsError) as caught:
        calibrate(qmodel, batches, **options)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert qmodel.training
    assert all(torch.equal(value, before[name]) or value.isnan().all() for name, value in qmodel.state_dict().items())
    assert not any(module._forward_pre_hooks for module in qmodel.modules())  # noqa: SLF001 - ours are gone
    return caught.value.reasons


UNSEEN = {
    "never: input": "no batch reached its layer in evaluation mode or in training mode",
    "empty: input": "it got an empty tensor, which holds no values to quantize",
    "renamed: input": "its layer was called with hidden=, which does not pass 'input'",
    "bilinear: input1": "no batch reached its layer in evaluation mode or in training mode",
    "bilinear: input2": "no batch reached its layer in evaluation mode or in training mode",
}


def test_every_layer_that_saw_nothing_is_named_at_once_with_the_true_reason():
    assert reasons([vectors(4, 6)]) == {**UNSEEN, "aux: input": "its layer runs only in training mode"}


def test_what_runs_only_in_training_is_seen_when_asked_for():
    assert reasons([vectors(4, 6)], training=True) == UNSEEN


class Read(nn.Module):
    """Computes with the weights of layers that it never calls."""

    def __init__(self):
        super().__init__()
        self.body, self.read, self.turned = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.read.weight) + x @ self.turned.weight.T


def test_the_inputs_of_layers_that_are_only_read_are_left_in_float(tmp_path):
    x = vectors(4, 6)
    qmodel = calibrate(wrap(Read(), recipe()), [x])
    told = describe(qmodel).left_out
    assert told == {
        "read: input": "its layer is never called: linear read its weights directly; the weights are quantized",
        "turned: input": "its layer is never called: T read its weights directly; the weights are quantized",
    }
    qmodel.train()(x).sum().backward()
    learning = {name: parameter.grad for name, parameter in qmodel.named_parameters() if parameter.requires_grad}
    assert [name for name, grad in learning.items() if grad is None] == ["read.bias", "turned.bias"]  # never read
    freeze_quant_params(freeze_quant_params(qmodel), frozen=False)
    assert {name for name, parameter in qmodel.named_parameters() if parameter.requires_grad} == set(learning)
    deployed = finalize(qmodel.eval())
    body = deployed.body
    with torch.no_grad():
        y = body.input_holders["input"](x)
        y = nn.functional.linear(y, body.get_quantized_weights()["weight"], body.bias)
        y = nn.functional.linear(y, deployed.read.get_quantized_weights()["weight"])
        wanted = y + x @ deployed.turned.get_quantized_weights()["weight"].T
    assert torch.equal(qmodel(x), wanted)
    assert torch.equal(deployed(x), wanted)
    for index, model in enumerate((qmodel, deployed)):
        save(model, tmp_path / f"{index}.safetensors")
        loaded = load(tmp_path / f"{index}.safetensors", Read())
        assert torch.equal(loaded(x), wanted)
        assert describe(loaded).left_out == told


def test_integers_are_told():
    layer = nn.Sequential(nn.Identity(), nn.ReLU())
    qmodel = wrap(layer, {"activations": spec(placement="outputs")})
    with pytest.raises(UnseenTensorsError, match="1: output: it got an int64 tensor"):
        calibrate(qmodel, [torch.arange(3)])


def test_an_output_that_is_no_tensor_is_told():
    class Named(nn.Linear):
        def forward(self, x):
            return {"out": super().forward(x)}

    qmodel = wrap(Named(3, 3), {"activations": spec(placement="outputs")})
    with pytest.raises(UnseenTensorsError, match="it got an object of type dict"):
        calibrate(qmodel, [vectors(2, 3)])


def test_a_layer_that_only_a_later_batch_reaches_in_another_way_is_told_so():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), Renamed(3, 3)

        def forward(self, x):
            return self.second(hidden=self.first(x)) if len(x) > 1 else self.first(x)

    with pytest.raises(UnseenTensorsError, match="second: input: its layer was called with hidden="):
        calibrate(wrap(Late(), recipe()), [vectors(1, 3), vectors(2, 3)])


class Aux(nn.Module):
    """Has a head that runs only in training, behind layers that do something else there."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout()
        self.head, self.aux = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.drop(self.norm(self.body(x)))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def minmax():
    return recipe(fold_batch_norm=False, calibration={"weights": "minmax", "activations": "minmax"})


def test_a_head_that_runs_only_in_training_is_calibrated_by_what_it_sees_without_dropout_and_batch_statistics():
    torch.manual_seed(0)
    x, qmodel = vectors(16, 6), wrap(Aux(), minmax())
    before = {name: value.clone() for name, value in qmodel.state_dict().items() if name.startswith("norm")}
    random = torch.random.get_rng_state()
    calibrate(qmodel, (part for part in x.split(5)), training=True)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())
    head, aux = (quantizer_at(qmodel, f"{name}.{INPUT}").threshold for name in ("head", "aux"))
    assert head == aux  # the same tensor, without dropout
    usual = wrap(Aux(), {**minmax(), "rules": [{"match": {"name": "aux"}, "skip": True}]})
    torch.manual_seed(0)
    usual.load_state_dict(
        {name: value for name, value in qmodel.state_dict().items() if "quantizer" not in name}, strict=False
    )
    assert quantizer_at(calibrate(usual, [x]), f"head.{INPUT}").threshold == head
    qmodel.train()(x)
    finalize(qmodel)


@pytest.mark.parametrize(
    "rule",
    [{"skip": True}, {"activations": {"enabled": False}}],
    ids=["skip", "enabled"],
)
def test_the_rules_of_the_message_are_ways_out(rule):
    how = {**minmax(), "rules": [{"match": {"name": "aux"}, **rule}]}
    qmodel = calibrate(wrap(Aux(), how), [vectors(16, 6)])
    assert ("aux" in {row.layer for row in describe(qmodel).rows}) is ("activations" in rule)


def test_the_call_of_the_message_is_a_way_out_and_leaves_the_statistics_alone():
    qmodel = wrap(Aux(), minmax()).eval()
    before = {name: value.clone() for name, value in qmodel.state_dict().items() if name.startswith("norm")}
    calibrate(qmodel, [vectors(16, 6)], forward=lambda qmodel, batch: qmodel.train()(batch))
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())
    assert not qmodel.training


# ---- weights that were changed from outside -------------------------------------------------------------------------


def test_merged_adapters_that_run_no_more_keep_their_thresholds():
    """As peft merges: the base's weight changes, and the adapter is not called any more."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up, self.merged = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6), False

        def forward(self, x):
            return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    x = vectors(16, 6)
    qmodel = ready(Adapted(), minmax(), x)
    kept = quantizer_at(qmodel, f"down.{INPUT}").threshold.clone()
    with torch.no_grad():
        qmodel.base.weight += qmodel.up.weight @ qmodel.down.weight
        qmodel.merged = True
    with pytest.warns(ThresholdsKeptWarning, match="down: input: no batch reached"):
        calibrate(qmodel, [3 * x], force=True)
    assert torch.equal(quantizer_at(qmodel, f"down.{INPUT}").threshold, kept)
    assert torch.equal(quantizer_at(qmodel, f"base.{WEIGHT}").threshold, qmodel.base.weight.abs().amax(1))


def resized(training_method="LSQ"):
    """Return a calibrated model whose embedding got more rows, as `resize_token_embeddings` does it."""
    torch.manual_seed(0)
    qmodel = ready(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), weights_only(training_method))
    qmodel[0].weight.data = vectors(8, 4)
    getattr(qmodel[0], "layer", qmodel[0]).num_embeddings = 8
    return qmodel


def test_a_weight_of_another_shape_is_told_with_the_way_out():
    qmodel = resized()
    for call in (lambda: qmodel(torch.tensor([6])), lambda: calibrate(qmodel)):
        with pytest.raises(ShapeMismatchError, match=r"0\.weight(.|\n)*\(8, 4\)(.|\n)*calibrate\(qmodel, force=True\)"):
            call()


@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_by_force_a_weight_of_another_shape_gets_thresholds_of_that_shape(training_method):
    qmodel = calibrate(resized(training_method), force=True)
    expected = ready(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), weights_only(training_method))
    expected.load_state_dict(
        {name: v for name, v in qmodel.state_dict().items() if "quantizer" not in name}, strict=False
    )
    assert same_state(qmodel, calibrate(expected, force=True))
    x = torch.arange(8)
    qmodel.train()(x).sum().backward()
    groups = [name for name, _ in quantizer_at(qmodel, f"0.{WEIGHT}").named_parameters()]
    assert all(quantizer_at(qmodel, f"0.{WEIGHT}").get_parameter(name).grad is not None for name in groups)
    assert torch.equal(finalize(qmodel.eval())(x), qmodel(x))


def test_a_calibration_that_fails_leaves_a_weight_of_another_shape_with_its_old_variables():
    qmodel = resized()
    before, held = dict(qmodel.state_dict()), dict(qmodel.named_parameters())
    with torch.no_grad():
        qmodel[1].weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(qmodel, force=True)
    assert {name: tuple(value.shape) for name, value in qmodel.state_dict().items()} == {
        name: tuple(value.shape) for name, value in before.items()
    }
    assert all(parameter is held[name] for name, parameter in qmodel.named_parameters())
    quantizer = quantizer_at(qmodel, f"0.{WEIGHT}")
    assert quantizer.calibrated
    assert quantizer(vectors(5, 4)).shape == (5, 4)


def test_frozen_thresholds_stay_frozen_in_another_shape():
    qmodel = resized()
    freeze_quant_params(qmodel)
    calibrate(qmodel, force=True)
    assert not any(p.requires_grad for name, p in qmodel.named_parameters() if "quantizer" in name)


def test_tied_weights_that_came_apart_in_shape_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight

    qmodel = ready(Tied(), weights_only())
    qmodel.embed.weight = nn.Parameter(vectors(8, 3))
    with pytest.raises(ShapeMismatchError, match="channels"):
        calibrate(qmodel, force=True)
