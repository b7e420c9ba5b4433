"""What a training loop asks of a wrapped model: groups, terms for the loss, freezing, steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe, spec, train, vectors, weights_only
from trainable_core import VariableGroup
from trainable_core.errors import InvalidArgumentError, ModelError, QuantizerStateError
from trainable_torch import (
    advance_schedules,
    exclude_from_weight_decay,
    finalize,
    freeze_quant_params,
    parameter_groups,
    regularization,
    wrap,
)
from trainable_torch.quantizers.lsq import LsqWeightsQuantizer
from trainable_torch.training import quantizers_of

COSTLY = spec("DQA", arguments={"bit_cost_weight": 0.5})


def by_name(groups):
    return {group["name"]: group for group in groups}


def names_of(qmodel, group):
    names = {parameter: name for name, parameter in qmodel.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


@pytest.mark.parametrize(
    ("training_method", "grid", "ends"),
    [
        ("LSQ", "SYMMETRIC", ("threshold",)),
        ("LSQ", "UNIFORM", ("range_min", "range_max")),
        ("DQA", "UNIFORM", ("logits",)),
    ],
)
def test_quantizers_variables_are_one_group_and_everything_else_the_other(training_method, grid, ends):
    qmodel = ready(network(), recipe(training_method, grid), images())
    groups = by_name(parameter_groups(qmodel))
    assert set(groups) == {"WEIGHTS", "QPARAMS"} == set(VariableGroup.__members__)
    assert all(name.endswith(ends) for name in names_of(qmodel, groups["QPARAMS"]))
    assert len(groups["QPARAMS"]["params"]) == 6 * len(ends)
    assert names_of(qmodel, groups["WEIGHTS"]) == {
        f"{layer}.{kind}" for layer in ("stem.conv", "body", "head") for kind in ("weight", "bias")
    }


def test_every_trainable_parameter_is_in_exactly_one_group():
    qmodel = ready(network(), recipe("LSQ"), images())
    listed = [id(parameter) for group in parameter_groups(qmodel) for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in qmodel.parameters()}


def test_a_quantizer_that_tied_weights_share_is_listed_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    groups = by_name(parameter_groups(wrap(Tied(), weights_only("LSQ"))))
    assert {name: len(group["params"]) for name, group in groups.items()} == {"WEIGHTS": 1, "QPARAMS": 1}


def test_a_method_that_learns_no_numbers_has_no_second_group():
    assert set(by_name(parameter_groups(ready(network(), recipe("STE"), images())))) == {"WEIGHTS"}


def test_frozen_weights_are_left_out():
    model = network().requires_grad_(False)
    assert set(by_name(parameter_groups(wrap(model, recipe("LSQ"))))) == {"QPARAMS"}


def test_options_go_to_their_group_and_thresholds_do_not_decay():
    qmodel = wrap(network(), recipe("LSQ"))
    groups = by_name(parameter_groups(qmodel, weights={"weight_decay": 0.1}, qparams={"lr": 1e-4}))
    assert (groups["WEIGHTS"]["weight_decay"], groups["QPARAMS"]["weight_decay"], groups["QPARAMS"]["lr"]) == (
        0.1,
        0.0,
        1e-4,
    )
    optimizer = torch.optim.AdamW(parameter_groups(qmodel, qparams={"lr": 1e-4}), lr=1e-3, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.5), (1e-4, 0.0)]
    assert by_name(parameter_groups(qmodel, qparams={"weight_decay": 0.2}))["QPARAMS"]["weight_decay"] == 0.2


def test_sgd_at_the_pace_of_the_scale_moves_the_scale_as_sgd_on_it_would():
    (x,) = (torch.linspace(-2.0, 2.0, 61)[None],)
    qmodel = ready(nn.Linear(61, 1, bias=False), {"activations": spec("LSQ", n_bits=3)}, x).train()
    (quantizer,) = quantizers_of(qmodel).values()
    grid = quantizer.current_qparams()
    codes = np.clip(np.rint(x.numpy() / grid.scale), -4, 3)
    upstream = qmodel.weight.detach().numpy()
    v = x.numpy() / grid.scale
    slope = np.where((v > -4) & (v < 3), codes - v, codes)  # LSQ, equation 3
    expected = grid.scale - 0.5 * (upstream * slope).sum() / np.sqrt(61 * 3)
    optimizer = torch.optim.SGD(parameter_groups(qmodel, qparams={"lr": 0.5}, pace="scale"), lr=0.1)
    qmodel(x).sum().backward()
    optimizer.step()
    assert abs(quantizer.current_qparams().scale - expected) < 61 * 4 * 2.0**-24 * 61  # a float32 sum of 61 terms


def test_thresholds_are_moved_out_of_the_decay_of_an_optimizer_that_knows_no_groups():
    qmodel = ready(network(), recipe("LSQ"), images())
    optimizer = torch.optim.AdamW(qmodel.parameters(), lr=0.0, weight_decay=0.5)
    exclude_from_weight_decay(optimizer, qmodel)
    decayed, kept = optimizer.param_groups
    assert all(name.endswith("threshold") for name in names_of(qmodel, kept))
    assert len(kept["params"]) == 6
    assert {key: value for key, value in decayed.items() if key not in ("params", "weight_decay")} == {
        key: value for key, value in kept.items() if key not in ("params", "weight_decay")
    }
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    exclude_from_weight_decay(optimizer, qmodel)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(decayed["params"]), 6]


def test_a_group_without_decay_takes_the_thresholds():
    qmodel = ready(network(), recipe("LSQ"), images())
    biases = [p for name, p in qmodel.named_parameters() if name.endswith("bias")]
    others = [p for name, p in qmodel.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": 0.5}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    exclude_from_weight_decay(optimizer, qmodel)  # a scheduler knows both groups, and goes on knowing them
    assert len(optimizer.param_groups) == 2
    assert sum(name.endswith("threshold") for name in names_of(qmodel, optimizer.param_groups[1])) == 6
    assert not any(name.endswith("threshold") for name in names_of(qmodel, optimizer.param_groups[0]))


def test_a_group_is_not_added_behind_a_schedulers_back():
    qmodel = ready(network(), recipe("LSQ"), images())
    optimizer = torch.optim.AdamW(qmodel.parameters(), weight_decay=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with pytest.raises(QuantizerStateError, match="scheduler"):
        exclude_from_weight_decay(optimizer, qmodel)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(qmodel.parameters()))


def test_hugging_faces_trainer_decays_no_threshold(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="its Trainer needs accelerate")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, labels=None):
            return nn.functional.cross_entropy(self.fc(x), labels), self.fc(x)

    data = [{"x": row, "labels": torch.tensor(0)} for row in vectors(8, 4)]
    qmodel = ready(Classifier(), weights_only("LSQ"))
    before = {name: q.threshold.clone() for name, q in quantizers_of(qmodel).items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        weight_decay=0.5,
        learning_rate=0.0,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(qmodel, arguments, train_dataset=data)
    exclude_from_weight_decay(trainer.create_optimizer(), qmodel)
    decayed = [group for group in trainer.optimizer.param_groups if group["weight_decay"]]
    assert {name for group in decayed for name in names_of(qmodel, group)} == {"fc.weight"}
    trainer.train()
    assert all(torch.equal(q.threshold, before[name]) for name, q in quantizers_of(qmodel).items())


@pytest.mark.parametrize("reserved", ["params", "name"])
@pytest.mark.parametrize("part", ["weights", "qparams"])
def test_options_cant_replace_the_groups_own_fields(part, reserved):
    with pytest.raises(InvalidArgumentError, match=f"{part}.*{reserved}"):
        parameter_groups(wrap(network(), recipe()), **{part: {reserved: []}})


def test_gradients_reach_every_trainable_parameter():
    for training_method in ("STE", "LSQ", "DQA"):
        qmodel = ready(network(), recipe(training_method, n_bits=3), images()).train()
        (qmodel(images()).square().mean() + regularization(qmodel)).backward()
        assert [name for name, parameter in qmodel.named_parameters() if parameter.grad is None] == []
        learned = [q for quantizer in quantizers_of(qmodel).values() for q in quantizer.parameters()]
        assert all(parameter.grad.abs().sum() > 0 for parameter in learned)


def test_regularization_is_the_sum_over_quantizers():
    qmodel = ready(network(), {"weights": COSTLY}).train()
    # widths 4, 8 and 16, equal logits: 28 / 3 bits expected, for three layers, times 0.5
    torch.testing.assert_close(regularization(qmodel), torch.tensor(3 * 0.5 * 28 / 3))
    regularization(qmodel).backward()
    assert all(quantizer.logits.grad.abs().sum() > 0 for quantizer in quantizers_of(qmodel).values())


def test_a_quantizer_that_is_switched_off_adds_no_term(monkeypatch):
    one = torch.ones(())
    monkeypatch.setattr(LsqWeightsQuantizer, "regularization", lambda _: one)
    monkeypatch.setattr(LsqWeightsQuantizer, "regularization_of", lambda *_: one)
    off = [{"match": {"name": "head"}, "weights": {"enabled": False}}]
    terms = [regularization(ready(network(), weights_only("LSQ", rules=rules))) for rules in ([], off)]
    assert [float(each) for each in terms] == [6.0, 4.0]  # of three layers, or of two: two terms each


def test_regularization_pulls_towards_fewer_bits():
    qmodel = train(ready(network(), {"weights": COSTLY}), [images()] * 5, lr=0.5)
    assert all(quantizer.selected_width == 4 for quantizer in quantizers_of(qmodel).values())
    assert all(quantizer.logits[0] > quantizer.logits[1] for quantizer in quantizers_of(qmodel).values())


@pytest.mark.parametrize("training_method", ["STE", "LSQ", "DQA"])
def test_without_a_term_regularization_is_zero_and_can_be_added(training_method):
    qmodel = ready(network(), recipe(training_method), images())
    assert regularization(qmodel).shape == ()
    assert regularization(qmodel) == 0
    (qmodel(images()).sum() + regularization(qmodel)).backward()


def test_frozen_numbers_stay_while_weights_train():
    qmodel = freeze_quant_params(ready(network(), recipe("LSQ"), images()))
    assert set(by_name(parameter_groups(qmodel))) == {"WEIGHTS"}
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    train(qmodel, [images(), images()])
    after = qmodel.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "quantizer" in name)
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_numbers_can_learn_again():
    qmodel = freeze_quant_params(ready(network(), recipe("LSQ"), images()))
    assert freeze_quant_params(qmodel, False) is qmodel
    assert set(by_name(parameter_groups(qmodel))) == {"WEIGHTS", "QPARAMS"}
    before = qmodel.head.weights_quantizers["weight"].threshold.detach().clone()
    train(qmodel, [images()])
    assert not torch.equal(before, qmodel.head.weights_quantizers["weight"].threshold)


def test_freezing_drops_stale_gradients():
    """An optimizer with momentum would go on with them."""
    qmodel = ready(network(), recipe("LSQ"), images())
    qmodel(images()).sum().backward()
    freeze_quant_params(qmodel)
    assert all(p.grad is None for q in quantizers_of(qmodel).values() for p in q.parameters())


def test_steps_can_be_counted_by_hand_when_a_part_is_trained():
    qmodel = ready(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), recipe("DQA"), vectors(5, 3)).train()
    qmodel[1](vectors(5, 3))
    assert {int(quantizer.step) for quantizer in quantizers_of(qmodel).values()} == {0}
    advance_schedules(qmodel)
    assert {int(quantizer.step) for quantizer in quantizers_of(qmodel).values()} == {1}


def test_only_the_wrapped_model_itself_counts():
    """Part of a larger module it is called as ever; its hook counts."""
    qmodel = ready(nn.Linear(3, 3), recipe("DQA"), vectors(5, 3))
    outer = nn.Sequential(qmodel, nn.ReLU()).train()
    outer(vectors(5, 3))
    assert {int(quantizer.step) for quantizer in quantizers_of(qmodel).values()} == {1}


def test_at_the_end_of_its_schedule_a_model_trains_what_is_deployed():
    schedule = {"t_start": 0, "t_end": 2, "initial_val": 1.0, "target_val": 0.1}
    how = {part: spec("DQA", arguments={"temperature": schedule}) for part in ("weights", "activations")}
    qmodel = train(ready(network(), how, images()), [images()] * 4)
    assert torch.equal(qmodel(images()), finalize(qmodel)(images()))  # in train mode


@pytest.mark.parametrize("verb", [parameter_groups, regularization, freeze_quant_params, advance_schedules])
def test_what_was_not_wrapped_is_refused(verb):
    with pytest.raises(ModelError, match="wrap"):
        verb(nn.Linear(2, 2))
