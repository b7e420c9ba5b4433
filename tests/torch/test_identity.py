"""A quantized layer is still itself: what a model means does not depend on how its code reaches a layer."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from mct_quantizers import PytorchQuantizationWrapper
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import checkpoint

import trainable_torch
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_torch import QuantizationWrapper, running

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # as well
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]

WEIGHTS = {"weights": {"method": "SYMMETRIC", "n_bits": 2, "training_method": "LSQ"}}
BOTH = {**WEIGHTS, "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"}}


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ready(model, recipe=WEIGHTS, batches=None):
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe), batches)


def with_quantized_weights(model, qmodel):
    """Return the float model with Q(w) in the place of each quantized w: what the quantized one must compute."""
    replaced = copy.deepcopy(model)
    layers = dict(replaced.named_modules())
    with torch.no_grad():
        for name, module in qmodel.named_modules():
            if isinstance(module, QuantizationWrapper):
                for attribute, quantizer in module.weights_quantizers.items():
                    path, _, last = attribute.rpartition(".")
                    layer = layers[".".join(filter(None, (name, path)))]
                    getattr(layer, last).copy_(quantizer(getattr(layer, last)))
    return replaced


# ---- ways to reach a layer ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers, reached in the way that a subclass writes down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.arrange()

    def arrange(self):
        pass


class Listed(Model):
    def arrange(self):
        self.layers = [self.one, self.two]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class InATuple(Model):
    def arrange(self):
        self.layers = (self.one, (torch.relu, self.two))

    def forward(self, x):
        return self.layers[1][1](self.layers[1][0](self.layers[0](x)))


class InADictionary(Model):
    def arrange(self):
        self.layers = {"first": {"layer": self.one}, "second": self.two}

    def forward(self, x):
        return self.layers["second"](self.layers["first"]["layer"](x))


class Partial(Model):
    def arrange(self):
        self.step = functools.partial(self.one)

    def forward(self, x):
        return self.two(self.step(x))


class BoundMethod(Model):
    def arrange(self):
        self.step = self.one.forward

    def forward(self, x):
        return self.two(self.step(x))


class Holder:
    def __init__(self, layer):
        self.layer = layer


class InAPlainObject(Model):
    def arrange(self):
        self.held = Holder(self.one)

    def forward(self, x):
        return self.two(self.held.layer(x))


class Forwarded(Model):
    def forward(self, x):
        return self.two.forward(self.one.forward(input=x))


class ByName(Model):
    def forward(self, x):
        for name in ("one", "two"):
            x = getattr(self, name)(x)
        return x


class ByChildren(Model):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class AsksForItsClass(Model):
    def forward(self, x):
        for child in self.children():
            x = child(x)
            if isinstance(child, nn.Linear):
                x = F.relu(x)
        return x


class ReadsWeights(Model):
    def forward(self, x):
        return F.linear(F.linear(x, self.one.weight, self.one.bias), self.two.weight, self.two.bias)


class ReadsTransposed(Model):
    def forward(self, x):
        return self.two(x) @ self.one.weight.t() + self.one.bias


class ReadsInAMethod(Model):
    def step(self, x, layer):
        return x @ layer.weight.T

    def forward(self, x):
        return self.step(self.step(x, self.one), self.two)


class ReadsFromAList(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight)
        return x


class ReadsAndCalls(Model):
    def forward(self, x):
        return F.linear(self.one(x), self.one.weight) + self.two(x)


class ReadsInCheckpoint(Model):
    reentrant = False

    def step(self, x):
        return F.linear(self.two(x), self.one.weight).tanh()

    def forward(self, x):
        if not x.requires_grad:
            return self.step(x)
        return checkpoint.checkpoint(self.step, x, use_reentrant=self.reentrant)


class ReadsInReentrantCheckpoint(ReadsInCheckpoint):
    reentrant = True


WAYS = [
    Listed, InATuple, InADictionary, Partial, BoundMethod, InAPlainObject, Forwarded, ByName, ByChildren,
    AsksForItsClass, ReadsWeights, ReadsTransposed, ReadsInAMethod, ReadsFromAList, ReadsAndCalls, ReadsInCheckpoint,
    ReadsInReentrantCheckpoint,
]  # fmt: skip
ways = pytest.mark.parametrize("make", WAYS)


@ways
def test_every_read_and_call_is_of_the_quantized_weight(make):
    """2 bits: a weight that stayed float would show."""
    model, x = make(), x_of(4, 8)
    qmodel = ready(model)
    wanted = with_quantized_weights(model, qmodel)(x)
    assert torch.equal(qmodel.eval()(x), wanted)
    assert torch.equal(trainable_torch.finalize(qmodel)(x), wanted)
    assert not torch.equal(wanted, model(x))


@ways
def test_weights_and_thresholds_learn_however_they_are_reached(make):
    qmodel = ready(make()).train()
    qmodel(x_of(4, 8).requires_grad_()).square().sum().backward()
    learning = {name for name, p in qmodel.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {
        f"{layer}.{name}" for layer in ("one", "two") for name in ("weight", "weights_quantizers.weight.threshold")
    } <= learning


@ways
def test_train_mode_computes_what_eval_mode_does(make):
    qmodel, x = ready(make()), x_of(4, 8).requires_grad_()
    assert torch.equal(qmodel.train()(x), qmodel.eval()(x))


@ways
def test_outside_of_a_forward_the_weight_is_the_float_parameter(make):
    model = make()
    qmodel = ready(model)
    qmodel(x_of(4, 8))
    for layer in (qmodel.one, qmodel.two):
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight is dict(layer.named_parameters())["weight"]
    assert torch.equal(qmodel.one.weight, model.one.weight)


@ways
def test_copies_pickles_and_files_of_the_module_compute_the_same(make):
    qmodel, x = ready(make()).train(), x_of(4, 8).requires_grad_()
    wanted = qmodel(x)
    file = io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), torch.load(file, weights_only=False)):  # noqa: S301 - our own bytes
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            other.one.weight.zero_()
        assert not torch.equal(other(x), wanted)
    assert torch.equal(qmodel(x), wanted)


@pytest.mark.parametrize("make", [each for each in WAYS if "Checkpoint" not in each.__name__])
def test_compiled_and_exported_models_read_the_same(make):
    qmodel, x = ready(make()).eval(), x_of(4, 8)
    deployed = trainable_torch.finalize(qmodel)
    torch.compiler.reset()
    for model in (qmodel, deployed):
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), deployed(x))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), deployed(x))
    assert torch.equal(torch.jit.trace(deployed, x)(x), deployed(x))


@torch.compiler.disable
def read_in_eager(layer, x):
    return F.linear(x, layer.weight)


class BreaksTheGraph(Model):
    def forward(self, x):
        return self.two(read_in_eager(self.one, x))


def test_what_breaks_a_compiled_graph_reads_the_quantized_weight():
    model, x = BreaksTheGraph(), x_of(4, 8)
    qmodel = ready(model).eval()
    torch.compiler.reset()
    assert torch.equal(torch.compile(qmodel, backend="eager")(x), with_quantized_weights(model, qmodel)(x))


def test_parts_called_by_themselves_read_quantized_weights():
    model, x = nn.Sequential(ReadsWeights(), nn.ReLU()), x_of(4, 8)
    qmodel = ready(model)
    assert torch.equal(qmodel[0](x), with_quantized_weights(model, qmodel)[0](x))
    part = copy.deepcopy(qmodel[0])
    assert torch.equal(part(x), qmodel[0](x))


def test_forwards_that_are_called_without_the_hooks_read_quantized_weights():
    model, x = ReadsWeights(), x_of(4, 8)
    qmodel = ready(model)
    assert torch.equal(qmodel.forward(x), with_quantized_weights(model, qmodel)(x))


def test_a_method_that_is_no_forward_says_that_the_model_runs():
    model, x = ReadsInAMethod(), x_of(4, 8)
    qmodel = ready(model)
    assert torch.equal(qmodel.step(x, qmodel.one), model.step(x, model.one))  # as an initializer would
    quantized = qmodel.one.get_quantized_weights()["weight"]
    with running(qmodel):
        assert torch.equal(qmodel.step(x, qmodel.one), x @ quantized.T)
    assert isinstance(qmodel.one.weight, nn.Parameter)


def test_another_thread_reads_the_float_weight():
    seen = []

    class Waits(Model):
        def forward(self, x):
            thread = threading.Thread(target=lambda: seen.append(self.one.weight))
            thread.start()
            thread.join()
            return self.one(x)

    qmodel = ready(Waits())
    seen.clear()  # of what tracing the model saw
    qmodel(x_of(4, 8))
    assert seen[0] is qmodel.one.weight


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_nothing_on(error):
    class Fails(Model):
        fails = False

        def forward(self, x):
            if self.fails:
                assert not isinstance(self.one.weight, nn.Parameter)
                self.one(x)
                raise error
            return x

    qmodel = ready(Fails())
    qmodel.fails = True
    with pytest.raises(error):
        qmodel(x_of(4, 8))
    assert isinstance(qmodel.one.weight, nn.Parameter)


def test_calibration_shows_float_weights_to_readers():
    model, x = ReadsAndCalls(), x_of(4, 8)
    seen = []
    qmodel = trainable_torch.wrap(model, BOTH)
    trainable_torch.calibrate(qmodel, [x], forward=lambda m, batch: seen.append(m(batch)))
    assert torch.equal(seen[0], model(x))


# ---- what a layer is ------------------------------------------------------------------------------------------------


def test_it_is_the_same_object_of_both_classes_at_its_place():
    layer = nn.Linear(3, 2)
    quantizer = trainable_torch.wrap(nn.Linear(3, 2), WEIGHTS).weights_quantizers["weight"]
    assert QuantizationWrapper(layer, {"weight": quantizer}) is layer
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, PytorchQuantizationWrapper)
    assert layer.layer is layer
    assert inspect.signature(layer.forward) == inspect.signature(nn.Linear(3, 2).forward)


def test_the_given_model_is_untouched():
    model = Listed()
    ready(model)
    assert type(model.one) is nn.Linear
    assert "_trainable_model" not in vars(model)


def test_a_layer_is_not_wrapped_twice():
    qmodel = ready(nn.Linear(3, 2))
    with pytest.raises(QuantizerStateError, match="wrapped already"):
        QuantizationWrapper(qmodel, {"weight": qmodel.weights_quantizers["weight"]})


class Named(nn.Linear):
    """A layer that has an attribute of the wrapper's."""

    def __init__(self, name, value):
        super().__init__(8, 8)
        setattr(self, name, value)


