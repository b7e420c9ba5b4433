"""Functional operations of models that can't be traced: found by an example, quantized at every call, never missed."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import threading

import pytest
import safetensors
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.utils.checkpoint import checkpoint

import trainable_torch
from tests.torch.models import moved, ready, same_state, spec, train, vectors, weights_only
from trainable_core.errors import DocumentError, ModelError, QuantizerStateError, RuleError
from trainable_torch import calibrate, describe, finalize, load, save, wrap
from trainable_torch.serialization import FORMAT

X = vectors(3, 5, 8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rules(*ops, **more):
    """Return a recipe that quantizes the inputs of functional operations of some kinds, and nothing else."""
    return {"rules": [{"match": {"op": op}, "activations": {**spec("LSQ", "UNIFORM", 4), **more}} for op in ops]}


def outputs(**more):
    return {"activations": spec("LSQ", "UNIFORM", 4, placement="outputs"), **more}


class Block(nn.Module):
    """Attention and a sum, behind a branch that tracing can't follow."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.act = nn.LayerNorm(8), nn.GELU()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        return self.act(self.norm(x + scores.softmax(-1) @ x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Computes(nn.Module):
    """A linear layer, then a function that tracing can't follow."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self, self.fc(x)) if x.sum() < 1e9 else x


def wrapped(model, how, example=X):
    return calibrate(wrap(model, how, example=example), [example])


def holders(qmodel):
    """Return the quantizers of functional operations, by the names of the operations and tensors."""
    found = {}
    for name, module in qmodel.functional_quantizers.named_modules():
        if name.endswith("_holder"):
            found[name.removesuffix("_holder")] = module
    return found


def rows(qmodel):
    return [(row.layer, row.tensor) for row in describe(qmodel).rows]


# ---- the right tensors ----------------------------------------------------------------------------------------------


def test_the_inputs_of_sums_and_products_are_quantized():
    model = Model()
    qmodel = wrapped(model, rules("add", "matmul")).eval()
    assert type(qmodel) is Model
    held = holders(qmodel)

    def q(name, index, value):
        return held[f"{name}_input_{index}"](value)

    def block(number, part, x):
        a, b = f"blocks.{number}.matmul", f"blocks.{number}.matmul_1"
        scores = q(a, 0, part.query(x)) @ q(a, 1, part.key(x).transpose(-1, -2))
        attended = q(b, 0, scores.softmax(-1)) @ q(b, 1, x)
        return part.act(part.norm(q(f"blocks.{number}.add", 0, x) + q(f"blocks.{number}.add", 1, attended)))

    x = X
    for number, part in enumerate(model.blocks):
        name = f"add_{number}" if number else "add"
        x = q(name, 0, x) + q(name, 1, block(number, part, x))
    assert torch.equal(qmodel(X), model.head(x))
    assert len(held) == 2 * 2 + 2 * 2 * 3
    assert not torch.equal(qmodel(X), model(X))


def test_descriptions_name_the_operations_by_their_modules():
    qmodel = wrapped(Model(), rules("matmul"))
    expected = [f"blocks.{block}.{op}" for block in (0, 1) for op in ("matmul", "matmul_1")]
    assert rows(qmodel) == [(name, f"input {index}") for name in expected for index in (0, 1)]
    assert {row.op for row in describe(qmodel).rows} == {"matmul"}


def test_a_rule_may_name_one_operation():
    how = {"rules": [{"match": {"name": "blocks.1.matmul_1"}, "activations": spec("LSQ", "UNIFORM", 4)}]}
    assert rows(wrapped(Model(), how)) == [("blocks.1.matmul_1", "input 0"), ("blocks.1.matmul_1", "input 1")]


def test_a_rule_may_skip_one_operation():
    how = rules("matmul")
    how["rules"].append({"match": {"name": "blocks.0.*"}, "skip": True})
    qmodel = wrapped(Model(), how)
    assert {layer for layer, _ in rows(qmodel)} == {"blocks.1.matmul", "blocks.1.matmul_1"}
    assert describe(qmodel).left_out["blocks.0.matmul"] == "skipped by a rule"


INPUTS = {
    "twice the same": (lambda _, x: x + x, "add", 1),
    "a number": (lambda _, x: x + 2, "add", 1),
    "a number before": (lambda _, x: 2 - x, "add", 1),
    "a size": (lambda _, x: x * x.shape[0], "mul", 1),
    "a mask of truth values": (lambda _, x: x * (x > 0), "mul", 1),
    "a list": (lambda _, x: torch.cat([x, x + 1, x]), "cat", 2),
    "a tuple by keyword": (lambda _, x: torch.stack(tensors=(x, x * 2)), "cat", 2),
    "attention with a mask": (
        lambda _, x: F.scaled_dot_product_attention(x, x * 2, value=x * 3, attn_mask=torch.zeros(5, 5)),
        "matmul",
        3,
    ),
    "a parameter": (lambda m, x: x * m.fc.bias, "mul", 2),
    "a method": (lambda _, x: x.bmm(x.transpose(1, 2)), "matmul", 2),
    "an operator": (lambda _, x: x @ x.mT, "matmul", 2),
    "a function": (lambda _, x: torch.matmul(x, x.mT), "matmul", 2),
    "a pooling": (lambda _, x: x.mean(1), "pooling", 1),
    "a normalization": (lambda _, x: F.layer_norm(x, (8,)), "normalization", 1),
    "an activation": (lambda _, x: F.silu(x), "activation", 1),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_counts_as_an_input(case):
    function, op, count = INPUTS[case]
    model = Computes(function)
    qmodel = wrapped(model, rules(op)).eval()
    assert [tensor for _, tensor in rows(qmodel)] == [f"input {index}" for index in range(count)]
    assert not torch.equal(qmodel(X), model(X))


def test_what_a_layer_computes_inside_is_not_the_models():
    """LayerNorm, GELU and Softmax are layers, as in a trace; a module that is made on the fly belongs to its caller."""
    model = Computes(lambda m, x: m.late(nn.Softmax(-1)(m.norm(x))))
    model.norm, model.late = nn.LayerNorm(8), nn.GELU()
    qmodel = wrapped(model, {"rules": [{"match": {"name": "activation"}, "activations": spec("LSQ", "UNIFORM", 4)}]})
    assert rows(qmodel) == [("activation", "input 0")]
    held = holders(qmodel)["activation_input_0"]
    qmodel.eval()
    expected = model.late(held(model.norm(model.fc(X))).softmax(-1))
    assert torch.equal(qmodel(X), expected)


def test_outputs_are_quantized_behind_the_activation_that_follows():
    def forward(m, x):
        return F.relu(x + 1) * m.act(x @ x.mT @ x)

    model = Computes(forward)
    model.act = nn.Tanh()
    qmodel = wrapped(model, outputs())
    told = describe(qmodel)
    assert rows(qmodel) == [
        ("fc", "output"),
        ("act", "output"),
        ("activation", "output"),
        ("matmul", "output"),
        ("mul", "output"),
    ]
    assert {told.left_out["add"], told.left_out["matmul_1"]} == {"quantized after its activation"}
    held = holders(qmodel.eval())
    y = qmodel.fc(X)
    expected = held["activation_output"](F.relu(y + 1)) * qmodel.act(held["matmul_output"](y @ y.mT) @ y)
    assert torch.equal(qmodel(X), held["mul_output"](expected))


def test_a_layer_in_an_untraceable_model_is_fused_with_the_activation_that_an_example_shows():
    model = Computes(lambda m, x: m.act(x))
    model.act = nn.ReLU()
    assert rows(wrapped(model, outputs())) == [("act", "output")]
    with_more = Computes(lambda m, x: m.act(x) + x)
    with_more.act = nn.ReLU()
    assert rows(wrapped(with_more, outputs())) == [("fc", "output"), ("act", "output"), ("add", "output")]


# ---- operations in place --------------------------------------------------------------------------------------------


def in_place(_, x):
    y = x * 1
    alias = y
    y += x.tanh()
    return alias


def by_method(_, x):
    y = x * 1
    y.add_(x.tanh())
    return y


def on_a_view(_, x):
    y = x * 1
    y[:, :2].mul_(3)
    return y


def relu_in_place(_, x):
    y = x * 1
    F.relu(y, inplace=True)
    return y


IN_PLACE = {
    in_place: ("add", lambda q, x: q(0, x * 1) + q(1, x.tanh())),
    by_method: ("add", lambda q, x: q(0, x * 1) + q(1, x.tanh())),
    on_a_view: ("mul_1", lambda q, x: torch.cat([q(0, (x * 1)[:, :2]) * 3, x[:, 2:]], 1)),
    relu_in_place: ("activation", lambda q, x: q(0, x * 1).relu()),
}


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("function", IN_PLACE, ids=lambda each: each.__name__)
def test_who_else_holds_a_tensor_that_is_changed_in_place_sees_it_quantized(function, placement):
    name, expected = IN_PLACE[function]
    how = {"rules": [{"match": {"name": name}, "activations": spec("LSQ", "UNIFORM", 4, placement=placement)}]}
    model = Computes(function)
    qmodel = wrapped(model, how).eval()
    held = holders(qmodel)
    if placement == "inputs":
        result = expected(lambda index, value: held[f"{name}_input_{index}"](value), model.fc(X))
    else:
        result = expected(lambda _, value: value, model.fc(X))
        done = held[f"{name}_output"]
        result = torch.cat([done(result[:, :2]), result[:, 2:]], 1) if function is on_a_view else done(result)
    torch.testing.assert_close(qmodel(X), result, rtol=0, atol=0)
    gradients = []
    for forward in (lambda: qmodel(X), lambda: result):
        model.zero_grad()
        qmodel.zero_grad()
        forward().square().sum().backward()
        weight = qmodel.fc.weight if forward() is not result else model.fc.weight
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # one more sum in float32, in another order


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_in_a_traced_model_an_operation_in_place_is_made_one_that_is_not(placement):
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x)
            y += x
            return y.relu_()

    how = {"rules": [{"match": {"op": "add"}, "activations": spec("LSQ", "UNIFORM", 4, placement=placement)}]}
    model = Traced()
    qmodel = ready(model, how, X).eval()
    (first, *rest) = [m for m in qmodel.modules() if type(m).__name__ == "ActivationQuantizationHolder"]
    y = model.fc(X)
    expected = first(y) + rest[0](X) if placement == "inputs" else first(y + X)
    assert torch.equal(qmodel(X), expected.relu())


def test_in_a_traced_model_what_is_changed_in_place_and_used_elsewhere_is_left_alone():
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x)
            y.add_(1)
            return y * 2

    model = Traced()
    qmodel = ready(model, rules("mul"), X)
    assert rows(qmodel) == [("mul", "input 0")]
    assert "in place" in describe(qmodel).left_out["add_"]


# ---- lifecycle ------------------------------------------------------------------------------------------------------

WITH_WEIGHTS = {**weights_only("LSQ"), **rules("add", "matmul")}


def trained():
    return moved(train(wrapped(Model(), WITH_WEIGHTS), [X, X + 1], lr=0.01)).eval()


def test_quantizers_of_operations_learn():
    qmodel = wrapped(Model(), WITH_WEIGHTS)
    before = copy.deepcopy(qmodel.state_dict())
    train(qmodel, [X, X + 1])
    for name, holder in holders(qmodel).items():
        prefix = f"functional_quantizers.{name}_holder."
        state = {f"{prefix}{key}": value for key, value in holder.state_dict().items()}
        assert any(not torch.equal(value, before[key]) for key, value in state.items()), name


def test_what_is_trained_is_what_is_deployed():
    qmodel = trained()
    deployed = finalize(qmodel)
    assert torch.equal(deployed(X), qmodel(X))
    assert {row.state for row in describe(deployed).rows} == {"deployed"}
    assert torch.equal(finalize(deployed)(X), qmodel(X))
    qmodel.train()(X).sum().backward()  # it still trains


@pytest.mark.parametrize("deployed", [False, True])
def test_a_file_needs_no_example(tmp_path, deployed):
    qmodel = finalize(trained()) if deployed else trained()
    save(qmodel, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", Model())
    assert same_state(loaded, qmodel)
    assert describe(loaded) == describe(qmodel)
    assert torch.equal(loaded(X), qmodel(X))


def test_a_file_remembers_what_was_fused(tmp_path):
    def build():
        model = Computes(lambda m, x: m.act(x) + F.relu(x * 2))
        model.act = nn.ReLU()
        return model

    qmodel = wrapped(build(), outputs()).eval()
    save(qmodel, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", build())
    assert rows(loaded) == rows(qmodel)
    assert torch.equal(loaded(X), qmodel(X))


def test_a_file_for_a_model_without_these_modules_is_refused(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    other = Model()
    other.blocks = nn.ModuleList([Block()])
    with pytest.raises(DocumentError):
        load(tmp_path / "model.safetensors", other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda structure: structure.update(operations=None),
        lambda structure: structure.update(operations={"of_modules": {"": [["add"]]}}),
        lambda structure: structure.update(operations={"of_modules": {"nowhere": [["add", 2]]}}),
        lambda structure: structure["operations"]["of_modules"].update({"": [["add", 2], ["add", 3]]}),
        lambda structure: structure.pop("operations"),
        lambda structure: structure.update(calls=[["fc"]]),
        lambda structure: structure.update(calls=[["fc", 7]]),
        lambda structure: structure.update(calls=7),
    ],
)
def test_a_file_with_a_damaged_structure_is_refused(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save(trained(), path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    damage(header["structure"])
    from safetensors.torch import save as to_bytes

    from trainable_torch.serialization import DIGEST, digest

    text = json.dumps(header)
    path.write_bytes(to_bytes(tensors, {FORMAT: text, DIGEST: digest(text, tensors)}))
    with pytest.raises(DocumentError):
        load(path, Model())


def by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch],  # noqa: S301 - our own bytes
    ids=["deepcopy", "pickle", "torch"],
)
def test_copies_have_quantizers_of_their_own(copied):
    qmodel = trained()
    other = copied(qmodel)
    assert torch.equal(other(X), qmodel(X))
    assert describe(other) == describe(qmodel)
    before = qmodel(X)
    with torch.no_grad():
        for parameter in other.functional_quantizers.parameters():
            parameter.mul_(0.5)
    assert torch.equal(qmodel(X), before)
    assert not torch.equal(other(X), before)
    assert torch.equal(finalize(other)(X), other(X))


def test_a_state_dict_goes_from_one_to_another():
    one, other = trained(), wrapped(Model(), WITH_WEIGHTS).eval()
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(other(X), one(X))


def test_the_given_model_is_untouched():
    model = Model()
    wrapped(model, WITH_WEIGHTS)
    assert not hasattr(model, "functional_quantizers")
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())  # noqa: SLF001


def test_a_part_is_quantized_when_it_is_called_by_itself():
    qmodel = trained()
    held = holders(qmodel)
    block = qmodel.blocks[0]
    scores = held["blocks.0.matmul_input_0"](block.query(X)) @ held["blocks.0.matmul_input_1"](block.key(X).mT)
    attended = held["blocks.0.matmul_1_input_0"](scores.softmax(-1)) @ held["blocks.0.matmul_1_input_1"](X)
    added = held["blocks.0.add_input_0"](X) + held["blocks.0.add_input_1"](attended)
    assert torch.equal(block(X), block.act(block.norm(added)))


def test_activation_checkpointing_computes_the_same_again():
    class Checkpointed(Model):
        checkpointing = False

        def forward(self, x):
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x))
            return self.head(x)

    qmodel = wrapped(Checkpointed(), WITH_WEIGHTS).train()
    gradients = []
    for checkpointing in (False, True):
        qmodel.checkpointing = checkpointing
        qmodel.zero_grad()
        qmodel(X).square().sum().backward()
        gradients.append([p.grad.clone() for p in qmodel.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_threads_do_not_disturb_each_other():
    qmodel = finalize(trained())
    expected = [qmodel(X + shift) for shift in range(4)]
    found = [None] * 4

    def run(shift):
        for _ in range(5):
            found[shift] = qmodel(X + shift)

    threads = [threading.Thread(target=run, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_compiling_leaves_the_values_alone_or_is_refused():
    deployed = finalize(trained())
    assert torch.equal(torch.compile(deployed, backend="eager")(X), deployed(X))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="eager mode only"):  # noqa: SLF001 - its public name is this
        torch.compile(lambda x: deployed(x * 1), backend="eager", fullgraph=True)(X)
    torch.compiler.reset()


def test_an_exported_program_has_the_quantizers():
    class Exported(Computes):
        def forward(self, x):
            assert not isinstance(x, fx.Proxy)
            return self.function(self, self.fc(x))

    deployed = finalize(wrapped(Exported(lambda m, x: x @ m.fc(x).mT + 1), rules("add", "matmul")))
    program = torch.export.export(deployed, (X,))
    assert torch.equal(program.module()(X), deployed(X))


def test_whoever_asks_for_the_signature_is_told_the_models_own():
    qmodel = wrapped(Model(), rules("add"))
    assert list(inspect.signature(qmodel.forward).parameters) == ["x"]
    assert qmodel.forward.__code__ is Model.forward.__code__


def doubled(model, x):
    return model.fc(x) + x if x.sum() < 1e9 else x


def test_a_forward_that_was_replaced_before_is_kept():
    import functools

    model = Computes(None)
    model.forward = functools.partial(doubled, model)
    qmodel = wrapped(model, rules("add")).eval()
    held = holders(qmodel)
    assert torch.equal(qmodel(X), held["add_input_0"](model.fc(X)) + held["add_input_1"](X))


# ---- what can't be matched ------------------------------------------------------------------------------------------


class Asked(nn.Module):
    """Computes what it is asked for."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.other = Computes(lambda _, x: x + 1)

    def forward(self, x, how="plain"):
        x = self.fc(x) + x if x.sum() < 1e9 else x
        if how == "more":
            x = x + 1
        elif how == "product":
            x = x * 2
        elif how == "elsewhere":
            x = self.other(x)
        elif how == "error":
            x = x.reshape(7)
        return x


