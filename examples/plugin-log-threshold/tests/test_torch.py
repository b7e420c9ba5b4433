# ruff: noqa: ANN001, ANN201, D103, PLR2004, S101 - a test's name says what it checks
"""A recipe chooses the methods by their names, and they train in PyTorch."""

import pytest
from sklearn.datasets import load_digits

from trainable_core import QuantizationRecipe

torch = pytest.importorskip("torch", reason="needs PyTorch")
trainable_torch = pytest.importorskip("trainable_torch", reason="needs trainable-torch")
nn = torch.nn

METHODS = {
    "LOG_THRESHOLD": {"method": "POWER_OF_TWO", "training_method": "LOG_THRESHOLD"},
    "DSQ": {"method": "SYMMETRIC", "training_method": "DSQ", "arguments": {"soft_steps": 40, "alpha_weight": 0.1}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_trains_on_digits(name):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recipe = {"weights": {**METHODS[name], "n_bits": 3}, "activations": {**METHODS[name], "n_bits": 4}}
    qmodel = trainable_torch.wrap(model, QuantizationRecipe.model_validate(recipe))
    trainable_torch.calibrate(qmodel, [images[:256]])
    optimizer = torch.optim.Adam(trainable_torch.parameter_groups(qmodel, qparams={"lr": 1e-2}), lr=1e-2)
    own = "log2_threshold" if name == "LOG_THRESHOLD" else "alpha"
    before = {key: value.clone() for key, value in qmodel.state_dict().items() if key.endswith(own)}
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qmodel(images[:1500]), labels[:1500])
        (loss + trainable_torch.regularization(qmodel)).backward()
        optimizer.step()
    after = qmodel.state_dict()
    assert before
    assert all((after[key] != value).any() for key, value in before.items())
    deployed = trainable_torch.finalize(qmodel).eval()
    with torch.no_grad():
        assert torch.equal(deployed(images), qmodel.eval()(images))
        assert torch.equal(qmodel.train()(images), deployed(images))  # DSQ's soft steps are over
        accuracy = (deployed(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    assert accuracy > 0.8  # chance is 0.1; a model whose quantizers pass no gradient stays there


@pytest.mark.parametrize("arguments", [{"soft_steps": 0}, {"soft_steps": 1.5}, {"alpha_weight": float("nan")}])
def test_a_wrong_option_is_refused(arguments):
    wrong = {"weights": {**METHODS["DSQ"], "n_bits": 3, "arguments": arguments}}
    with pytest.raises(ValueError, match=next(iter(arguments))):
        trainable_torch.wrap(nn.Linear(2, 2), QuantizationRecipe.model_validate(wrong))