@pytest.mark.parametrize(
    "value", [3, nn.Identity(), nn.Parameter(torch.ones(1))], ids=["number", "module", "parameter"]
)
def test_an_attribute_called_layer_stays_the_layers_own(value):
    qmodel = ready(nn.Sequential(Named("layer", value)))
    mine = qmodel[0].layer
    assert mine == 3 if value == 3 else type(mine) is type(value)
    assert not torch.equal(qmodel(x_of(2, 8)), qmodel[0].bias.expand(2, 8))


@pytest.mark.parametrize("name", ["weights_quantizers", "holders", "read_weight"])
def test_an_attribute_that_the_wrapper_needs_leaves_the_layer_out(name):
    model = nn.Sequential(Named(name, 3), nn.Linear(8, 8))
    qmodel = trainable_torch.wrap(model, WEIGHTS)
    assert name in trainable_torch.describe(qmodel).left_out["0"]
    assert type(qmodel[0]) is Named
    assert getattr(qmodel[0], name) == 3
    with pytest.raises(ModelError, match=name):
        QuantizationWrapper(copy.deepcopy(model[0]), {"weight": qmodel[1].weights_quantizers["weight"]})


def test_initializers_see_float_weights():
    qmodel = ready(Listed())
    qmodel.apply(lambda m: nn.init.constant_(m.weight, 0.5) if isinstance(m, nn.Linear) else None)
    assert torch.equal(qmodel.one.weight, torch.full((8, 8), 0.5))
    qmodel.one.reset_parameters()
    assert qmodel.one.weight.unique().numel() > 4


