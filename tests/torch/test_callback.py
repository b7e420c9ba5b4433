"""One callback, in a loop of one's own and in real trainers: it freezes, estimates, logs, advances and goes on."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests.torch.models import images, network, ready, recipe, same_state, spec
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError
from trainable_torch import describe, parameter_groups, reestimate_batch_norm, training_callback
from trainable_torch.training import quantizers_of

BATCHES = [images(8), images(5)]
KEPT = recipe("LSQ", fold_batch_norm="after")
LABELS = torch.arange(32) % 3


def kept() -> nn.Module:
    return ready(network(), KEPT, images()).train()


def data() -> DataLoader[Any]:
    return DataLoader([{"x": x, "labels": y} for x, y in zip(images(32), LABELS, strict=True)], batch_size=8)


class Classifier(nn.Module):
    """A model that holds the wrapped one, with the loss first, as the Trainer wants it."""

    def __init__(self, qmodel: nn.Module) -> None:
        super().__init__()
        self.qmodel = qmodel

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.qmodel(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def loop(qmodel: nn.Module, steps: range, callback: Any) -> nn.Module:
    """Train with momentum on the batches of `data`, over and over."""
    model, optimizer = Classifier(qmodel), torch.optim.SGD(parameter_groups(qmodel), lr=0.05)
    batches = list(data())
    callback.start(steps.start)
    for step in steps:
        optimizer.zero_grad()
        model(**batches[step % 4])["loss"].backward()
        optimizer.step()
        callback.step_end()
    return qmodel


def thresholds(qmodel: nn.Module) -> list[Tensor]:
    return [q.threshold.detach().clone() for q in quantizers_of(qmodel).values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_loop_freezes_at_its_step_logs_and_estimates() -> None:
    qmodel, told = kept(), []
    callback = training_callback(qmodel, freeze_at=3, batches=BATCHES, log=told.append, log_every=2)
    loop(qmodel, range(3), callback)
    before, weight = thresholds(qmodel), qmodel.head.weight.detach().clone()
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    loop(qmodel, range(3, 5), callback)
    assert same(thresholds(qmodel), before)
    assert not torch.equal(qmodel.head.weight, weight)
    assert [sorted(each) for each in told] == [sorted(told[0])] * 2  # at steps 2 and 4
    names = [name for name in told[0] if name.startswith("head.weights")]
    assert names == ["head.weights_quantizers.weight/threshold"]
    assert told[1][names[0]] == pytest.approx(float(qmodel.head.weights_quantizers["weight"].threshold.mean()))
    expected = reestimate_batch_norm(copy.deepcopy(qmodel), BATCHES)
    callback.before_evaluation()
    assert same_state(qmodel, expected)


def test_it_advances_schedules_where_no_forward_of_the_model_does() -> None:
    qmodel = ready(network(), {"weights": spec("DQA")}, images()).train()
    callback = training_callback(qmodel)
    callback.start()
    for _ in range(3):
        qmodel.head(torch.zeros(1, 16))  # a part, called by itself
        callback.step_end()
    qmodel(images())
    callback.step_end()
    assert {q.counted_steps for q in quantizers_of(qmodel).values()} == {4}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_loop_goes_on_from_any_step(stop: int) -> None:
    straight, first = kept(), kept()
    loop(straight, range(6), training_callback(straight, freeze_at=3))
    loop(first, range(stop), training_callback(first, freeze_at=3))
    rest = kept()
    rest.load_state_dict(first.state_dict())  # which does not say what is frozen
    loop(rest, range(stop, 6), training_callback(rest, freeze_at=3))
    assert same_state(rest, straight)


@pytest.mark.filterwarnings("ignore")  # Lightning's own: of workers, of logging intervals, of what it imports
def test_lightning(tmp_path: Any) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, qmodel: nn.Module) -> None:
            super().__init__()
            self.model = Classifier(qmodel)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.model(**batch)["loss"]

        def validation_step(self, batch: Any, _: int) -> None:
            statistics.append(self.model.qmodel.stem.norm.running_mean.clone())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(parameter_groups(self.model.qmodel), lr=0.05)

    qmodel, told, statistics = kept(), [], []
    callback = training_callback(qmodel, freeze_at=6, batches=BATCHES, log=told.append, log_every=4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[callback.lightning()], **options
    )
    trainer.fit(Module(qmodel), data(), data())
    expected = loop(plain := kept(), range(4), training_callback(plain))
    assert len(told) == 2
    assert callback.step == 8
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    reestimate_batch_norm(expected, BATCHES)
    assert torch.equal(statistics[-8], expected.stem.norm.running_mean)  # in the evaluation after the first epoch
    assert torch.equal(
        reestimate_batch_norm(copy.deepcopy(qmodel), BATCHES).stem.norm.running_mean, qmodel.stem.norm.running_mean
    )


@pytest.mark.filterwarnings("ignore")  # of the Trainer: of pinned memory without an accelerator
def test_the_hugging_face_trainer(tmp_path: Any) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    qmodel, told = kept(), []
    callback = training_callback(qmodel, freeze_at=3, batches=BATCHES, log=told.append, log_every=4)
    seen: list[Tensor] = []
    qmodel.stem.norm.register_forward_pre_hook(
        lambda norm, _: seen.append(norm.running_mean.clone()) if not norm.training else None
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="no", data_seed=0,
    )  # fmt: skip
    model = Classifier(qmodel)
    rows = list(data().dataset)
    optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.05)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8], optimizers=(optimizer, None),
        callbacks=[callback.transformers()],
    )  # fmt: skip
    trainer.train()
    assert callback.step == 8
    assert len(told) == 2
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    before = qmodel.stem.norm.running_mean.clone()
    assert torch.equal(seen[-1], before)  # the last evaluation saw the statistics of the weights as they are
    assert torch.equal(reestimate_batch_norm(qmodel, BATCHES).stem.norm.running_mean, before)


# ---- thresholds that freeze one after another -----------------------------------------------------------------------

POWERS = {"method": "POWER_OF_TWO", "training_method": "TQT", "n_bits": 3, "per_channel": False}
OSCILLATING = {"weights": POWERS, "activations": {key: POWERS[key] for key in ("method", "training_method", "n_bits")}}


class Oscillating:
    """Quantizers that learn to make a model's output what the float model gives, with steps that are too long to end.

    The best threshold of one of them is between two powers of two, and its gradient leads from each to the other.
    """

    def __init__(self, **freezing: Any) -> None:
        torch.manual_seed(0)
        model, generator = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.Generator()
        self.x = torch.randn(256, 16, generator=generator.manual_seed(1))
        self.target = model(self.x).detach()
        self.qmodel = ready(model, OSCILLATING, self.x).train()
        quantizers = quantizers_of(self.qmodel)
        self.variables = [quantizer.log2_threshold for quantizer in quantizers.values()]
        self.optimizer = torch.optim.Adam(self.variables, lr=0.02)
        self.callback = training_callback(self.qmodel, **freezing)

    def train(self, steps: range) -> list[list[int]]:
        """Return the exponents of the powers of two after each step."""
        self.callback.start(steps.start)
        found = []
        for _ in steps:
            self.optimizer.zero_grad()
            (self.qmodel(self.x) - self.target).square().mean().backward()
            self.optimizer.step()
            self.callback.step_end()
            found.append([int(variable.detach().ceil()) for variable in self.variables])
        return found


def changes(found: list[list[int]]) -> int:
    return sum(one != other for one, other in pairwise(found))


def test_a_threshold_oscillates_across_a_power_of_two_until_it_is_frozen() -> None:
    free, frozen = Oscillating(), Oscillating(freeze_at=60, freeze_every=5)
    whole, first = free.train(range(140)), frozen.train(range(60))
    assert changes(whole[80:]) > 3
    assert first == whole[:60]
    states = [row.state for row in describe(frozen.qmodel).rows]
    assert sorted(states) == ["frozen"] + ["trainable"] * 3
    rest = frozen.train(range(60, 140))
    assert {row.state for row in describe(frozen.qmodel).rows} == {"frozen"}
    assert changes(rest[40:]) == 0
    order = frozen.callback.state_dict()["freezing"]["frozen"]
    assert sorted(order) == sorted(quantizers_of(frozen.qmodel))
    assert not any(variable.requires_grad for variable in frozen.variables)


@pytest.mark.parametrize("stop", [50, 58, 60, 63, 66, 75])
def test_thresholds_that_freeze_one_by_one_go_on_bit_for_bit(stop: int) -> None:
    how = {"freeze_at": 60, "freeze_every": 5}
    straight, first, rest = Oscillating(**how), Oscillating(**how), Oscillating(**how)
    straight.train(range(80))
    first.train(range(stop))
    rest.qmodel.load_state_dict(first.qmodel.state_dict())
    rest.optimizer.load_state_dict(first.optimizer.state_dict())
    rest.callback.load_state_dict(json.loads(json.dumps(first.callback.state_dict())))
    rest.train(range(stop, 80))
    assert same(rest.variables, straight.variables)
    assert rest.callback.state_dict() == straight.callback.state_dict()
    assert [v.requires_grad for v in rest.variables] == [v.requires_grad for v in straight.variables]


@pytest.mark.filterwarnings("ignore")  # as above
def test_lightning_keeps_what_is_frozen_in_its_checkpoints(tmp_path: Any) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, qmodel: nn.Module) -> None:
            super().__init__()
            self.model = Classifier(qmodel)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(parameter_groups(self.model.qmodel), lr=0.05)

    def fitted(epochs: int, path: Any = None) -> tuple[nn.Module, Any, Trainer]:
        qmodel = kept()
        callback = training_callback(qmodel, freeze_at=3, freeze_every=2)
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options["enable_checkpointing"] = False
        trainer = Trainer(
            max_epochs=epochs, default_root_dir=tmp_path, callbacks=[callback.lightning()], **options
        )  # fmt: skip
        trainer.fit(Module(qmodel), data(), ckpt_path=path)
        return qmodel, callback, trainer

    straight, whole, _ = fitted(2)
    _, cut, trainer = fitted(1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    assert len(cut.state_dict()["freezing"]["frozen"]) == 1
    rest, callback, _ = fitted(2, tmp_path / "cut.ckpt")
    assert callback.state_dict() == whole.state_dict()
    assert len(callback.state_dict()["freezing"]["frozen"]) == 3
    assert same(thresholds(rest), thresholds(straight))


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("models", [1, 2])
def test_the_hugging_face_trainer_keeps_what_is_frozen_in_its_checkpoints(
    tmp_path: Any, restore: bool, models: int
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    class Several(nn.Module):
        def __init__(self, qmodels: list[nn.Module]) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Classifier(each) for each in qmodels)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": sum(part(x=x, labels=labels)["loss"] for part in self.parts)}

    def fitted(epochs: int, path: Any = None) -> tuple[list[nn.Module], list[Any]]:
        qmodels = [kept() for _ in range(models)]
        callbacks = [training_callback(each, freeze_at=3 - place, freeze_every=2) for place, each in enumerate(qmodels)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=8, report_to=[],
            use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", save_strategy="epoch", data_seed=0,
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        model = Several(qmodels)
        groups = [group for each in qmodels for group in parameter_groups(each)]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=list(data().dataset),
            optimizers=(torch.optim.SGD(groups, lr=0.05), None), callbacks=[each.transformers() for each in callbacks],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=path)
        return qmodels, callbacks

    straight, whole = fitted(2)
    rest, callbacks = fitted(2, str(tmp_path / "checkpoint-4"))
    for place in range(models):
        assert callbacks[place].state_dict() == whole[place].state_dict()
        assert len(callbacks[place].state_dict()["freezing"]["frozen"]) == 3 + place
        assert same(thresholds(rest[place]), thresholds(straight[place]))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"freeze_at": -1}, InvalidArgumentError, "freeze_at"),
        ({"freeze_at": 1.5}, InvalidArgumentError, "freeze_at"),
        ({"freeze_every": 50}, InvalidArgumentError, "give freeze_at too"),
        ({"freeze_at": 9, "freeze_every": 0}, InvalidArgumentError, "freeze_every"),
        ({"log_every": 0}, InvalidArgumentError, "log_every"),
        ({"log": "wandb"}, InvalidArgumentError, "log must be callable"),
        ({"batches": iter(BATCHES)}, InvalidArgumentError, "read only once"),
        ({"batches": images()}, CalibrationError, r"pass \[batch\]"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        training_callback(kept(), **options)


def test_models_it_can_do_nothing_for_are_refused() -> None:
    with pytest.raises(ModelError, match="not made by"):
        training_callback(network())
    with pytest.raises(ModelError, match="fold_batch_norm: after"):
        training_callback(ready(network(), recipe("LSQ"), images()), batches=BATCHES)
