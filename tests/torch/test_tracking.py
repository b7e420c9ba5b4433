"""Following a training in PyTorch: bit for bit the same training, in loops of one's own and in real trainers."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe, same_state, spec
from tests.torch.test_callback import Classifier, data
from trainable_core.errors import CalibrationError, GradientMissingWarning, InvalidArgumentError, ModelError
from trainable_core.tracking.writers import read_csv
from trainable_torch import finalize, parameter_groups, track
from trainable_torch.training import quantizers_of

BATCHES = [images(8), images(5)]


class Noisy(nn.Module):
    """Draws random numbers in evaluation too, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 0.01 * torch.randn_like(x)


def model(how: Any = None) -> nn.Module:
    """Return a model with everything that looking could change: batch norm, dropout, random numbers, a counter."""
    net = network()
    net.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), Noisy())
    how = recipe("LSQ", fold_batch_norm="after") if how is None else how
    return ready(net, how, images()).train()


def loop(qmodel: nn.Module, callback: Any = None, *, steps: int = 8, late: bool = False) -> nn.Module:
    """Train; with `late`, gradients are dropped right after the step."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.05, momentum=0.9)
    classifier, batches = Classifier(qmodel), list(data())
    if callback is not None:
        callback.start()
    for step in range(steps):
        classifier(**batches[step % 4])["loss"].backward()
        optimizer.step()
        if late:
            optimizer.zero_grad()
        if callback is not None:
            callback.step_end()
        optimizer.zero_grad()
    if callback is not None:
        callback.end()
    return qmodel


def numbers(path: Path, quantity: str) -> dict[tuple[int, str], float]:
    return {(each.step, each.tensor): each.value for each in read_csv(path) if each.quantity == quantity}


@pytest.mark.parametrize("method", ["LSQ", "DQA", "TQT", "PACT"])
def test_tracking_changes_nothing_to_the_bit(tmp_path: Path, method: str) -> None:
    how = recipe("LSQ", fold_batch_norm="after")
    how["activations" if method == "PACT" else "weights"] = spec(method)
    plain, tracked = model(how), model(how)
    loop(plain)
    random = torch.get_rng_state()
    loop(tracked, track(tracked, tmp_path / "run.csv", every=2, batches=BATCHES))
    assert same_state(plain, tracked)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in tracked.modules())
    assert {step for step, _ in numbers(tmp_path / "run.csv", "low")} == {0, 2, 4, 6, 8}


def test_a_weight_that_is_computed_is_read_without_being_computed_on(tmp_path: Path) -> None:
    pairs = []
    for name in ("", "run.csv"):
        net = network()
        net.head = nn.utils.parametrizations.spectral_norm(net.head)  # its vectors move at each reading in training
        qmodel = ready(net, recipe("LSQ"), images()).train()
        callback = track(qmodel, tmp_path / name, every=1) if name else None
        pairs.append(loop(qmodel, callback, steps=3))
    assert same_state(*pairs)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_are_those_of_the_step(tmp_path: Path, late: bool) -> None:
    qmodel = model()
    twin = copy.deepcopy(qmodel)
    loop(qmodel, track(qmodel, tmp_path / "run.csv", every=1), steps=1, late=late)
    torch.manual_seed(5)
    Classifier(twin)(**next(iter(data())))["loss"].backward()
    found = numbers(tmp_path / "run.csv", "gradient")
    for quantizer in quantizers_of(twin).values():
        expected = float(quantizer.threshold.grad.double().norm())
        # a norm of a few numbers: a few roundings of float32
        assert found[1, quantizer.subject] == pytest.approx(expected, rel=1e-5)
    assert len(found) == len(quantizers_of(twin))


def test_clipped_shares_and_codes_are_those_of_the_values(tmp_path: Path) -> None:
    qmodel = ready(network(), recipe("STE"), images())
    callback = track(qmodel, tmp_path / "run.csv", batches=[images()])
    callback.start()
    seen: list[np.ndarray] = []
    qmodel.eval().head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        qmodel(images())
    quantizer = qmodel.head.input_holders["input"].activation_holder_quantizer
    grid = quantizer.current_qparams()
    high = (grid.quant_max + 0.5) * float(grid.scale)
    low = (grid.quant_min - 0.5) * float(grid.scale)
    share = np.mean((seen[0] < low) | (seen[0] > high))
    assert numbers(tmp_path / "run.csv", "clipped")[0, "head: input"] == pytest.approx(float(share))
    weight = qmodel.head.weight.detach().numpy()
    scale = qmodel.head.weights_quantizers["weight"].current_qparams().scale[:, None]
    codes = np.clip(np.rint(weight / scale), -8, 7)  # no weight lies half way between two codes
    assert numbers(tmp_path / "run.csv", "codes_used")[0, "head.weight"] == len(np.unique(codes)) / 16


def test_hooks_are_gone_in_the_end(tmp_path: Path) -> None:
    qmodel = model()
    callback = track(qmodel, tmp_path / "run.csv")
    callback.start()
    callback.start()
    hooked = [p for p in qmodel.parameters() if p._post_accumulate_grad_hooks]  # noqa: SLF001 - there is no public way to see them
    assert len(hooked) == len(quantizers_of(qmodel))
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in hooked)  # noqa: SLF001 - as above
    callback.end()
    assert not any(p._post_accumulate_grad_hooks for p in qmodel.parameters())  # noqa: SLF001 - as above


def test_a_layer_that_is_not_part_of_the_loss_is_told(tmp_path: Path) -> None:
    qmodel = model()
    callback = track(qmodel, tmp_path / "run.csv", every=1)
    callback.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            qmodel.stem(images()).square().mean().backward()
            callback.step_end()
    assert [each.category for each in caught] == [GradientMissingWarning]
    assert {"head.weight", "head: input", "body.weight", "body: input"} == set(caught[0].message.reasons)


@pytest.mark.filterwarnings("ignore")  # Lightning's own: of workers, of logging intervals, of what it imports
def test_lightning_and_the_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from lightning import LightningModule
    from lightning import Trainer as LightningTrainer
    from transformers import Trainer, TrainingArguments

    class Module(LightningModule):
        def __init__(self, qmodel: nn.Module) -> None:
            super().__init__()
            self.model = Classifier(qmodel)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(parameter_groups(self.model.qmodel), lr=0.05)

    qmodel = model()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = track(qmodel, tmp_path / "lightning.csv", every=3)
    LightningTrainer(
        max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[callback.lightning()], **options
    ).fit(Module(qmodel), data())

    qmodel = model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    callback = track(qmodel, tmp_path / "transformers.csv", every=3)
    optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.05)
    Trainer(
        model=Classifier(qmodel), args=arguments, train_dataset=list(data().dataset), optimizers=(optimizer, None),
        callbacks=[callback.transformers()],
    ).train()  # fmt: skip
    for name in ("lightning", "transformers"):
        found = numbers(tmp_path / f"{name}.csv", "gradient")
        assert {step for step, _ in numbers(tmp_path / f"{name}.csv", "low")} == {0, 3, 6, 8}
        assert {step for step, _ in found} == {3, 6}
        assert all(value > 0 for (_, tensor), value in found.items() if tensor == "head.weight")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, InvalidArgumentError),
        ({"batches": images()}, CalibrationError),
        ({"batches": iter(BATCHES)}, InvalidArgumentError),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: Any, error: type) -> None:
    with pytest.raises(error):
        track(model(), tmp_path / "run.csv", **options)


def test_models_that_do_not_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not made by"):
        track(network(), tmp_path / "run.csv")
    with pytest.raises(ModelError, match="no trainable quantizer"):
        track(finalize(model()), tmp_path / "run.csv")


def test_a_loop_that_was_broken_off_keeps_no_model_in_memory(tmp_path: Path) -> None:
    qmodel = model()
    callback = track(qmodel, tmp_path / "run.csv", every=1)
    callback.start()
    qmodel(images()).sum().backward()
    callback.step_end()  # and nobody calls `end`
    held = weakref.ref(qmodel)
    del qmodel, callback
    gc.collect()
    assert held() is None