def test_the_layers_own_mode_wins():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    recipe = {**BOTH, "activations": {**BOTH["activations"], "placement": "outputs"}}
    qmodel = ready(nn.Sequential(nn.ReLU(), Frozen(3)), recipe, [x_of(4, 3, 6, 6)]).train()
    qmodel(x_of(4, 3, 6, 6))
    assert not qmodel.get_submodule("1").training
    assert qmodel.get_submodule("1").running_mean.abs().sum() == 0


def test_a_forward_put_into_the_layer_is_the_one_that_runs():
    model, x = Listed(), x_of(4, 8)
    model.one.forward = lambda x: F.linear(x, model.one.weight) * 2  # of the copy, it reads the copy's weight
    qmodel = ready(model)
    assert torch.equal(qmodel.one(x), F.linear(x, qmodel.one.get_quantized_weights()["weight"]) * 2)
    patched = ready(Listed())
    own = patched.one.forward
    patched.one.forward = lambda x: own(x) * 2
    assert torch.equal(patched.one(x), ready(Listed()).one(x) * 2)


def test_hooks_see_the_layer_and_read_quantized_weights():
    seen = []
    qmodel = ready(Listed())
    qmodel.one.register_forward_hook(lambda layer, *_: seen.append((layer, layer.weight)))
    qmodel(x_of(4, 8))
    layer, weight = seen[0]
    assert layer is qmodel.one
    assert torch.equal(weight, layer.get_quantized_weights()["weight"])


