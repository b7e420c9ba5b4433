"""What goes wrong around a training: a process that dies, gradients that explode, frozen numbers, interruptions."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.torch.models import GRIDS, TRAINED_BY, images, network, ready, recipe, same_state, train
from trainable_core.errors import CalibrationError
from trainable_torch import calibrate, describe, finalize, freeze_quant_params, parameter_groups, wrap
from trainable_torch.quantizers import BasePytorchTrainableQuantizer
from trainable_torch.training import quantizers_of

ROOT = Path(__file__).parents[2]
MINMAX = {"weights": "minmax", "activations": "minmax"}
every_method = pytest.mark.parametrize("training_method", TRAINED_BY)
every_grid = pytest.mark.parametrize("grid", GRIDS)


def made(training_method="LSQ", grid="SYMMETRIC"):
    return ready(network(), recipe(training_method, grid, calibration=MINMAX), images())


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return what was found after each of many kills; one process forks those that die."""
    if not hasattr(os, "fork"):
        pytest.skip("this system can't fork, and a process of its own for each kill would take minutes")
    command = [sys.executable, str(ROOT / "tests/torch/killed.py"), str(tmp_path_factory.mktemp("killed"))]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "point", ["before the file", "half of it written", "before fsync", "after fsync", "before the rename"]
)
def test_a_save_killed_before_the_rename_leaves_the_old_file(point, killed):
    assert killed["at"][point] == {"signal": 9, "state": "old", "same bytes": True}


@pytest.mark.parametrize("point", ["after the rename", "before the folder's fsync"])
def test_a_save_killed_after_the_rename_leaves_the_new_file(point, killed):
    assert killed["at"][point] == {"signal": 9, "state": "new", "same bytes": False}


def test_a_save_killed_at_any_time_leaves_one_of_the_two(killed):
    """A process saves two models in turn until it is killed, some milliseconds later each time."""
    assert len(killed["anytime"]) == 20
    assert {each["signal"] for each in killed["anytime"]} == {9}
    assert {each["state"] for each in killed["anytime"]} <= {"old", "new"}


def test_what_a_killed_save_left_behind_does_not_disturb_the_next(killed):
    assert killed["afterwards"] == "new"


# ---- gradients that explode -----------------------------------------------------------------------------------------


def used_numbers(qmodel):
    """Return every scale that a forward uses, of every width."""
    return torch.cat(
        [
            torch.as_tensor(quantizer.current_qparams(width).scale).reshape(-1)
            for quantizer in quantizers_of(qmodel).values()
            for width in quantizer.widths
        ]
    )


def assert_usable(qmodel):
    scales = used_numbers(qmodel)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    for row in describe(qmodel).rows:
        for numbers in row.params.values():
            assert torch.as_tensor(numbers, dtype=torch.float64).isfinite().all()
    assert torch.equal(finalize(qmodel)(images()).isnan(), copy.deepcopy(qmodel).eval()(images()).isnan())
    bounded = [m.activation_holder_quantizer(images()) for m in finalize(qmodel).modules() if hasattr(m, "observer")]
    assert all(values.isfinite().all() for values in bounded)


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e30),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e8, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e6),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=10.0, weight_decay=1.0),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e20),
}


@every_method
@every_grid
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_huge_steps_leave_every_used_number_finite_and_positive(training_method, grid, optimizer):
    qmodel = made(training_method, grid).train()
    weight_decay = {"weight_decay": 1.0} if optimizer == "adamw" else {}
    step = OPTIMIZERS[optimizer](parameter_groups(qmodel, qparams=weight_decay))
    for _ in range(4):
        step.zero_grad()
        qmodel(images()).square().mean().backward()
        step.step()
        assert_usable(qmodel)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
@every_method
@every_grid
def test_gradients_that_are_no_numbers_leave_every_used_number_finite_and_positive(training_method, grid, value):
    """Both those that arrive from behind the model and those that something writes into the variables' own."""
    for where in ("upstream", "own"):
        qmodel = made(training_method, grid).train()
        optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.1)
        outputs = qmodel(images())
        outputs.backward(torch.full_like(outputs, value if where == "upstream" else 1.0))
        if where == "own":
            for quantizer in quantizers_of(qmodel).values():
                for variable in quantizer.parameters():
                    variable.grad = torch.full_like(variable, value)
        optimizer.step()
        assert_usable(qmodel)


