"""Symbolic traces: what they may freeze in and what not, and what of a model they show."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from tests.torch.models import images, network, ready, recipe, spec, vectors
from trainable_torch import describe, wrap
from trainable_torch.structure.tracing import Untraceable, function_op, trace, traced_parts
from trainable_torch.wrapping import count_step

AT_OUTPUTS = {"activations": spec(placement="outputs", n_bits=8)}


class Calls(nn.Module):
    """A model whose forward is one function of a linear layer's output and of the module itself."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, self.fc(x))


def graph(model):
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule), traced
    return traced


def reason(model):
    traced = trace(model)
    assert isinstance(traced, Untraceable)
    return traced.reason


# ---- the model's mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d, F.alpha_dropout, F.feature_alpha_dropout])
@pytest.mark.parametrize("how", ["keyword", "position"])
@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_function_obeys_the_mode_after_tracing(dropout, how, training):
    calls = {
        "keyword": lambda model, x: dropout(input=x, training=model.training),
        "position": lambda model, x: dropout(x, 0.5, model.training),
    }
    traced = graph(Calls(calls[how]).train(training))
    assert traced.training is training
    x = vectors(2, 4, 4)
    assert torch.equal(traced.eval()(x), traced.fc(x))
    assert not torch.equal(traced.train()(x), traced.fc(x))


def test_a_dropout_function_keeps_its_probability():
    traced = graph(Calls(lambda model, x: F.dropout(x, 0.9, model.training)))
    (dropout,) = [module for module in traced.modules() if isinstance(module, nn.Dropout)]
    assert (dropout.p, dropout.inplace) == (0.9, False)


def test_dropout_that_is_always_on_stays_on():
    traced = graph(Calls(lambda _, x: F.dropout(x, 0.5, training=True))).eval()
    x = vectors(64, 4)
    assert not torch.equal(traced(x), traced.fc(x))


def branch(model, x):
    return x + 1 if model.training else x


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(branch, id="branch"),
        pytest.param(lambda model, x: x * (2.0 if model.training else 1.0), id="number"),
        pytest.param(lambda model, x: x * torch.tensor(2.0 if model.training else 1.0), id="tensor"),
        pytest.param(lambda model, x: F.rrelu(x, training=model.training), id="other_function"),
        pytest.param(lambda model, x: F.dropout(x, training=not model.training), id="dropout_in_eval"),
        pytest.param(lambda model, x: torch.dropout(x, 0.5, model.training), id="dropout_of_torch"),
        pytest.param(lambda model, x: (x, x) if model.training else x, id="outputs"),
        pytest.param(lambda model, x: F.relu(x) if model.training else F.relu(F.relu(x)), id="more_in_eval"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_the_mode_decides_is_not_frozen_in(function, training):
    model = Calls(function).train(training)
    assert "eval" in reason(model)
    assert model.training is training


def test_random_numbers_made_in_the_forward_are_not_frozen_in():
    assert "freeze" in reason(Calls(lambda _, x: x + torch.randn(4)))


def test_modes_of_single_modules_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())).train()
    model[1].eval()
    traced = graph(model)
    assert [module.training for module in model.modules()] == [True, True, False, False, False]
    assert (traced.training, traced.get_submodule("1").training, traced.get_submodule("1.0").training) == (
        True,
        False,
        False,
    )


# ---- control flow and arguments -------------------------------------------------------------------------------------


def test_control_flow_on_values_cant_be_traced_and_is_told():
    text = reason(Calls(lambda _, x: x + 1 if x.sum() > 0 else x))
    assert "control flow" in text
    assert "\n" not in text


def test_whatever_a_forward_raises_is_a_reason():
    def fails(_, x):
        raise KeyError(x.shape)

    assert "KeyError" in reason(Calls(fails))


class Masked(nn.Module):
    """Has an optional argument."""

    def __init__(self, *, matters):
        super().__init__()
        self.fc, self.matters = nn.Linear(4, 4), matters

    def forward(self, x, mask=None):
        x = self.fc(x)
        return x * mask if self.matters and mask is not None else x


