"""Models that change after wrapping: parts taken out, layers moved, merged, exchanged and added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trainable_torch
from trainable_core.errors import ModelError
from trainable_torch import calibrate, describe, finalize, load, save, wrap

WEIGHTS = {"weights": {"method": "SYMMETRIC", "n_bits": 3, "training_method": "LSQ"}}
BOTH = {**WEIGHTS, "activations": {"method": "UNIFORM", "n_bits": 6, "training_method": "LSQ"}}


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x).relu())


class Adapted(nn.Module):
    """An adapter around a layer, as those of peft: `merged` is the layer with what the adapter has learned."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self):
        down, up = (dict(layer.named_parameters())["weight"] for layer in (self.down, self.up))
        self.base_layer.weight.data += up.detach() @ down.detach()
        return self.base_layer


class AdaptedModel(nn.Module):
    """A model whose layers have adapters; `merge_and_unload` returns the model inside, without them."""

    def __init__(self, model):
        super().__init__()
        self.base = nn.ModuleDict({"model": model})
        model.one, model.two = Adapted(model.one), Adapted(model.two)

    def forward(self, x):
        return self.base["model"](x)

    def merge_and_unload(self):
        model = self.base["model"]
        model.one, model.two = model.one.merged(), model.two.merged()
        return model


RULES = {**BOTH, "rules": [{"match": {"name": "base.model.two.base_layer"}, "weights": {"n_bits": 8}}]}


@pytest.fixture
def merged():
    qmodel = calibrate(wrap(AdaptedModel(Body()), RULES), [x_of(4, 8)])
    return calibrate(qmodel.merge_and_unload(), [x_of(4, 8)], force=True)


def test_a_merged_model_is_described_by_its_present_names(merged):
    description = describe(merged)
    bits = {(row.layer, row.tensor): row.n_bits for row in description.rows}
    assert bits == {("one", "weight"): 3, ("one", "input"): 6, ("two", "weight"): 8, ("two", "input"): 6}
    assert not description.left_out


@pytest.mark.parametrize("deployed", [False, True])
def test_a_merged_model_is_trained_deployed_saved_and_loaded(merged, deployed, tmp_path):
    x = x_of(4, 8)
    optimizer = torch.optim.SGD(trainable_torch.parameter_groups(merged), lr=1e-2)
    merged.train()(x).square().sum().backward()
    optimizer.step()
    expected = merged.eval()(x)
    model = finalize(merged) if deployed else merged
    assert describe(model).finalized == deployed
    save(model, tmp_path / "model")
    for each in (model, load(tmp_path / "model", Body())):
        assert torch.equal(each(x), expected)


def test_a_part_is_a_model_of_its_own(tmp_path):
    recipe = {
        **WEIGHTS,
        "rules": [{"match": {"name": "0.two"}, "weights": {"n_bits": 2}}, {"match": {"name": "1"}, "skip": True}],
    }
    qmodel, x = calibrate(wrap(nn.Sequential(Body(), nn.Linear(8, 3)), recipe)), x_of(4, 8)
    part = qmodel[0]
    assert [(row.layer, row.n_bits) for row in describe(part).rows] == [("one", 3), ("two", 2)]
    assert torch.equal(finalize(part)(x), part.eval()(x))
    save(part, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", Body())(x), part(x))
    assert [row.layer for row in describe(qmodel).rows] == ["0.one", "0.two"]
    assert describe(finalize(qmodel)[0]).finalized


def test_a_model_around_a_wrapped_one_knows_it():
    qmodel, x = calibrate(wrap(Body(), WEIGHTS)), x_of(4, 8)
    whole = nn.Sequential(nn.Flatten(), qmodel)
    assert [row.layer for row in describe(whole).rows] == ["1.one", "1.two"]
    assert torch.equal(finalize(whole)(x), whole.eval()(x))


def test_two_wrapped_models_in_one_are_refused():
    whole = nn.Sequential(*(calibrate(wrap(Body(), WEIGHTS)) for _ in range(2)))
    with pytest.raises(ModelError, match="2 models that were wrapped"):
        describe(whole)


def test_a_part_whose_operations_are_quantized_by_the_whole_is_refused():
    class Adds(Body):
        def forward(self, x):
            return super().forward(x) + x if x.sum() < torch.inf else x

    recipe = {**BOTH, "rules": [{"match": {"op": "add"}, "activations": {"n_bits": 8}}]}
    x = x_of(4, 8)
    qmodel = calibrate(wrap(nn.Sequential(Adds()), recipe, example=x), [x])
    with pytest.raises(ModelError, match="functional operations"):
        describe(qmodel[0])


def test_layers_that_change_places_keep_their_plans():
    recipe = {**WEIGHTS, "rules": [{"match": {"name": "two"}, "weights": {"n_bits": 2}}]}
    qmodel = calibrate(wrap(Body(), recipe))
    qmodel.one, qmodel.two = qmodel.two, qmodel.one
    assert {row.layer: row.n_bits for row in describe(qmodel).rows} == {"one": 2, "two": 3}


def test_a_layer_that_came_later_or_is_built_in_the_forward_is_told():
    class Builds(Body):
        def forward(self, x):
            if not hasattr(self, "late"):
                self.late = nn.Linear(8, 8)
            return self.late(super().forward(x))

    qmodel = calibrate(wrap(Builds(), WEIGHTS))
    qmodel(x_of(4, 8))
    qmodel.two = nn.Linear(8, 8)
    assert set(describe(qmodel).left_out) == {"late", "two"}


def test_what_is_taken_out_is_not_described_any_more(tmp_path):
    recipe = {**WEIGHTS, "rules": [{"match": {"name": "two"}, "skip": True}]}
    qmodel, x = calibrate(wrap(Body(), recipe)), x_of(4, 8)
    qmodel.two = nn.Identity()
    assert not describe(qmodel).left_out
    save(qmodel, tmp_path / "model")
    model = Body()
    model.two = nn.Identity()
    assert torch.equal(load(tmp_path / "model", model).eval()(x), qmodel.eval()(x))
