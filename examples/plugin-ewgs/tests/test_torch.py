# ruff: noqa: ANN001, ANN201, D103, PLR2004, S101 - a test's name says what it checks
"""A recipe chooses the method by its name, and it trains in PyTorch."""

import pytest
from sklearn.datasets import load_digits

from trainable_core import QuantizationRecipe

torch = pytest.importorskip("torch", reason="needs PyTorch")
trainable_torch = pytest.importorskip("trainable_torch", reason="needs trainable-torch")
nn = torch.nn

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 3, "training_method": "EWGS", "arguments": {"delta": 0.1}},
    "activations": {"method": "UNIFORM", "n_bits": 4, "training_method": "EWGS"},
}


def test_a_recipe_trains_with_ewgs_on_digits():
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    qmodel = trainable_torch.wrap(model, QuantizationRecipe.model_validate(RECIPE))
    trainable_torch.calibrate(qmodel, [images[:256]])
    optimizer = torch.optim.Adam(trainable_torch.parameter_groups(qmodel, qparams={"lr": 1e-3}), lr=1e-2)
    before = {name: value.clone() for name, value in qmodel.state_dict().items() if "threshold" in name}
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qmodel(images[:1500]), labels[:1500])
        loss.backward()
        optimizer.step()
    after = qmodel.state_dict()
    assert before
    assert all((after[name] != value).any() for name, value in before.items())
    deployed = trainable_torch.finalize(qmodel).eval()
    with torch.no_grad():
        assert torch.equal(deployed(images), qmodel.eval()(images))
        accuracy = (deployed(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    assert accuracy > 0.8  # chance is 0.1; a model whose quantizers pass no gradient stays there


@pytest.mark.parametrize("delta", [-1.0, float("nan"), float("inf")])
def test_a_wrong_delta_is_refused(delta):
    wrong = {"weights": {**RECIPE["weights"], "arguments": {"delta": delta}}}
    with pytest.raises(ValueError, match="delta"):
        trainable_torch.wrap(nn.Linear(2, 2), QuantizationRecipe.model_validate(wrong))
