"""What each rank of a job of two processes does for `test_distributed`; one job runs all of it, imports cost most."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.torch.models import GRIDS, TRAINED_BY, images, spec
from trainable_core.errors import CalibrationError, ModelError
from trainable_torch import (
    average_scalar_gradients,
    calibrate,
    describe,
    finalize,
    kernels,
    parameter_groups,
    regularization,
    save,
    wrap,
)
from trainable_torch.kernels import native
from trainable_torch.training import quantizers_of
from trainable_torch.wrapper import QuantizationWrapper

STEPS = 3
SHORT = {"t_start": 0, "t_end": 8, "initial_val": 1.0, "target_val": 0.1}
MINMAX = {"weights": "minmax", "activations": "minmax"}
CASES = [(method, grid, per_channel) for method in TRAINED_BY for grid in GRIDS for per_channel in (False, True)]

ACCUMULATED = ("LSQ", "SYMMETRIC", False)
SHARDED = [
    ("LSQ", "SYMMETRIC", False),
    ("LSQ", "UNIFORM", True),
    ("DQA", "SYMMETRIC", True),
    ("STE", "SYMMETRIC", True),
]


def how(training_method: str, grid: str, *, per_channel: bool) -> dict[str, Any]:
    """Return a recipe whose schedules outlast the training."""
    more = {"arguments": {"temperature": SHORT}, "candidates": [4, 8]} if training_method == "DQA" else {}
    one = spec(training_method, grid, **more)
    weights = {**one, "per_channel": per_channel}
    return {"weights": weights, "activations": one, "calibration": MINMAX}


class Small(nn.Module):
    """Two kinds of layers and a functional activation, for images of shape (1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 2, 3, stride=3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return three numbers per image."""
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def optimizer_of(qmodel: nn.Module) -> torch.optim.Optimizer:
    """Return gradient descent with momentum, whose state goes into checkpoints."""
    return torch.optim.SGD(parameter_groups(qmodel), lr=0.05, momentum=0.5)


def step(qmodel: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Take one step of gradient descent, calling the model through `called`."""
    optimizer.zero_grad()
    (called(x).square().mean() + regularization(qmodel)).backward()
    optimizer.step()


def alone(case: tuple[str, str, bool]) -> tuple[nn.Module, nn.Module]:
    """Return the model that one process calibrates and trains on the whole batches: at the start, and trained."""
    qmodel = calibrated(case)
    start, optimizer = copy.deepcopy(qmodel), optimizer_of(qmodel)
    for _ in range(STEPS):
        step(qmodel, qmodel, optimizer, images(8))
    return start, qmodel


def calibrated(case: tuple[str, str, bool], rank: int | None = None) -> nn.Module:
    """Return the model that two ranks calibrate together on their halves, or a lone process on the whole."""
    training_method, grid, per_channel = case
    qmodel = wrap(Small(), how(training_method, grid, per_channel=per_channel))
    return calibrate(qmodel, [images(8) if rank is None else images(8).chunk(2)[rank]]).train()


def replicated(case: tuple[str, str, bool], rank: int) -> dict[str, Any]:
    """Train with DistributedDataParallel."""
    qmodel = calibrated(case, rank)
    start = copy.deepcopy(qmodel.state_dict())
    parallel, optimizer = DistributedDataParallel(qmodel), optimizer_of(qmodel)
    for _ in range(STEPS):
        step(qmodel, parallel, optimizer, images(8).chunk(2)[rank])
    return {"start": start, "end": qmodel.state_dict(), "output": finalize(qmodel)(images())}


def accumulated(rank: int) -> dict[str, Any]:
    """Return the gradients that two micro-batches of each rank leave."""
    qmodel = calibrated(ACCUMULATED, rank)
    parallel = DistributedDataParallel(qmodel)
    first, second = images(8).chunk(2)[rank].chunk(2)
    with parallel.no_sync():
        (parallel(first).square().mean() / 2).backward()
    (parallel(second).square().mean() / 2).backward()
    return {name: parameter.grad for name, parameter in qmodel.named_parameters()}


def uneven(rank: int) -> dict[str, Any]:
    """Train on batches of different sizes, of which one rank has fewer."""
    qmodel = wrap(Small(), how("LSQ", "UNIFORM", per_channel=True))
    calibrate(qmodel, [images(5)] * (1 + rank)).train()
    parallel, optimizer = DistributedDataParallel(qmodel), optimizer_of(qmodel)
    with Join([parallel]):
        for count in (4, 5, 6)[: 3 - rank]:
            step(qmodel, parallel, optimizer, images(count + rank))
    return qmodel.state_dict()


def compiled(rank: int) -> dict[str, Any]:
    """Return the gradients of an eager model, whose sums are PyTorch's own, and of a compiled one."""
    eager = calibrated(("LSQ", "SYMMETRIC", False), rank)
    other = copy.deepcopy(eager)
    fast = torch.compile(other, fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "call_layer", lambda *_, **__: None)
        patch.setattr(native, "compiled", lambda: None)
        for model in (eager, fast):
            model(images()).square().mean().backward()
    return {
        name: [dict(model.named_parameters())[name].grad for model in (eager, other)]
        for name, _ in eager.named_parameters()
    }


def failing(rank: int) -> dict[str, Any]:
    """Calibrate on batches that break off on rank 1."""

    def batches() -> Any:
        yield images()
        if rank == 1:
            message = "the disk is gone"
            raise OSError(message)

    qmodel = wrap(Small(), how("LSQ", "SYMMETRIC", per_channel=True))
    before = copy.deepcopy(qmodel.state_dict())
    try:
        calibrate(qmodel, batches())
    except (CalibrationError, OSError) as error:
        told = f"{type(error).__name__}: {error}"
    same = all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in qmodel.state_dict().items())
    return {"told": told, "same": same, "calibrated": [q.calibrated for q in quantizers_of(qmodel).values()]}