def test_an_optional_argument_that_changes_the_course_makes_a_model_untraceable():
    assert "optional" in reason(Masked(matters=True))


def test_a_model_with_such_an_argument_works_with_and_without_it_once_wrapped():
    x, mask = vectors(3, 4), torch.zeros(4)
    qmodel = ready(Masked(matters=True), AT_OUTPUTS, x)
    assert qmodel(x).abs().sum() > 0
    assert qmodel(x, mask).abs().sum() == 0


def test_an_optional_argument_that_changes_nothing_is_no_obstacle():
    model, x = Masked(matters=False), vectors(3, 4)
    assert torch.equal(graph(model)(x), model(x))


def test_keyword_arguments_work_in_a_traced_model():
    class Two(nn.Module):
        def forward(self, x, *, other):
            return x - other

    x, y = vectors(3, 4), 2 * vectors(3, 4)
    qmodel = ready(Two(), AT_OUTPUTS, {"x": x, "other": y})
    assert torch.equal(qmodel(x, other=y), qmodel(other=y, x=x))


# ---- the traced model -----------------------------------------------------------------------------------------------


def test_tracing_leaves_nothing_on_the_model():
    def keeps(model, x):
        model.last, model.seen = x, model.seen + 1
        return x + torch.tensor(1.0)

    model = Calls(keeps)
    model.seen, model.last = 0, None
    before = set(model.__dict__)
    traced = graph(model)
    assert set(model.__dict__) == before
    assert (model.seen, model.last) == (0, None)
    assert traced._tensor_constant0 == 1.0  # noqa: SLF001 - fx's name


def test_a_tensor_made_in_the_forward_moves_with_the_traced_model():
    traced = graph(Calls(lambda _, x: x + torch.tensor(1.0))).to(torch.float64)
    assert {buffer.dtype for buffer in traced.buffers()} == {torch.float64}


def at_outputs():
    """Return a traced, wrapped and calibrated model with a schedule."""
    qmodel = ready(network(), {**recipe("DQA"), **AT_OUTPUTS}, images())
    assert isinstance(qmodel, fx.GraphModule)
    return qmodel


def copied_by_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes


def copied_by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_torch])
def test_copies_of_a_traced_model_keep_its_notes_hooks_and_mode(copied):
    qmodel = at_outputs().eval()
    calls = []
    qmodel.register_forward_hook(Noted(calls), with_kwargs=True)
    for other in (copied(qmodel), copied(copied(qmodel))):
        assert type(other).__name__ == type(qmodel).__name__
        assert not other.training
        assert describe(other) == describe(qmodel)
        assert count_step in other._forward_pre_hooks.values()  # noqa: SLF001 - there is no public list
        assert torch.equal(other(images()), qmodel(images()))
        other.train()(images())
        steps = {int(module.step) for module in other.modules() if hasattr(module, "step")}
        assert steps == {1}