class AskedForLess(Asked):
    def forward(self, x, how="plain"):
        x = self.fc(x)
        if how == "other inputs":
            return x + x
        return x + X if how == "plain" else x


@pytest.mark.parametrize("mode", ["train", "eval", "deployed"])
@pytest.mark.parametrize("how", ["more", "elsewhere"])
def test_an_operation_that_the_example_did_not_show_is_refused(how, mode):
    qmodel = wrapped(Asked(), rules("add"))
    qmodel = finalize(qmodel) if mode == "deployed" else qmodel.train(mode == "train")
    expected = qmodel(X)
    with pytest.raises(QuantizerStateError, match="example"):
        qmodel(X, how)
    assert torch.equal(qmodel(X), expected)  # an error leaves nothing behind


@pytest.mark.parametrize("how", ["fewer", "other inputs"])
def test_an_operation_that_is_missing_or_has_other_inputs_is_refused(how):
    qmodel = wrapped(Untraced(AskedForLess()), rules("add"), example={"x": X, "how": "plain"})
    with pytest.raises(QuantizerStateError, match="example"):
        qmodel(X, how)


class Untraced(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, how):
        return self.model(x, how) if x.sum() < 1e9 else x


def test_operations_of_kinds_without_quantizers_may_differ():
    model = Asked()
    qmodel = wrapped(model, rules("add")).eval()
    assert torch.equal(qmodel(X, "product"), qmodel(X) * 2)


