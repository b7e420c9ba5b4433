"""Weights are fake-quantized once per change in evaluation, and a change is seen by whatever route it comes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from tests.torch.models import network, quantizer_at, ready, spec, weights_only
from trainable_torch import finalize
from trainable_torch.kernels import cache, tier
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.training import quantizers_of

pytestmark = pytest.mark.skipif(tier.wanted() == tier.PLAIN, reason="weights are quantized at every forward")

LARGE = 96  # a square of more elements than cache.SMALL


class Layer(nn.Module):
    """Two linear layers: one of the size that is compared by content, one that is compared by its version counter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Linear(LARGE, LARGE), nn.Linear(LARGE, 3)

    def forward(self, x):
        return self.small(self.large(x))


def x():
    return torch.randn(4, LARGE, generator=torch.Generator().manual_seed(0))


def made(training_method="LSQ"):
    return ready(Layer(), weights_only(training_method)).eval()


@pytest.fixture
def quantized(monkeypatch):
    """Count how often a quantizer computes."""
    calls = []
    forward = BasePytorchTrainableQuantizer.forward
    monkeypatch.setattr(
        BasePytorchTrainableQuantizer,
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs),
    )
    return calls


def values(qmodel):
    """Return what the model gives, after checking it against a copy, which remembers nothing."""
    with torch.no_grad():
        result = qmodel(x())
        assert torch.equal(result, copy.deepcopy(qmodel)(x()))
    return result


def test_nothing_is_computed_twice_without_a_change(quantized):
    qmodel = made()
    with torch.no_grad():
        first = [qmodel(x()) for _ in range(4)]
    assert len(quantized) == 2
    assert all(torch.equal(one, first[0]) for one in first)
    with torch.inference_mode():  # its tensors are of another kind: once more
        for _ in range(3):
            assert torch.equal(qmodel(x()), first[0])
    assert len(quantized) == 4


def optimizer_step(qmodel, optimizer):
    qmodel.train()
    qmodel(x()).square().sum().backward()
    optimizer(qmodel.parameters(), lr=0.01).step()
    qmodel.eval()


def optimizer_step_in_eval_mode(qmodel):
    qmodel(x()).square().sum().backward()
    torch.optim.SGD(qmodel.parameters(), lr=0.01).step()


@torch.no_grad()
def in_place(qmodel):
    qmodel.large.weight.mul_(1.1)


@torch.no_grad()
def through_a_view(qmodel):
    qmodel.large.weight[3:5].view(-1)[7] += 10.0


def new_data(qmodel):
    qmodel.large.weight.data = qmodel.large.weight.data * 1.1


def new_parameter(qmodel):
    qmodel.large.weight = nn.Parameter(qmodel.large.weight.detach() * 1.1)


def data_in_train_mode(qmodel):
    """No counter sees this, but training forgets."""
    qmodel.train()
    qmodel.large.weight.data.mul_(1.1)
    qmodel.eval()


def data_in_place(qmodel):
    """No counter sees this, but the bits have other sums; averages of weights are often copied so."""
    qmodel.large.weight.data.mul_(1.1)


def through_numpy(qmodel):
    qmodel.large.weight.detach().numpy()[3, 7] += 10.0


def data_of_a_small_one(qmodel):
    """No counter sees this, but the content is compared."""
    qmodel.small.weight.data.mul_(1.1)


def loaded(qmodel, *, assign):
    state = {name: value * 1.1 for name, value in copy.deepcopy(qmodel.state_dict()).items()}
    qmodel.load_state_dict(state, assign=assign)


@torch.no_grad()
def threshold(qmodel):
    quantizer_at(qmodel, "large.weights_quantizers.weight").threshold.mul_(0.5)


def threshold_data(qmodel):
    quantizer_at(qmodel, "large.weights_quantizers.weight").threshold.data.mul_(0.5)


def new_params(qmodel):
    quantizer_at(qmodel, "large.weights_quantizers.weight").set_quantization_params({4: {"threshold": 0.01}})


ROUTES = {
    "sgd": lambda qmodel: optimizer_step(qmodel, torch.optim.SGD),
    "adam": lambda qmodel: optimizer_step(qmodel, torch.optim.Adam),
    "fused adam": lambda qmodel: optimizer_step(qmodel, lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)),
    "load": lambda qmodel: loaded(qmodel, assign=False),
    "assign": lambda qmodel: loaded(qmodel, assign=True),
    **{
        route.__name__: route
        for route in (
            optimizer_step_in_eval_mode,
            in_place,
            through_a_view,
            new_data,
            new_parameter,
            data_in_train_mode,
            data_in_place,
            through_numpy,
            data_of_a_small_one,
            threshold,
            threshold_data,
            new_params,
        )
    },
}