class Noted:
    """A hook that can be pickled; counts its calls, and fails unless it is given keyword arguments."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, module, args, kwargs, output):
        self.calls.append(len(args) + len(kwargs))


def test_a_copy_shares_no_tensor_with_the_model():
    qmodel = at_outputs()
    other = copy.deepcopy(qmodel)
    pointers = {value.data_ptr() for value in qmodel.state_dict().values() if value.numel()}
    assert not pointers & {value.data_ptr() for value in other.state_dict().values() if value.numel()}


# ---- functional operations ------------------------------------------------------------------------------------------


def ops(function):
    return [op for node in graph(Calls(function)).graph.nodes if (op := function_op(node))]


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("add", lambda _, x: x + 1),
        ("add", lambda _, x: 1 - x),
        ("add", lambda _, x: torch.add(x, x)),
        ("add", lambda _, x: x.add(x)),
        ("mul", lambda _, x: x * x),
        ("cat", lambda _, x: torch.cat([x, x])),
        ("cat", lambda _, x: torch.cat(tensors=[x, x])),
        ("cat", lambda _, x: torch.stack((x, x))),
        ("matmul", lambda _, x: x @ x),
        ("matmul", lambda _, x: F.scaled_dot_product_attention(x, x, x)),
        ("activation", lambda _, x: F.relu(x)),
        ("activation", lambda _, x: x.sigmoid()),
        ("activation", lambda _, x: torch.softmax(x, -1)),
        ("normalization", lambda _, x: F.layer_norm(x, (4,))),
        ("pooling", lambda _, x: x.mean(0)),
        ("pooling", lambda _, x: F.avg_pool1d(x, 2)),
    ],
)
def test_each_function_has_its_op_kind(op, function):
    assert ops(function) == [op]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda _, x: x.view(x.shape[0] * x.size(1)), id="of_sizes"),
        pytest.param(lambda _, x: x.reshape(x.numel() // 4 + 0, 4), id="of_numel"),
        pytest.param(lambda _, x: x.transpose(0, 1), id="moving"),
        pytest.param(lambda _, x: x[0], id="indexing"),
    ],
)
def test_what_computes_no_values_is_no_operation(function):
    assert ops(function) == []


def test_arithmetic_of_sizes_is_left_alone_when_outputs_are_quantized():
    model, x = Calls(lambda _, x: x.view(x.shape[0] * x.size(1))), vectors(3, 4)
    qmodel = ready(model, AT_OUTPUTS, x)
    assert [row.layer for row in describe(qmodel).rows] == ["fc"]
    assert qmodel(x).shape == (12,)


def test_a_size_beside_a_tensor_is_no_input_to_quantize():
    model, x = Calls(lambda _, x: x * x.shape[0]), vectors(3, 4)
    how = {"rules": [{"match": {"op": "mul"}, "activations": spec()}]}
    qmodel = ready(model, how, x)
    assert [(row.layer, row.tensor) for row in describe(qmodel).rows] == [("mul", "input 0")]


@pytest.mark.parametrize("how", ["positions", "keywords"])
def test_of_attention_query_key_and_value_are_inputs_and_the_mask_is_not(how):
    class Attends(nn.Module):
        def forward(self, query, key, value, mask):
            if how == "positions":
                return F.scaled_dot_product_attention(query, key, value, mask)
            return F.scaled_dot_product_attention(value=value, key=key, query=query, attn_mask=mask)

    batch = {name: scale * vectors(2, 3, 4) for scale, name in enumerate(("query", "key", "value"), start=1)}
    batch["mask"] = torch.tensor([[True, False, True]] * 3)
    qmodel = ready(Attends(), {"rules": [{"match": {"op": "matmul"}, "activations": spec()}]}, batch)
    holders = [m for m in qmodel.modules() if type(m).__name__ == "ActivationQuantizationHolder"]
    query, key, value = (holder(batch[name]) for holder, name in zip(holders, ("query", "key", "value"), strict=True))
    assert torch.equal(qmodel(**batch), F.scaled_dot_product_attention(query, key, value, batch["mask"]))


# ---- parts ----------------------------------------------------------------------------------------------------------


class Chooses(nn.Module):
    """Can't be traced, its parts can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.first(x) if x.sum() > 0 else self.second(x))


def test_the_largest_parts_that_can_be_traced_are_found():
    assert [name for name, _ in traced_parts(Chooses())] == ["first.", "second."]


def test_a_model_that_can_be_traced_is_one_part():
    assert [name for name, _ in traced_parts(network())] == [""]


def test_a_layer_has_no_parts():
    assert traced_parts(nn.Linear(2, 2)) == []


def test_an_untraceable_model_is_wrapped_at_module_level_and_says_why():
    x = vectors(3, 4)
    qmodel = ready(Chooses(), recipe(), x, -x, 9 * x, -9 * x)
    assert type(qmodel) is Chooses
    assert {row.layer for row in describe(qmodel).rows} == {"first.0", "second.0", "head"}
    assert describe(qmodel).left_out == {}  # nothing was asked that needs a graph
    qmodel = wrap(Chooses(), {**recipe(), **AT_OUTPUTS})
    assert "control flow" in describe(qmodel).left_out["functional operations"]
    assert "control flow" in str(describe(qmodel))
    at_outputs = [row.layer for row in describe(qmodel).rows if row.tensor == "output"]
    assert at_outputs == ["first.1", "second.1", "head"]  # after the activation where one follows
