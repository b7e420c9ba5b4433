"""A quantized model learns from its float one: the reference's terms, and no trace in either model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe
from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError
from trainable_core.reference.distillation import features_term, logits_term
from trainable_torch import calibrate, distill, parameter_groups, wrap


def student() -> nn.Module:
    return ready(network(), recipe("LSQ", n_bits=3), images()).train()


def teacher() -> nn.Module:
    return network().train()


def test_terms_and_gradients_are_those_of_the_reference() -> None:
    qmodel, model = student(), teacher()
    distillation = distill(qmodel, model, temperature=2.0, logits=0.5, features={"stem": 0.25, "relu": 3.0})
    outputs, term = distillation(images())
    model.eval()
    found = {}
    for which, each in (("student", qmodel), ("teacher", model)):
        stem = each.stem(images())
        relu = each.relu(each.body(stem))
        found[which] = [value.detach().numpy() for value in (each(images()), stem, relu)]
    logits, gradient = logits_term(found["student"][0], found["teacher"][0], 2.0)
    features = [features_term(*pair)[0] for pair in zip(found["student"][1:], found["teacher"][1:], strict=True)]
    expected = 0.5 * logits + 0.25 * features[0] + 3.0 * features[1]
    assert term.item() == pytest.approx(expected, rel=1e-5)  # sums of some hundred float32 terms
    (of_outputs,) = torch.autograd.grad(distill(qmodel, model, temperature=2.0)(images())[1], [qmodel.head.bias])
    assert torch.allclose(of_outputs, torch.as_tensor(gradient, dtype=torch.float32).sum(0), atol=1e-6)
    assert torch.equal(outputs, qmodel(images()))


def test_nothing_stays_in_either_model() -> None:
    qmodel, model = student(), teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, term = distill(qmodel, model, features=["body"])(images())
    term.backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for each in (qmodel, model) for module in each.modules())  # noqa: SLF001 - no public way


def test_a_student_comes_closer_to_its_teacher() -> None:
    qmodel, model = student(), teacher()
    distillation = distill(qmodel, model, temperature=2.0, features=["relu"])
    with torch.no_grad():
        for parameter in (qmodel.body.weight, qmodel.head.weight):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(parameter_groups(qmodel), lr=0.01)
    terms = []
    for _ in range(30):
        _, term = distillation(images(32))
        term.backward()
        optimizer.step()
        optimizer.zero_grad()
        terms.append(term.item())
    assert terms[-1] < 0.7 * terms[0]


def test_outputs_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self, model: nn.Module, make: Any) -> None:
            super().__init__()
            self.model, self.make = model, make

        def forward(self, x: Any) -> Any:
            return self.make(self.model(x))

    plain = None
    for make in (
        lambda y: y,
        lambda y: {"loss": None, "logits": y},
        lambda y: (y, 3),
        lambda y: SimpleNamespace(logits=y),
    ):
        qmodel = ready(Named(network(), make), recipe("LSQ"), images())
        _, term = distill(qmodel, Named(network(), make))(images())
        plain = term if plain is None else plain
        assert torch.equal(term, plain)


def test_what_does_not_fit_is_refused() -> None:
    qmodel = student()
    with pytest.raises(ModelError, match="not made by"):
        distill(network(), qmodel)
    with pytest.raises(ModelError, match="teacher is int"):
        distill(qmodel, 3)
    with pytest.raises(InvalidArgumentError, match="did you mean 'body'"):
        distill(qmodel, teacher(), features=["bodi"])
    other = teacher()
    other.head = nn.Linear(16, 4)
    with pytest.raises(ShapeMismatchError, match="logits"):
        distill(qmodel, other)(images())
    with pytest.raises(ModelError, match="no forward reached"):
        distill(ready(_Around(network()), recipe("LSQ"), images()), _Around(network()), features=["unused"])(images())


class _Around(nn.Module):
    """A model with a layer that it never calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.unused = model, nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.model(x)


def test_a_feature_is_what_the_module_gave_whatever_is_written_into_it_later():
    def model(*, in_place):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=in_place), nn.Linear(6, 3))

    x, terms = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), []
    for in_place in (False, True):
        how = {"weights": {"method": "SYMMETRIC", "n_bits": 2, "training_method": "LSQ"}}
        qmodel = calibrate(wrap(model(in_place=in_place), how), [x])
        _, term = distill(qmodel, model(in_place=in_place), logits=0.0, features=["0"])(x)
        term.backward()
        terms.append((term.item(), qmodel[0].weight.grad))
    assert terms[0][0] == terms[1][0]
    assert torch.equal(terms[0][1], terms[1][1])