def shard(qmodel: nn.Module) -> nn.Module:
    """Return the model sharded layer by layer."""
    mesh = init_device_mesh("cpu", (2,))
    scalars = average_scalar_gradients(qmodel)
    for module in list(qmodel.modules()):
        if isinstance(module, QuantizationWrapper):
            fully_shard(module, mesh=mesh, ignored_params=scalars)
    fully_shard(qmodel, mesh=mesh, ignored_params=scalars)
    return qmodel


def refusals(qmodel: nn.Module, folder: Path) -> dict[str, str]:
    """Return what the verbs that need the whole model say of a sharded one."""
    verbs = {
        "finalize": lambda: finalize(qmodel),
        "describe": lambda: describe(qmodel),
        "save": lambda: save(qmodel, folder / "refused"),
        "calibrate": lambda: calibrate(qmodel, [images()], force=True),
    }
    told = {}
    for verb, call in verbs.items():
        try:
            call()
        except ModelError as error:
            told[verb] = str(error)
    return told


def sharded(case: tuple[str, str, bool], rank: int, folder: Path) -> dict[str, Any]:
    """Train with `fully_shard`; stop after two steps, write a checkpoint, and go on from it in a fresh model."""
    mine = images(8).chunk(2)[rank]
    qmodel = shard(calibrated(case, rank))
    assert isinstance(qmodel, FSDPModule)
    optimizer = optimizer_of(qmodel)
    for _ in range(STEPS - 1):
        step(qmodel, qmodel, optimizer, mine)
    model_state, optimizer_state = get_state_dict(qmodel, optimizer)
    name = folder / "-".join(map(str, case))
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=name)

    other = shard(calibrated(case, rank))
    other_optimizer = optimizer_of(other)
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    states = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(states, checkpoint_id=name)
    set_state_dict(other, other_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for model, its_optimizer in ((qmodel, optimizer), (other, other_optimizer)):
        step(model, model, its_optimizer, mine)
    whole = StateDictOptions(full_state_dict=True)
    end, resumed = (get_model_state_dict(model, options=whole) for model in (qmodel, other))

    # from rank 0 to all ranks, into a model that nothing was calibrated in
    training_method, grid, per_channel = case
    fresh = shard(wrap(Small(), how(training_method, grid, per_channel=per_channel)).train())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, copy.deepcopy(end) if rank == 0 else {}, options=options)
    unsharded = wrap(Small(), how(training_method, grid, per_channel=per_channel))
    unsharded.load_state_dict(end)
    qmodel.eval()
    fresh.eval()
    return {
        "end": end,
        "resumed": resumed,
        "outputs": [model(images()).detach() for model in (qmodel, fresh, finalize(unsharded))],
        "parts": {name: tuple(value.to_local().shape) for name, value in qmodel.named_parameters() if value.dim()},
        "refused": refusals(qmodel, folder),
    }


def work(rank: int, port: int, folder: str) -> None:
    """Do it all, and write down what this rank ends with."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    place = Path(folder)
    try:
        results = {
            "replicated": {case: replicated(case, rank) for case in CASES},
            "accumulated": accumulated(rank),
            "uneven": uneven(rank),
            "failing": failing(rank),
            "sharded": {case: sharded(case, rank, place) for case in SHARDED},
            "compiled": compiled(rank),
        }
        torch.save(results, place / str(rank))
    finally:
        distributed.destroy_process_group()
