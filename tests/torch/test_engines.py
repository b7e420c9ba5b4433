"""Other people's training loops, end to end on scikit-learn's digits: Lightning, Hugging Face Trainer and Accelerate.

Each trains, writes its own checkpoints, is stopped half-way and goes on from one; what comes out is bit for bit what
the loop that was not stopped gives, and what is deployed is what was trained.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.torch.models import same_state, spec
from trainable_torch import calibrate, finalize, load, parameter_groups, regularization, save, wrap

datasets = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")

COUNT, BATCH, EPOCHS = 512, 64, 4
STEPS = EPOCHS * COUNT // BATCH
METHODS = ["STE", "LSQ", "DQA"]
every_method = pytest.mark.parametrize("training_method", METHODS)
SCHEDULE = {"t_start": 0, "t_end": STEPS // 2, "initial_val": 1.0, "target_val": 0.05}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def how(training_method):
    more = {"arguments": {"temperature": SCHEDULE}, "candidates": [4, 8]} if training_method == "DQA" else {}
    return {"weights": spec(training_method, **more), "activations": spec(training_method, **more)}


@pytest.fixture(scope="module")
def digits():
    """Return images of shape (1, 8, 8) between 0 and 1, and their labels: for training, and others."""
    found = datasets.load_digits()
    x = torch.tensor(found.images[:, None] / 16.0, dtype=torch.float32)
    y = torch.tensor(found.target)
    return (x[:COUNT], y[:COUNT]), (x[COUNT : 2 * COUNT], y[COUNT : 2 * COUNT])


@pytest.fixture(scope="module")
def wrapped(digits):
    """Return a wrapped, calibrated model per training method; a float one trained for a moment before."""
    (x, y), _ = digits
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return {method: calibrate(wrap(model, how(method)), [x]) for method in METHODS}


def score(model, digits):
    x, y = digits[1]
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def assert_deployed_as_trained(qmodel, digits, tmp_path):
    """Ten classes, of which guessing finds 0.1; deployed bit for bit as trained, also from a file."""
    qmodel.eval()
    deployed = finalize(qmodel)
    x, _ = digits[1]
    assert torch.equal(deployed(x), qmodel(x))
    assert score(deployed, digits) > 0.7
    save(qmodel, tmp_path / "qmodel")
    assert torch.equal(load(tmp_path / "qmodel", network())(x), qmodel(x))


def loader(data):
    return DataLoader(TensorDataset(*data), batch_size=BATCH)  # in order: a resumed run sees the same batches


# ---- Lightning ------------------------------------------------------------------------------------------------------


def lightning_module(qmodel):
    from lightning import LightningModule

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.qmodel = qmodel

        def training_step(self, batch, _index):
            x, y = batch
            return cross_entropy(self.qmodel(x), y) + regularization(self.qmodel)

        def configure_optimizers(self):
            return torch.optim.Adam(parameter_groups(self.qmodel, qparams={"lr": 1e-3}), lr=1e-3)

    return Classifier()


def lightning_trainer(folder, epochs, **more):
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


@pytest.mark.filterwarnings("ignore")  # Lightning's own: of workers, of logging intervals, of what it imports
@every_method
def test_lightning_trains_stops_and_goes_on(training_method, wrapped, digits, tmp_path):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    straight = lightning_module(copy.deepcopy(wrapped[training_method]))
    lightning_trainer(tmp_path / "straight", EPOCHS).fit(straight, loader(digits[0]))

    stopped = lightning_module(copy.deepcopy(wrapped[training_method]))
    lightning_trainer(tmp_path / "stopped", EPOCHS // 2).fit(stopped, loader(digits[0]))
    resumed = lightning_module(wrap(network(), how(training_method)))  # a new process has nothing but the recipe
    checkpoint = tmp_path / "stopped/last.ckpt"
    lightning_trainer(tmp_path / "resumed", EPOCHS).fit(resumed, loader(digits[0]), ckpt_path=checkpoint)
    assert not same_state(stopped.qmodel, straight.qmodel)
    assert same_state(resumed.qmodel, straight.qmodel)
    assert_deployed_as_trained(resumed.qmodel, digits, tmp_path)


@pytest.mark.filterwarnings("ignore")  # as above
def test_lightning_trains_in_bfloat16_with_clipping_and_accumulation(wrapped, digits, tmp_path):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    module = lightning_module(copy.deepcopy(wrapped["LSQ"]))
    more = {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    lightning_trainer(tmp_path, EPOCHS, **more).fit(module, loader(digits[0]))
    assert_deployed_as_trained(module.qmodel, digits, tmp_path)


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """What the Trainer calls: named inputs, the loss first."""

    def __init__(self, qmodel):
        super().__init__()
        self.qmodel = qmodel

    def forward(self, x, labels):
        logits = self.qmodel(x)
        return {"loss": cross_entropy(logits, labels) + regularization(self.qmodel), "logits": logits}


def hugging_face_trainer(qmodel, data, folder, **more):
    from transformers import Trainer, TrainingArguments

    dataset = [{"x": image, "labels": label} for image, label in zip(*data, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **more,
    )
    model = Classifier(qmodel)
    optimizer = torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 1e-3}), lr=1e-3)
    return Trainer(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None)), model


@pytest.mark.filterwarnings("ignore")  # of the Trainer: of pinned memory without an accelerator
@every_method
def test_the_hugging_face_trainer_trains_stops_and_goes_on(training_method, wrapped, digits, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    trainer, straight = hugging_face_trainer(copy.deepcopy(wrapped[training_method]), digits[0], tmp_path / "straight")
    trainer.train()
    checkpoint = tmp_path / f"straight/checkpoint-{STEPS // 2}"
    assert checkpoint.is_dir()
    fresh = wrap(network(), how(training_method))
    trainer, resumed = hugging_face_trainer(fresh, digits[0], tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert same_state(resumed.qmodel, straight.qmodel)
    assert_deployed_as_trained(resumed.qmodel, digits, tmp_path)


@pytest.mark.filterwarnings("ignore")  # of Accelerate: of what it would do with a GPU
def test_accelerate_trains_stops_and_goes_on(wrapped, digits, tmp_path):
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from accelerate import Accelerator

    def run(qmodel, first, last, *, resume=None, leave=None):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 1e-3}), lr=1e-3)
        model, optimizer, batches = accelerator.prepare(qmodel, optimizer, loader(digits[0]))
        if resume is not None:
            accelerator.load_state(resume)
        for _ in range(first, last):
            for x, y in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(x), y))
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        if leave is not None:
            accelerator.save_state(leave)
        return accelerator.unwrap_model(model)

    straight = run(copy.deepcopy(wrapped["LSQ"]), 0, EPOCHS)
    run(copy.deepcopy(wrapped["LSQ"]), 0, EPOCHS // 2, leave=tmp_path / "state")
    resumed = run(wrap(network(), how("LSQ")), EPOCHS // 2, EPOCHS, resume=tmp_path / "state")
    assert same_state(resumed, straight)
    assert_deployed_as_trained(resumed, digits, tmp_path)


def test_the_score_is_no_guess(wrapped, digits):
    """A model that was not trained fails what the trained ones pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained = calibrate(wrap(network(), how("STE")), [digits[0][0]])
    assert score(finalize(untrained), digits) < 0.5
    assert np.isfinite(score(wrapped["STE"].eval(), digits))
