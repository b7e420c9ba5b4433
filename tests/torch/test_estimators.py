"""Methods of other papers raise no false alarm; a stranger's mistakes are named by the law that is about them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import trainable_torch
from tests.torch.estimators import SOUND, Blend, DoReFa, Logarithm, LsqPlus
from trainable_core import TrainableQuantizerWeightsConfig, hookimpl
from trainable_core.conformance import LAWS, check_quantizer
from trainable_core.errors import InvalidArgumentError, ShapeMismatchError
from trainable_core.reference.method import OwnVariable
from trainable_core.registry import process as registry
from trainable_torch import ops

SLOW = {"no_framework_leak", "model_round_trip", "graph_execution"}
FEW = 4
MANY = 25
"""Cases in which a mistake must be seen."""


@pytest.mark.parametrize("cls", SOUND, ids=lambda cls: cls.__name__)
def test_a_sound_method_keeps_every_law(cls):
    laws = [name for name in LAWS if name not in SLOW]
    verdicts = list(check_quantizer(cls, "torch", laws=laws, examples=FEW, seed=1, shrink=False))
    assert [str(verdict.counterexample) for verdict in verdicts if not verdict.holds] == []


# ---- mistakes -------------------------------------------------------------------------------------------------------


class Bare(Blend):
    """The same without a surrogate: nothing says what its gradients are."""

    surrogate = None


class Detached(Bare):
    def share_for(self, x):
        return super().share_for(x).detach()


class Negated(Bare):
    def share_for(self, x):
        share = super().share_for(x)
        return ops.straight_through(share.detach(), -share)


class Half(Blend):
    def share_for(self, x):
        share = super().share_for(x)
        return ops.straight_through(share.detach(), share / 2)


class SumOfChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share):
        return share.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.sum().expand_as(upstream)


class AllChannels(Bare):
    def share_for(self, x):
        return SumOfChannels.apply(super().share_for(x))


class OneForAll(Bare):
    """Declares one value per channel, and makes one for the tensor."""

    own_variables = (OwnVariable("share", per_channel=True),)

    def add_variables(self):
        self.add_quantizer_variable("share", torch.tensor(0.5), trained=True)


class NotRegistered(Bare):
    """Keeps its variable as a plain attribute, which no optimizer and no checkpoint sees."""

    own_variables = (OwnVariable("share", per_channel=True),)

    def add_variables(self):
        self.plain = torch.full(self.structure.shape, 0.5, requires_grad=True)

    def share_for(self, x):
        return self.plain if self.plain.dim() == 0 else self.plain.view(self._scale_shape(x.dim()))


class InPlace(Blend):
    def fake_quantize(self, x, grid, training):
        if not x.requires_grad:
            x.clamp_(-1, 1)
        return super().fake_quantize(x, grid, training)


class StateInPython(Blend):
    """An average of what it saw stands in a Python attribute."""

    seen = 0.0

    def fake_quantize(self, x, grid, training):
        if training and x.numel():
            self.seen = 0.9 * self.seen + 0.1
        values = super().fake_quantize(x, grid, training)
        return values * (1 + self.seen) if training else values


class CountsInForward(Blend):
    """The schedule counts calls, not training steps."""

    calls = 0

    def fake_quantize(self, x, grid, training):
        self.calls += 1
        return super().fake_quantize(x, grid, training and self.calls < 2)


class GlobalNoise(Blend):
    """Draws NumPy's global random numbers, undeclared."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return values + float(np.random.rand()) * 0.1 if training else values  # noqa: NPY002 - the mistake


class DecodesAnotherBase(Logarithm):
    def decode_grid(self, variables):
        return {"threshold": ops.exp2(variables["log_threshold"])}


class DecodesDetached(Logarithm):
    def decode_grid(self, variables):
        return {"threshold": variables["log_threshold"].detach().exp() + 0 * variables["log_threshold"]}


class DecodesNegated(Logarithm):
    def decode_grid(self, variables):
        log = variables["log_threshold"]
        return {"threshold": ops.straight_through(log.detach().exp(), -log.exp())}


class DecodesWithoutFactor(LsqPlus):
    """The end of the range does not depend on the offset."""

    def decode_grid(self, variables):
        step, offset = variables["step_size"], variables["offset"]
        return {"range_min": offset, "range_max": offset.detach() + step * self.steps_between_the_ends()}


MISTAKES = [
    (Detached, "gradients_arrive", "share"),
    (Negated, "gradient_direction", "share"),
    (Half, "variable_gradients", "share"),
    (AllChannels, "per_channel_gradients", "share"),
    (OneForAll, "declared_variables", "declared per channel"),
    (NotRegistered, "declared_variables", "share, which the class declares"),
    (InPlace, "no_mutation", "input"),
    (StateInPython, "schedule_resume", "training values after resuming"),
    (CountsInForward, "schedule_resume", "resuming"),
    (GlobalNoise, "schedule_resume", "resuming"),
    (DecodesAnotherBase, "declared_variables", "threshold after calibration"),
    (DecodesDetached, "gradients_arrive", "log_threshold"),
    (DecodesNegated, "gradient_direction", "log_threshold"),
    (DecodesWithoutFactor, "variable_gradients", "offset"),
]