@every_grid
def test_a_threshold_gradient_is_a_number_whatever_arrives(grid):
    """NaN and infinity from behind count as nothing: the threshold stays where it was."""
    qmodel = made("LSQ", grid).train()
    outputs = qmodel(images())
    outputs.backward(torch.full_like(outputs, float("nan")))
    for quantizer in quantizers_of(qmodel).values():
        for variable in quantizer.parameters():
            assert variable.grad is None or variable.grad.isfinite().all()


# ---- frozen ---------------------------------------------------------------------------------------------------------


FREEZING = {
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@every_method
@every_grid
@pytest.mark.parametrize("optimizer", FREEZING)
@pytest.mark.parametrize("before", [True, False], ids=["frozen first", "frozen between steps"])
def test_an_optimizer_step_changes_nothing_that_is_frozen(training_method, grid, optimizer, before):
    """An optimizer made before freezing holds momentum for the variables; without a gradient it leaves them alone."""
    qmodel = made(training_method, grid).train()
    if before:
        freeze_quant_params(qmodel)
    step = FREEZING[optimizer](qmodel.parameters())  # all of them, not the groups that leave frozen ones out
    for frozen in (before, True):
        step.zero_grad()
        qmodel(images()).square().mean().backward()
        if frozen:
            freeze_quant_params(qmodel)  # between backward and step as well
            numbers = {n: v.clone() for n, v in qmodel.state_dict().items() if "quantizer" in n and "step" not in n}
        weights = qmodel.stem.conv.weight.detach().clone()
        step.step()
        assert not torch.equal(qmodel.stem.conv.weight, weights)
    state = qmodel.state_dict()
    assert [name for name, value in numbers.items() if not torch.equal(state[name], value)] == []
    freeze_quant_params(qmodel, False)
    qmodel(images()).square().mean().backward()
    step.step()
    learned = [name for name, _ in qmodel.named_parameters() if name in numbers]
    assert (training_method == "STE") == (not learned)


# ---- calibration that breaks off ------------------------------------------------------------------------------------


class Interruption:
    """Batches that end in an error after the second."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield images(4)
        yield images(5)
        raise self.error


def everything(qmodel):
    """Return all that calibration might change."""
    return (
        {name: value.clone() for name, value in qmodel.state_dict().items()},
        [module.training for module in qmodel.modules()],
        [getattr(module, "observer", None) for module in qmodel.modules()],
        [getattr(module, "quantizes_weights", None) for module in qmodel.modules()],
        [(q.calibrated, q.signed) for q in quantizers_of(qmodel).values()],
        torch.random.get_rng_state(),
    )


def assert_untouched(qmodel, before):
    state, *others, rng = everything(qmodel)
    assert all(torch.equal(value.nan_to_num(), before[0][name].nan_to_num()) for name, value in state.items())
    assert others == list(before[1:-1])
    assert torch.equal(rng, before[-1])


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt(), MemoryError(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
@every_method
def test_a_calibration_interrupted_half_way_leaves_the_model_as_it_was(training_method, training, error):
    fresh = wrap(network(), recipe(training_method)).train(training)
    trained = train(made(training_method), [images()]).train(training)
    for qmodel in (fresh, trained):
        before = everything(qmodel)
        with pytest.raises(type(error)):
            calibrate(qmodel, Interruption(error), force=True)
        assert_untouched(qmodel, before)
    calibrate(fresh, [images()])
    assert same_state(train(fresh, [images()]), train(ready(network(), recipe(training_method), images()), [images()]))


def test_an_error_in_the_models_forward_is_no_other():
    qmodel = made()
    before = everything(qmodel)
    with pytest.raises(RuntimeError, match=r"channels|size|shape"):
        calibrate(qmodel, [images(), torch.ones(3, 5, 6, 6)], force=True)
    assert_untouched(qmodel, before)
    with pytest.raises(CalibrationError):
        calibrate(qmodel, [images(), images() * float("nan")], force=True)
    assert_untouched(qmodel, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("last", [0, 1, 4])
def test_thresholds_are_set_all_or_none(last, error, monkeypatch):
    """An interruption while the numbers found are handed to the quantizers."""
    for qmodel in (wrap(network(), recipe("DQA")), train(made("LSQ"), [images()])):
        before, count = everything(qmodel), []
        whole = BasePytorchTrainableQuantizer.set_quantization_params

        def broken(self, params, count=count, whole=whole):
            whole(self, params)
            if len(count) == last:
                raise error
            count.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(BasePytorchTrainableQuantizer, "set_quantization_params", broken)
            with pytest.raises(error):
                calibrate(qmodel, [images()], force=True)
        assert_untouched(qmodel, before)
