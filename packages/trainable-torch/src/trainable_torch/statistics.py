"""Statistics of batch norms that stayed in a wrapped model, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainable_core.calibration.batch_norm import SUBJECT, check_request, require_reached
from trainable_core.calibration.batches import feed
from trainable_torch.ranks import require_whole
from trainable_torch.state import state_of
from trainable_torch.training import call_with, evaluating

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return a model's batch norms with running statistics, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: module for name, module in found.items() if module.running_mean is not None}


def reestimate_batch_norm(
    qmodel: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Estimate the statistics of the model's batch norms anew, from the quantized model as it is.

    Parameters
    ----------
    qmodel : Module
        A wrapped, calibrated model with batch norms that were not folded; changed in place, and only when everything
        went well.
    batches : iterable
        What the model is called with, as for `calibrate`; some 50 batches of the size of training.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.

    Returns
    -------
    Module
        `qmodel`.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or has no batch norm with running statistics.
    CalibrationError
        When there are no batches, or they don't reach some batch norm; names it.

    Notes
    -----
    Batch norms are called as in training, everything else as in evaluation; the statistics are the averages of those of
    the batches, all of equal weight. No gradient is computed, no schedule advances, and the counters of batches stay.
    """
    state_of(qmodel)
    require_whole(qmodel, SUBJECT)
    norms = batch_norms(qmodel)
    check_request(norms, batches, forward)
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: {name: getattr(norm, name).clone() for name in _BUFFERS} for norm in norms.values()}

    def call(batch: Any) -> Any:
        if forward is not None:
            return forward(qmodel, batch)
        return call_with(qmodel, batch)

    try:
        with evaluating(qmodel), torch.no_grad():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # None: the average of all batches
            feed(batches, call, SUBJECT)
        require_reached(name for name, norm in norms.items() if not norm.num_batches_tracked)
    except BaseException:
        for norm, values in before.items():
            _put_back(norm, values)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    for norm, values in before.items():
        _put_back(norm, {"num_batches_tracked": values["num_batches_tracked"]})
    return qmodel


@torch.no_grad()
def _put_back(norm: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        norm.get_buffer(name).copy_(value)