def test_an_error_of_the_model_is_its_own_and_leaves_nothing_behind():
    qmodel = wrapped(Asked(), rules("add")).eval()
    expected = qmodel(X)
    with pytest.raises(RuntimeError, match="shape"):
        qmodel(X, "error")
    assert torch.equal(qmodel(X), expected)
    assert torch.equal(torch.add(X, X), 2 * X)


def test_operations_that_differ_between_the_modes_are_left_alone():
    def drops(m, x):
        x = x * 2 + 1
        return x * torch.bernoulli(torch.full_like(x, 0.5)) if m.training else x

    model = Computes(lambda m, x: m.drop(x) + 1)
    model.drop = Computes(drops)
    qmodel = wrapped(model, rules("add"))
    assert rows(qmodel) == [("add", "input 0")]
    assert "train mode and eval mode" in describe(qmodel).left_out["operations of drop"]
    qmodel.train()(X)


def test_operations_that_differ_between_calls_are_left_alone():
    class Part(nn.Module):
        def forward(self, x, more):
            return x * 2 + 1 if more else x + 1

    model = Computes(lambda m, x: m.part(m.part(x, more=True), more=False) + 1)
    model.part = Part()
    qmodel = wrapped(model, rules("add"))
    assert rows(qmodel) == [("add", "input 0")]
    assert "from one of its calls to another" in describe(qmodel).left_out["operations of part"]