def test_an_average_of_the_model_reads_its_own_weights():
    qmodel, x = ready(ReadsWeights()), x_of(4, 8)
    average = torch.optim.swa_utils.AveragedModel(qmodel)
    with torch.no_grad():
        qmodel.one.weight.zero_()
    assert torch.equal(average(x), ready(ReadsWeights())(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_loads_by_its_own_names(assign):
    model, x = ReadsAndCalls(), x_of(4, 8)
    qmodel = ready(ReadsAndCalls())
    state = {name: value * 2 for name, value in model.state_dict().items()}
    told = qmodel.load_state_dict(state, strict=False, assign=assign)
    assert told.unexpected_keys == []
    assert all("quantizers" in key for key in told.missing_keys)
    model.load_state_dict(state)
    assert torch.equal(qmodel(x), with_quantized_weights(model, qmodel)(x))


def test_functional_call_reaches_readers():
    model, x = ReadsWeights(), x_of(4, 8)
    qmodel = ready(model)
    weight = torch.full((8, 8), 0.3)
    result = torch.func.functional_call(qmodel, {"one.weight": weight}, (x,))
    with torch.no_grad():
        model.one.weight.copy_(weight)
    assert torch.equal(result, with_quantized_weights(model, qmodel)(x))


def test_a_model_on_the_meta_device_reads_what_it_is_given():
    with torch.device("meta"):
        qmodel = trainable_torch.wrap(ReadsWeights(), WEIGHTS)
    qmodel.to_empty(device="cpu")
    qmodel.load_state_dict(ready(ReadsWeights()).state_dict())
    assert torch.equal(qmodel(x_of(4, 8)), ready(ReadsWeights())(x_of(4, 8)))


class Tied(nn.Module):
    """An output layer that is the embedding's transpose, read by the model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, i):
        return F.linear(self.middle(self.embed(i)), self.embed.weight)


def test_a_tied_output_is_of_the_quantized_embedding():
    model, i = Tied(), torch.arange(10)
    qmodel = ready(model)
    assert torch.equal(qmodel(i), with_quantized_weights(model, qmodel)(i))


class ReadsAttention(nn.Module):
    """Computes with an attention layer's projections itself, as fused blocks do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        a = self.attention
        x = F.linear(x, a.in_proj_weight, a.in_proj_bias)[..., :8]
        return F.linear(x, a.out_proj.weight, a.out_proj.bias)


def test_the_weight_of_a_layer_inside_is_read_quantized_too():
    model, x = ReadsAttention(), x_of(2, 3, 8)
    qmodel = ready(model)
    assert torch.equal(qmodel(x), with_quantized_weights(model, qmodel)(x))
    assert isinstance(qmodel.attention.out_proj.weight, nn.Parameter)
    other = pickle.loads(pickle.dumps(qmodel))  # noqa: S301 - our own bytes
    assert torch.equal(other(x), qmodel(x))


# ---- computed weights -----------------------------------------------------------------------------------------------

COMPUTE = {
    "weight_norm hook": nn.utils.weight_norm,
    "spectral_norm hook": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5) and layer,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
computes = pytest.mark.parametrize("compute", COMPUTE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@computes
@pytest.mark.parametrize("recipe", [WEIGHTS, BOTH], ids=["weights", "both"])
@pytest.mark.parametrize("after", [False, True], ids=["before wrapping", "after"])
def test_what_is_computed_is_quantized(compute, recipe, after):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), x_of(4, 8)
    if not after:
        COMPUTE[compute](model[0])
    qmodel = ready(model, recipe, [x])
    if after:
        COMPUTE[compute](qmodel[0])
    qmodel.train()(x).square().sum().backward()
    learning = [p for p in qmodel.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning)
    torch.optim.SGD(learning, 0.01).step()
    deployed = trainable_torch.finalize(qmodel)
    assert torch.equal(qmodel.eval()(x), deployed(x))
    quantizer = deployed[0].weights_quantizers["weight"]
    weight = deployed[0].get_weights_vars()[0][1]
    inputs = x if recipe is WEIGHTS else deployed[0].input_holders["input"](x)
    assert torch.equal(deployed(x), F.linear(inputs, quantizer(weight), deployed[0].bias))
    assert quantizer(weight).unique().numel() <= 8 * 4  # 2 bits in each of 8 channels
    assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))