@pytest.mark.parametrize(("cls", "law", "words"), MISTAKES, ids=lambda each: getattr(each, "__name__", None))
def test_a_mistake_is_named_in_the_authors_words(cls, law, words):
    verdicts = list(check_quantizer(cls, "torch", laws=[law], examples=MANY, seed=0, shrink=False))
    found = [verdict.counterexample for verdict in verdicts if not verdict.holds]
    assert found, f"{law} holds"
    assert words in f"{found[0].what} {found[0].got}"


# ---- what the base class makes of a declaration ---------------------------------------------------------------------


def config(**params):
    fields = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 4, "weights_quantization_params": params}
    return TrainableQuantizerWeightsConfig(**fields, weights_per_channel_threshold=True, weights_channels_axis=0)


def initialized(cls, **params):
    quantizer = cls(config(**params))
    quantizer.initialize_quantization((2, 3), "weight", None)
    return quantizer


def test_declared_variables_are_made_and_saved():
    quantizer = initialized(Blend, threshold=[1.0, 2.0])
    assert quantizer.variable_names == ("threshold", "share")
    assert quantizer.share.tolist() == [0.5, 0.5]
    assert quantizer.read_variable("share", 3).shape == (2, 1, 1)
    assert quantizer.read_variable("share").shape == (2,)
    again = Blend.from_config(quantizer.get_config())
    assert again.share.tolist() == [0.5, 0.5]


def test_grid_parameters_stand_for_the_threshold():
    quantizer = initialized(Logarithm, threshold=[1.0, 2.0])
    assert quantizer.variable_names == ("log_threshold",)
    np.testing.assert_array_equal(quantizer.log_threshold.detach().numpy(), np.log([1, 2]).astype(np.float32))
    np.testing.assert_allclose(quantizer.current_qparams().scale, [1 / 8, 2 / 8], rtol=2.0**-22)
    for hostile in (np.nan, np.inf, -np.inf):
        quantizer.assign(quantizer.log_threshold, np.full(2, hostile, np.float32))
        x = torch.ones(2, 3, requires_grad=True)
        quantizer(x, training=True).sum().backward()
        assert torch.isfinite(quantizer.log_threshold.grad).all()
        assert np.isfinite(quantizer.current_qparams().scale).all()


class Unfit(Logarithm):
    made = None

    def encode_grid(self, numbers):
        return self.made


@pytest.mark.parametrize(
    ("made", "error", "fact"),
    [
        ({"threshold": np.ones(2)}, InvalidArgumentError, "needed ['log_threshold']"),
        ({"log_threshold": np.ones(3)}, ShapeMismatchError, "(2,)"),
        ({"log_threshold": np.array([1.0, np.nan])}, InvalidArgumentError, "not finite"),
    ],
)
def test_what_encode_grid_returns_is_checked_before_anything_changes(made, error, fact):
    quantizer = initialized(Unfit)
    Unfit.made = made
    with pytest.raises(error) as caught:
        quantizer.set_quantization_params({4: {"threshold": [1.0, 2.0]}})
    assert fact in str(caught.value)
    assert not quantizer.calibrated
    assert torch.isnan(quantizer.log_threshold).all()


@pytest.mark.parametrize("exponent", [-126, -3, 0, 1, 7, 127])
def test_exp2_is_exact_for_whole_numbers(exponent):
    assert ops.exp2(torch.tensor(float(exponent))).item() == 2.0**exponent


def test_exp2_keeps_within_a_power_and_takes_anything():
    u = torch.nextafter(torch.arange(-20.0, 21.0), torch.tensor(-torch.inf))
    assert (ops.exp2(u) <= 2.0 ** (u.double().ceil())).all()
    ends = ops.exp2(torch.tensor([torch.nan, torch.inf, -torch.inf, 128.0, -127.0]))
    assert ends[0].isnan()
    assert ends[1:].tolist() == [torch.inf, 0.0, torch.inf, 0.0]
    x = torch.linspace(-3, 3, 7, dtype=torch.float32, requires_grad=True)
    ops.exp2(x).sum().backward()
    np.testing.assert_allclose(x.grad, np.log(2) * 2.0 ** x.detach().double().numpy(), rtol=2.0**-21)


@pytest.fixture
def dorefa():
    class Plugin:
        @staticmethod
        @hookimpl
        def trainable_register_quantizers(backend: str):
            return [DoReFa] if backend == "torch" else []

    registry.register(Plugin, "dorefa")
    yield
    registry.unregister("dorefa")


def test_values_that_the_grid_alone_does_not_make_are_stored_when_a_model_is_finalized(dorefa, tmp_path):
    torch.manual_seed(0)
    tied = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(nn.Linear(6, 4), tied, tied)
    qmodel = trainable_torch.wrap(
        model, {"weights": {"method": "SYMMETRIC", "n_bits": 3, "training_method": "SQUASHED"}}
    )
    x = torch.randn(5, 6)
    trainable_torch.calibrate(qmodel, [x])
    before = copy.deepcopy(qmodel.state_dict())
    expected = qmodel.eval()(x)
    deployed = trainable_torch.finalize(qmodel)
    assert torch.equal(deployed(x), expected)
    assert torch.equal(trainable_torch.finalize(deployed)(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    trainable_torch.save(deployed, tmp_path / "model")
    assert torch.equal(trainable_torch.load(tmp_path / "model", model)(x), expected)