def test_a_part_that_is_called_twice_alike_is_quantized_in_both_calls():
    model = Computes(lambda m, x: m.part(m.part(x)))
    model.part = Computes(lambda _, x: x + 1)
    qmodel = wrapped(model, rules("add")).eval()
    held = holders(qmodel)["part.add_input_0"]
    once = held(model.part.fc(model.fc(X))) + 1
    assert torch.equal(qmodel(X), held(model.part.fc(once)) + 1)


def test_a_model_that_can_not_run_in_train_mode_says_so():
    def needs_labels(m, x):
        if m.training:
            raise ValueError("no labels")
        return x + 1

    with pytest.raises(RuleError, match="no labels"):
        wrap(Computes(needs_labels), rules("add"), example=X)


def test_without_an_example_the_reason_says_that_one_would_help():
    with pytest.raises(RuleError, match=r"control flow.*example="):
        wrap(Model(), rules("add"))
    told = describe(wrap(Model(), outputs())).left_out["functional operations"]
    assert "in forward (test_operations.py, line" in told


def test_a_decorated_forward_is_explained():
    import functools

    def decorated(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(*args, **kwargs)

        return call

    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        @decorated
        def forward(self, x, mask=None, *, scale=None, **more):
            return self.fc(x) + x

    told = describe(wrap(Decorated(), outputs())).left_out["functional operations"]
    assert "decorator" in told
    assert "co_varnames" not in told
    assert "example=" in told
    assert rows(wrapped(Decorated(), rules("add"))) == [("add", "input 0"), ("add", "input 1")]


def test_a_name_that_is_taken_is_not_taken_twice():
    model = Computes(lambda m, x: m.add(x) + x)
    model.add = nn.Linear(8, 8)
    qmodel = wrapped(model, {**weights_only(), **rules("add")})
    assert {layer for layer, _ in rows(qmodel)} == {"fc", "add", "add_function"}


def test_a_model_with_an_attribute_of_the_containers_name_is_refused():
    model = Computes(lambda _, x: x + 1)
    model.functional_quantizers = [1]
    with pytest.raises(ModelError, match="functional_quantizers"):
        wrap(model, rules("add"), example=X)


def test_an_example_may_be_a_function():
    qmodel = wrap(Untraced(AskedForLess()), rules("add"), example=lambda model: model(X, how="plain"))
    assert [row.layer for row in describe(qmodel).rows] == ["model.add", "model.add"]


# ---- what is no activation ------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Attention with buckets of positions and a mask, as in T5; the mask is left out where it hides nothing."""

    def __init__(self):
        super().__init__()
        self.query, self.buckets = nn.Linear(8, 8), nn.Embedding(8, 1)
        self.register_buffer("rates", torch.tensor([1.0, 0.5]))

    def forward(self, x, keep):
        distance = (torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]).abs()
        bucket = (torch.log(distance.float()) * 2.0).clamp(min=0.0)  # of 0 it is minus infinity
        turned = self.rates * distance[..., None].float()
        scores = torch.matmul(self.query(x), x.transpose(1, 2)) + self.buckets(bucket.long()).squeeze(-1)
        if torch.compiler.is_exporting() or not bool(keep.all()):
            scores = scores + (1.0 - keep[:, None].float()) * torch.finfo(x.dtype).min
        return torch.matmul(torch.softmax(scores, -1), x) + turned.sum() * 0.0