@pytest.mark.parametrize("before", [False, True], ids=["after wrapping", "before"])
def test_a_parametrization_that_is_removed_leaves_a_quantized_weight(before):
    model, x = nn.Sequential(nn.Linear(8, 8)), x_of(4, 8)
    if before:
        parametrizations.weight_norm(model[0])
    qmodel = ready(model)
    if not before:
        parametrizations.weight_norm(qmodel[0])
    wanted = qmodel(x)
    parametrize.remove_parametrizations(qmodel[0], "weight")
    assert isinstance(qmodel[0].weight, nn.Parameter)
    assert torch.equal(qmodel(x), wanted)
    if before:
        assert parametrize.is_parametrized(model[0])


def test_pruning_that_is_made_permanent_leaves_a_quantized_weight():
    qmodel, x = ready(nn.Sequential(nn.Linear(8, 8))), x_of(4, 8)
    prune.l1_unstructured(qmodel[0], "weight", 0.5)
    wanted = qmodel(x)
    prune.remove(qmodel[0], "weight")
    assert torch.equal(qmodel(x), wanted)
    assert int((qmodel[0].weight == 0).sum()) == 32


# ---- recurrent layers -----------------------------------------------------------------------------------------------

RECURRENT = {
    "LSTM": lambda: nn.LSTM(8, 6, batch_first=True),
    "deep, both ways": lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(8, 6, proj_size=3),
    "without bias": lambda: nn.GRU(8, 6, bias=False),
    "GRU": lambda: nn.GRU(8, 6, batch_first=True),
    "RNN": lambda: nn.RNN(8, 6, batch_first=True, nonlinearity="relu"),
    "LSTMCell": lambda: nn.LSTMCell(8, 6),
    "GRUCell": lambda: nn.GRUCell(8, 6),
    "RNNCell": lambda: nn.RNNCell(8, 6),
}


def first_of(result):
    while isinstance(result, tuple):
        result = result[0]
    return result


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("recipe", [WEIGHTS, BOTH], ids=["weights", "both"])
def test_recurrent_layers_are_quantized(make, recipe):
    torch.manual_seed(0)
    model = RECURRENT[make]()
    x = x_of(3, 8) if make.endswith("Cell") else x_of(3, 5, 8)
    kernels = [name for name, _ in model.named_parameters() if name.startswith("weight")]
    qmodel = ready(model, recipe, [x])
    assert list(qmodel.weights_quantizers) == kernels
    first_of(qmodel.train()(x)).square().sum().backward()
    reached = [name for name in kernels if name != "weight_hh"]  # a cell's first state is zero
    assert all(p.grad.abs().sum() > 0 for name, p in qmodel.named_parameters() if name in reached)
    deployed = trainable_torch.finalize(qmodel)
    assert torch.equal(first_of(qmodel.eval()(x)), first_of(deployed(x)))
    inputs = x if recipe is WEIGHTS else deployed.input_holders["input"](x)
    assert torch.equal(first_of(deployed(x)), first_of(with_quantized_weights(model, deployed).eval()(inputs)))
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):  # noqa: S301 - our own bytes
        assert torch.equal(first_of(other(x)), first_of(deployed(x)))
        with torch.no_grad():
            dict(other.named_parameters())[kernels[0]].zero_()
        assert not torch.equal(first_of(other(x)), first_of(deployed(x)))


# ---- another process ------------------------------------------------------------------------------------------------


def test_a_new_process_reads_a_saved_module(tmp_path):
    """The class made of two is made again where the file is read."""
    qmodel = ready(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 6)))
    x = x_of(4, 8)
    torch.save((qmodel, x, qmodel(x)[0]), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, x, y = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(model(x)[0], y); assert isinstance(model[0], torch.nn.Linear)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)
