"""Two gloo processes, one model: replicated or sharded, it learns what one process learns from the whole batches."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn

from tests.torch.jobs import ACCUMULATED, CASES, SHARDED, STEPS, alone, calibrated, work
from tests.torch.models import images, ready, recipe
from trainable_core.reference import lsq
from trainable_torch import average_scalar_gradients, finalize, wrap
from trainable_torch.quantizers.lsq import LsqActivationQuantizer
from trainable_torch.ranks import is_sharded, world_size
from trainable_torch.training import quantizers_of

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch was built without gloo")

TERMS = 8 * 36  # what a gradient sums at most: the elements of a batch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("job")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_learned_alike(case, end):
    """Compare a job's end with one process's, measured by how far training moved each tensor.

    A gradient is a sum over the batch, here of two halves: another order of at most `TERMS` float32 terms. Those of
    attention logits are differences of two such sums, 4-bit values against 8-bit ones, of 1/16 their size.
    """
    start, qmodel = alone(case)
    before = start.state_dict()
    order = TERMS * 2.0**-24 * (16 if case[0] == "DQA" else 1)
    for name, value in qmodel.state_dict().items():
        if not value.is_floating_point():
            assert torch.equal(value, end[name])
            continue
        moved = (value - before[name]).abs().max()
        assert moved > 0 or "quantizer" in name, name
        torch.testing.assert_close(end[name], value, rtol=STEPS * 2.0**-24, atol=float(STEPS * order * moved))


@every(CASES)
def test_replicas_learn_the_weights_and_thresholds_of_one_process(case, ranks):
    one, other = (rank["replicated"][case] for rank in ranks)
    assert_same(one["start"], other["start"])
    assert_same(one["start"], alone(case)[0].state_dict())  # together they saw what one process sees
    assert_same(one["end"], other["end"])
    assert torch.equal(one["output"], other["output"])
    assert_learned_alike(case, one["end"])


def test_the_comparison_sees_an_n_of_one_rank(ranks, monkeypatch):
    """The count of one rank's elements moves activation thresholds by a factor of sqrt(2)."""
    monkeypatch.setattr(LsqActivationQuantizer, "ranks", 2)  # makes the lone process learn by another N
    case = ("LSQ", "SYMMETRIC", True)
    with pytest.raises(AssertionError, match="not close"):
        assert_learned_alike(case, ranks[0]["replicated"][case]["end"])


def test_gradients_accumulate_over_the_micro_batches_of_every_rank(ranks):
    gradients, others = (rank["accumulated"] for rank in ranks)
    assert_same(gradients, others)
    qmodel = calibrated(ACCUMULATED)
    halves = [half.chunk(2) for half in images(8).chunk(2)]
    for micro in zip(*halves, strict=True):
        (qmodel(torch.cat(micro)).square().mean() / 2).backward()
    for name, parameter in qmodel.named_parameters():
        # sums of at most TERMS float32 terms in another order
        bound = TERMS * 2.0**-24
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=bound, atol=bound * parameter.grad.abs().max())


def test_ranks_with_batches_of_other_sizes_and_numbers_stay_one_model(ranks):
    one, other = (rank["uneven"] for rank in ranks)
    assert_same(one, other)
    assert all(value.isfinite().all() for value in one.values())


def test_a_rank_that_fails_to_calibrate_fails_on_every_rank_and_sets_nothing(ranks):
    one, other = (rank["failing"] for rank in ranks)
    assert other["told"] == "OSError: the disk is gone"
    assert one["told"] == "CalibrationError: calibrate: rank 1 failed with OSError: the disk is gone"
    for rank in (one, other):
        assert rank["same"]
        assert not any(rank["calibrated"])


def test_a_compiled_rank_has_the_same_gradients(ranks):
    for rank in ranks:
        assert all(torch.equal(eager, compiled) for eager, compiled in rank["compiled"].values())


@every(SHARDED)
def test_shards_learn_what_one_process_learns(case, ranks):
    one, other = (rank["sharded"][case] for rank in ranks)
    assert_same(one["end"], other["end"])
    assert_learned_alike(case, one["end"])
    assert any(part != other["parts"][name] for name, part in one["parts"].items())  # three rows on two ranks


@every(SHARDED)
def test_a_sharded_checkpoint_resumes_bit_for_bit(case, ranks):
    for rank in ranks:
        assert_same(rank["sharded"][case]["end"], rank["sharded"][case]["resumed"])


@every(SHARDED)
def test_a_sharded_state_goes_into_whole_and_sharded_models(case, ranks):
    sharded, broadcast, deployed = ranks[0]["sharded"][case]["outputs"]
    assert torch.equal(broadcast, sharded)
    assert torch.equal(deployed, sharded)
    for one, other in zip(*(rank["sharded"][case]["outputs"] for rank in ranks), strict=True):
        assert torch.equal(one, other)


def test_verbs_that_need_the_whole_model_refuse_a_part_of_it(ranks):
    for rank in ranks:
        refused = rank["sharded"][SHARDED[0]]["refused"]
        assert refused.keys() == {"finalize", "describe", "save", "calibrate"}
        for verb, told in refused.items():
            assert verb in told
            assert "conv.weight" in told
            assert "full_state_dict" in told


# ---- one process ----------------------------------------------------------------------------------------------------


def test_one_process_is_a_world_of_one():
    assert world_size() == 1
    assert not is_sharded(torch.ones(3))


def test_scalars_are_what_has_no_dimension_and_alone_they_are_left_as_they_are():
    qmodel = ready(nn.Linear(36, 3), recipe("LSQ"), images().flatten(1))
    scalars = average_scalar_gradients(qmodel)
    per_tensor, per_channel = sorted((q.threshold for q in quantizers_of(qmodel).values()), key=torch.Tensor.dim)
    assert scalars == {per_tensor} != {per_channel}
    qmodel(images().flatten(1)).square().mean().backward()
    assert all(parameter.grad.abs() > 0 for parameter in scalars)
    assert average_scalar_gradients(wrap(nn.Linear(36, 3), recipe("STE"))) == set()
    finalize(qmodel)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_number_of_ranks_enters_the_gradient_as_the_paper_has_it(count):
    """N counts `count` batches: the threshold's gradient shrinks by its root, the input's does not change."""
    gradients = []
    for ranks in (None, count):
        qmodel = ready(nn.Linear(36, 3), recipe("LSQ"), images().flatten(1)).double()
        holder = qmodel.input_holders["input"].activation_holder_quantizer
        holder.ranks = ranks
        x = images().flatten(1).double().requires_grad_()
        holder(x).square().sum().backward()
        gradients.append((holder.threshold.grad, x.grad))
    (alone, d_alone), (together, d_together) = gradients
    assert torch.equal(d_alone, d_together)
    ratio = lsq.gradient_scale(count * 8 * 36, 7) / lsq.gradient_scale(8 * 36, 7)
    torch.testing.assert_close(together, alone * ratio, rtol=4 * 2.0**-24, atol=0)  # two roundings on either side