def attends(keep):
    recipe = outputs(weights=spec("LSQ", "SYMMETRIC", 8)) | {"activations": spec("LSQ", "SYMMETRIC", 8)}
    recipe["activations"]["placement"] = "integer"
    model = Attends().eval()
    qmodel = calibrate(wrap(model, recipe, example={"x": X, "keep": keep}), [{"x": X, "keep": keep}])
    return model, qmodel.eval()


def test_masks_indices_and_constants_get_no_quantizer():
    keep = torch.ones(3, 5, dtype=torch.long)
    keep[:, 3:] = 0
    model, qmodel = attends(keep)
    quantized = {row.layer for row in describe(qmodel).rows if row.target == "Activation"}
    assert {"matmul", "add", "matmul_1", "add_3"} <= quantized
    assert not quantized & {"mul", "mul_1", "mul_2", "mul_3", "add_1", "add_2"}  # add_1 is a difference of the mask
    # a quantizer of the masked scores would have steps of 1e36, and so no score would count any more
    distance = (qmodel(x=X, keep=keep) - model(X, keep)).abs().max()
    assert distance < 0.1 * model(X, keep).abs().max()


def test_an_operation_that_an_exporter_adds_stays_float(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript comes with the extra `onnx`")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime comes with the extra `onnx`")
    keep = torch.ones(3, 5, dtype=torch.long)
    recipe = {"rules": [{"match": {"op": "mul"}, "activations": spec("LSQ", "SYMMETRIC", 8)}], "target": "onnx"}
    recipe |= {"weights": spec("LSQ", "SYMMETRIC", 8)}
    with pytest.raises(RuleError, match="mul"):  # no product of this model is an activation's
        wrap(Attends(), recipe, example={"x": X, "keep": keep})
    batch = {"x": X, "keep": keep}
    recipe["rules"][0]["match"]["op"] = "matmul"
    deployed = finalize(calibrate(wrap(Attends().eval(), recipe, example=batch), [batch]))
    trainable_torch.export(deployed, tmp_path / "m.onnx", example=batch)
    masked = {"x": X, "keep": torch.tensor([[1, 1, 1, 0, 0]] * 3)}
    found = trainable_torch.verify(deployed, tmp_path / "m.onnx", [batch, masked])
    assert found.ok, str(found)