@pytest.mark.parametrize("training_method", ["STE", "LSQ"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_change_is_seen(route, training_method):
    qmodel = made(training_method)
    before = values(qmodel)
    route(qmodel)
    assert not torch.equal(values(qmodel), before)


def test_a_cast_and_its_way_back_are_seen():
    qmodel = made()
    before = values(qmodel)
    qmodel.to(torch.bfloat16)
    with torch.no_grad():
        assert qmodel(x().bfloat16()).dtype == torch.bfloat16
    qmodel.to(torch.float32)
    assert not torch.equal(values(qmodel), before)  # the weights lost digits


def test_an_exchange_that_no_counter_sees_is_seen_after_training_mode():
    """What `cache.Stamp` says it does not see: equal sums of bits within a piece."""
    qmodel = made()
    before = values(qmodel)
    weight = qmodel.large.weight.data.view(-1)
    weight[:2] = weight[:2].flip(0)
    with torch.no_grad():
        assert torch.equal(qmodel(x()), before)
    qmodel.train().eval()
    assert not torch.equal(values(qmodel), before)


def test_who_writes_into_the_quantized_weight_writes_into_nobody_elses():
    qmodel = made()
    before = values(qmodel)
    with torch.no_grad():
        qmodel.large.get_quantized_weights()["weight"].zero_()
    assert torch.equal(values(qmodel), before)


def test_gradients_flow_in_eval_mode_as_ever(quantized):
    qmodel = made()
    values(qmodel)
    quantized.clear()
    qmodel(x()).sum().backward()
    assert len(quantized) == 2
    assert all(parameter.grad is not None for parameter in qmodel.parameters())


def test_frozen_weights_are_not_computed_again_with_gradients_on(quantized):
    qmodel = made().requires_grad_(requires_grad=False)
    inputs = x().requires_grad_()
    for _ in range(3):
        qmodel(inputs).sum().backward()
    assert len(quantized) == 2
    assert inputs.grad.abs().sum() > 0


def test_inference_tensors_are_not_handed_to_autograd():
    qmodel = made().requires_grad_(requires_grad=False)
    with torch.inference_mode():
        qmodel(x())
    inputs = x().requires_grad_()
    qmodel(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_a_deployed_model_computes_its_weights_once():
    qmodel = made()
    deployed = finalize(qmodel)
    calls = []
    for module in (deployed.large, deployed.small):
        quantizer = module.weights_quantizers["weight"]
        forward = quantizer.forward
        quantizer.forward = lambda weight, forward=forward: calls.append(weight) or forward(weight)
    for _ in range(3):
        assert torch.equal(deployed(x()), qmodel(x()))
    assert len(calls) == 2


def held(qmodel):
    """Return the remembered weights of a model."""
    return [cache.remembered(quantizer) for quantizer in quantizers_of(qmodel).values()]


def test_training_keeps_nothing():
    qmodel = made()
    values(qmodel)
    assert None not in held(qmodel)
    qmodel.train()
    assert held(qmodel) == [None, None]
    qmodel.eval()
    values(qmodel)
    for module in qmodel.modules():
        module.training = True  # as calibration sets it, past `train`
    qmodel(x())
    assert held(qmodel) == [None, None]


def test_it_is_in_no_state_no_copy_and_no_pickle_and_goes_with_its_model():
    qmodel = made()
    size = len(pickle.dumps(qmodel))
    keys = set(qmodel.state_dict())
    attributes = {name: set(vars(module)) for name, module in qmodel.named_modules()}
    values(qmodel)
    assert None not in held(qmodel)
    assert set(qmodel.state_dict()) == keys
    assert len(pickle.dumps(qmodel)) == size
    assert {name: set(vars(module)) for name, module in qmodel.named_modules()} == attributes
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):  # noqa: S301 - our own bytes
        assert held(copied) == [None, None]
        assert torch.equal(values(copied), values(qmodel))
    values_held = [weakref.ref(value) for value in held(qmodel)]
    del qmodel, copied
    gc.collect()
    assert [value() for value in values_held] == [None, None]


def test_a_quantizer_with_a_hook_is_called_every_time():
    qmodel = made()
    calls = []
    quantizer_at(qmodel, "large.weights_quantizers.weight").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            qmodel(x())
    assert len(calls) == 3


def test_a_plain_attribute_of_a_quantizer_counts():
    qmodel = made()
    quantizer = quantizer_at(qmodel, "large.weights_quantizers.weight")
    before = values(qmodel)
    quantizer.signed = False
    assert not torch.equal(values(qmodel), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
def test_a_compiled_model_computes_and_sees_every_change():
    qmodel = made()
    torch.compiler.reset()
    fast = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    before = values(qmodel)
    with torch.no_grad():
        assert torch.equal(fast(x()), before)
        qmodel.large.weight.data.mul_(1.1)  # what no counter sees
        changed = fast(x())
    assert not torch.equal(changed, before)
    assert torch.equal(changed, copy.deepcopy(qmodel)(x()))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, where it loops
def test_functional_calls_and_vmap_take_the_weights_they_are_given():
    qmodel = made()
    values(qmodel)
    weights = torch.stack([qmodel.large.weight.detach() * factor for factor in (1.0, 0.5)])

    inputs = x()

    def call(weight):
        return torch.func.functional_call(qmodel, {"large.weight": weight}, (inputs,))

    with torch.no_grad():
        one_by_one = torch.stack([call(weight) for weight in weights])
        together = torch.vmap(call)(weights)
    torch.testing.assert_close(together, one_by_one)  # a batched product rounds as it likes: default for float32
    assert torch.equal(one_by_one[0], values(qmodel))


def test_tied_weights_are_computed_once(quantized):
    model = Layer()
    model.small = nn.Linear(LARGE, LARGE)
    model.small.weight = model.large.weight
    qmodel = ready(model, weights_only("LSQ")).eval()
    quantized.clear()
    values_of = qmodel(x()).detach()
    quantized.clear()
    with torch.no_grad():
        assert torch.equal(qmodel(x()), values_of)
    assert len(quantized) == 1


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_grid_always_has_the_numbers_of_its_variables(per_channel):
    qmodel = ready(network(), {"weights": spec("STE", per_channel=per_channel)}).train()
    quantizer = quantizer_at(qmodel, "head.weights_quantizers.weight")
    scale = quantizer.grid(2).scale.clone()
    quantizer.threshold.data.mul_(2)  # no counter sees it
    assert torch.equal(quantizer.grid(2).scale, scale * 2)
