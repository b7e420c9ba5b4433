"""A wrapped model through random lives, against a simple account of what must hold."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from tests.torch.models import GRIDS, TRAINED_BY, images, spec
from tests.torch.strategies import assert_same_bits
from trainable_core.errors import QuantizerStateError
from trainable_torch import (
    calibrate,
    describe,
    finalize,
    freeze_quant_params,
    load,
    parameter_groups,
    regularization,
    save,
    wrap,
)
from trainable_torch.training import quantizers_of

SCHEDULE_END = 5
SHORT = {"t_start": 0, "t_end": SCHEDULE_END - 1, "initial_val": 1.0, "target_val": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
counts = st.sampled_from([1, 3, 8])  # images in a batch


class Small(nn.Module):
    """Two kinds of layers and a functional activation, for images of shape (1, 6, 6)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 2, 3, stride=3), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def bits(model):
    """Return a model's state as bytes, in which NaN equals itself."""
    return {name: value.reshape(-1).view(torch.uint8).tolist() for name, value in model.state_dict().items()}


class Life(RuleBasedStateMachine):
    """Drives one model, and keeps account of it in a few plain facts."""

    @initialize(
        training_method=st.sampled_from(TRAINED_BY),
        grid=st.sampled_from(GRIDS),
        placement=st.sampled_from(["inputs", "outputs"]),
        per_channel=st.booleans(),
    )
    def wrap(self, training_method, grid, placement, per_channel):
        more = {"arguments": {"temperature": SHORT}, "candidates": [3, 6]} if training_method == "DQA" else {}
        one = spec(training_method, grid, **more)
        self.method = training_method
        self.recipe = {
            "weights": {**one, "per_channel": per_channel},
            "activations": {**one, "placement": placement},
            "calibration": {"weights": "minmax", "activations": "minmax"},
        }
        self.model = wrap(Small(), self.recipe)
        self.calibrated = self.frozen = False
        self.training, self.dtype, self.steps = True, torch.float32, 0
        self.deployed, self.gives = None, None
        self.kept = None

    # ---- the account ------------------------------------------------------------------------------------------------

    def x(self, count=8):
        return images(count).to(self.dtype)

    def fresh(self):
        """Return another float model that a file or a state of this one fits."""
        model = Small().to(self.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    def numbers(self):
        """Return every quantizer's variables, as bytes; not the step of a schedule, which goes on when they don't."""
        numbers = {}
        for name, quantizer in quantizers_of(self.model).items():
            for key in quantizer.variable_names:
                value = quantizer.get_quantizer_variable(key).detach().reshape(-1).view(torch.uint8)
                numbers[name, key] = value.tolist()
        return numbers

    def replaced_by(self, other, *, keep):
        """Check that another model is this one in all that can be seen; go on with either."""
        assert bits(other) == bits(self.model)
        assert describe(other) == describe(self.model)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in self.model.parameters()]
        assert not {id(v) for v in other.parameters()} & {id(v) for v in self.model.parameters()}
        if self.calibrated:
            one, two = (copy.deepcopy(model).eval() for model in (self.model, other))
            assert_same_bits(two(self.x()), one(self.x()))
            one, two = (self.trained(copy.deepcopy(model).train(), 3, lr=0.05) for model in (self.model, other))
            assert bits(one) == bits(two)
        if not keep:
            self.model = other

    def trained(self, model, count, *, lr, qparams=1.0):
        optimizer = torch.optim.SGD(parameter_groups(model, qparams={"lr": lr * qparams}), lr=lr)
        (model(self.x(count)).float().square().mean() + regularization(model)).backward()
        optimizer.step()
        model.zero_grad()
        return model

    # ---- what may happen --------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.calibrated)
    @rule()
    def is_refused_before_calibration(self):
        before = bits(self.model)
        for call in (lambda: self.model(self.x()), lambda: finalize(self.model)):
            with pytest.raises(QuantizerStateError):
                call()
        assert bits(self.model) == before

    @rule(count=counts, force=st.booleans())
    def calibrate(self, count, force):
        if self.calibrated and not force:
            before = bits(self.model)
            with pytest.raises(QuantizerStateError, match="force"):
                calibrate(self.model, [self.x(count)])
            assert bits(self.model) == before
            return
        weights = {name: value.detach().clone() for name, value in self.model.named_parameters() if "quant" not in name}
        calibrate(self.model, [self.x(count), 2 * self.x(count)], force=force)
        for name, value in weights.items():
            assert_same_bits(self.model.get_parameter(name), value)
        self.calibrated = True
        self.kept = self.numbers() if self.frozen else None

    @rule(count=counts)
    def break_off_a_calibration(self, count):
        def batches():
            yield self.x(count) * 100
            raise KeyboardInterrupt

        before = bits(self.model)
        with pytest.raises(KeyboardInterrupt):
            calibrate(self.model, batches(), force=True)
        assert bits(self.model) == before

    @precondition(lambda self: self.calibrated)
    @rule(count=counts, lr=st.sampled_from([0.01, 0.3]), qparams=st.sampled_from([0.0, 1.0, 1e30]))
    def train_a_step(self, count, lr, qparams):
        """Also with a rate that throws thresholds out of all bounds."""
        before = bits(self.model)
        self.trained(self.model, count, lr=lr, qparams=qparams)
        if self.training:
            self.steps += 1
        assert bits(self.model) != before

    @precondition(lambda self: self.calibrated)
    @rule(count=counts)
    def step_with_decay(self, count):
        """An optimizer that is given every parameter, frozen or not."""
        # the default eps is no float16 number: a zero gradient would give NaN
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
        self.model(self.x(count)).float().square().mean().backward()
        optimizer.step()
        self.model.zero_grad()
        self.steps += self.training

    @rule(frozen=st.booleans())
    def freeze(self, frozen):
        freeze_quant_params(self.model, frozen)
        self.frozen = frozen
        self.kept = self.numbers() if frozen else None

    @rule(training=st.booleans())
    def set_the_mode(self, training):
        self.model.train(training)
        self.training = training

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype):
        before = self.numbers()
        self.model.to(dtype)
        self.dtype = dtype
        assert self.numbers() == before
        if self.deployed is not None:
            self.deployed.to(dtype)
            self.gives = self.deployed(self.x())

    @rule(keep=st.booleans(), pickled=st.booleans())
    def copy(self, keep, pickled):
        other = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)  # noqa: S301 - our own
        self.replaced_by(other, keep=keep)

    @rule(keep=st.booleans(), assign=st.booleans())
    def load_the_state(self, keep, assign):
        other = wrap(self.fresh(), self.recipe).train(self.training)
        other.load_state_dict(copy.deepcopy(self.model.state_dict()), strict=True, assign=assign)
        self.replaced_by(freeze_quant_params(other, self.frozen), keep=keep)

    @rule(keep=st.booleans())
    def save_and_load(self, keep):
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, Path(folder) / "model")
            other = load(Path(folder) / "model", self.fresh())
        assert [module.training for module in other.modules()] == [module.training for module in self.model.modules()]
        self.replaced_by(other, keep=keep)

    @precondition(lambda self: self.calibrated)
    @rule(stored=st.booleans())
    def finalize(self, stored):
        before = bits(self.model)
        deployed = finalize(self.model)
        assert bits(self.model) == before
        assert not any(quantizers_of(deployed))
        if stored:
            with tempfile.TemporaryDirectory() as folder:
                save(deployed, Path(folder) / "model")
                deployed = load(Path(folder) / "model", self.fresh())
        gives = deployed(self.x())
        evaluated = copy.deepcopy(self.model).eval()
        assert_same_bits(evaluated(self.x()), gives)
        if self.method != "DQA" or self.steps >= SCHEDULE_END:
            assert_same_bits(copy.deepcopy(self.model).train()(self.x()), gives)
        assert_same_bits(finalize(deployed)(self.x()), gives)
        self.deployed, self.gives = deployed, gives

    # ---- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def the_account_is_right(self):
        quantizers = quantizers_of(self.model).values()
        assert {quantizer.calibrated for quantizer in quantizers} == {self.calibrated}
        assert {quantizer.freeze_quant_params for quantizer in quantizers} == {self.frozen}
        assert {module.training for module in self.model.modules()} == {self.training}
        assert {int(q.step) for q in quantizers if self.method == "DQA"} <= {self.steps}
        dtypes = {p.dtype for name, p in self.model.named_parameters() if "quantizer" not in name}
        assert dtypes == {self.dtype}

    @invariant()
    def frozen_numbers_stay(self):
        if self.kept is not None:
            assert self.numbers() == self.kept

    @invariant()
    def used_numbers_are_finite_and_positive(self):
        if self.calibrated:
            for quantizer in quantizers_of(self.model).values():
                for width in quantizer.widths:
                    scale = torch.as_tensor(quantizer.current_qparams(width).scale)
                    assert scale.isfinite().all()
                    assert (scale > 0).all()

    @invariant()
    def what_was_deployed_stays_as_it_was(self):
        if self.deployed is not None:
            assert_same_bits(self.deployed(self.x()), self.gives)


# A life costs about a hundred times what one example of another property costs.
LIVES = settings.default.max_examples // 5 if settings.default else 10
TestLife = Life.TestCase
TestLife.settings = settings(max_examples=LIVES, stateful_step_count=25)
