"""Batch norms that are simulated as folded while a model trains; defined by `trainable_core.reference.batch_norm`.

A quantized layer does the work of the batch norm behind it: its weight is multiplied by the batch norm's gain before it
is quantized, and its output is normalized. The batch norm stays at its place with its parameters and statistics, and
passes on what it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from trainable_core.calibration.batch_norm import require_several
from trainable_core.errors import QuantizerStateError
from trainable_torch.kernels import eligible
from trainable_torch.layer_class import Reads, become

Call = Callable[[Mapping[str, Tensor]], Tensor]
"""Calls a layer with some values in the place of its weight and bias."""


class SimulatedBatchNorm(Reads, nn.Identity):
    """A batch norm whose work the quantized layer before it does; it passes on what it is given.

    It is an instance of its own class as well. In training mode batches are normalized by their own statistics; with
    `statistics_frozen`, it stays in evaluation mode whatever the model does.
    """

    statistics_frozen = False

    def train(self, mode: bool = True) -> SimulatedBatchNorm:  # noqa: FBT001, FBT002 - PyTorch's signature
        """Set the mode, which decides whose statistics normalize; frozen ones stay."""
        super().train(mode and not self.statistics_frozen)
        return self

    @property
    def qconfig(self) -> Any:
        """Refuse ``convert_sync_batchnorm``, which asks for it: another module would normalize a second time.

        Raises
        ------
        QuantizerStateError
            When it is asked for there.
        AttributeError
            Always otherwise: there is none.
        """
        frame: Any = sys._getframe(1)  # noqa: SLF001 - nothing else tells who asks
        if frame.f_code.co_name == "convert_sync_batchnorm":
            problem = "its folding into the layer before it is simulated, and another module can't take its place"
            raise QuantizerStateError(type(self).own_class.__name__, problem, "convert the model before wrapping it.")
        raise AttributeError("qconfig")

    def freeze_statistics(self, frozen: bool) -> None:  # noqa: FBT001 - reads as a fact
        """Let running statistics normalize in training too; or no longer, from the next call of ``train`` on."""
        self.__dict__["statistics_frozen"] = frozen
        self.training = self.training and not frozen


def simulate(norm: nn.Module) -> None:
    """Let a batch norm pass on what it is given, because the layer before it is going to do its work.

    Raises
    ------
    ModelError
        When Python can't make such a class of the batch norm's.
    """
    become(norm, SimulatedBatchNorm, ())


def take_back(norm: Any) -> None:
    """Let a simulated batch norm be what it was."""
    object.__setattr__(norm, "__class__", type(norm).own_class)


def simulated_batch_norms(model: nn.Module) -> dict[str, SimulatedBatchNorm]:
    """Return a model's batch norms whose folding is simulated, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SimulatedBatchNorm)}


# ---- the arithmetic, in float32 whatever the dtypes are --------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _deviation(norm: Any) -> Tensor:
    """Return ``sigma`` of the running statistics, as a constant."""
    deviation: Tensor = (_wide(norm.running_var.detach()) + norm.eps).sqrt()
    return deviation


def _gain(norm: Any) -> Tensor:
    deviation = _deviation(norm)
    return deviation.reciprocal() if norm.weight is None else _wide(norm.weight) / deviation


def folded_weight(layer: Any, norm: Any, weight: Tensor) -> Tensor:
    """Return a layer's weight as it is quantized, and deployed: multiplied by the gain of each output channel.

    Parameters
    ----------
    layer : Module
        A convolution or linear layer of PyTorch's, or of a subclass.
    norm : Module
        The batch norm behind it.
    weight : Tensor
        The layer's float weight.

    Returns
    -------
    Tensor, shape and dtype of `weight`
    """
    gain = _gain(norm)
    folded: Tensor
    if getattr(layer, "transposed", False):  # (in, out / groups, ...): group g has rows and gains of its own
        groups = layer.groups
        rows = _wide(weight).unflatten(0, (groups, -1))
        folded = (rows * gain.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        folded = _wide(weight) * gain.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype)


def folded_bias(norm: Any, bias: Tensor) -> Tensor:
    """Return the bias that a layer is deployed with, in its own dtype; of running statistics.

    Parameters
    ----------
    norm : Module
        The batch norm behind the layer.
    bias : Tensor, shape (C,)
        The layer's own bias.
    """
    found = (_wide(bias) - _wide(norm.running_mean)) * _gain(norm)
    found = found if norm.bias is None else found + _wide(norm.bias)
    return found.to(bias.dtype)


class Batch:
    """A batch in training: its statistics, by which a layer's products with its quantized weight are normalized.

    Parameters
    ----------
    norm : Module
        The batch norm; its running statistics take in those of the batch.
    products : Tensor
        The layer's products with its float weight, without a bias.
    axis : int
        That of the channels, counted from the end.
    bias : Tensor, shape (C,)
        The layer's own bias.

    Raises
    ------
    ShapeMismatchError
        When the batch has one value of each channel.
    """

    def __init__(self, norm: Any, products: Tensor, axis: int, bias: Tensor) -> None:
        self.norm, self.bias = norm, _wide(bias)
        rows = _wide(products).movedim(axis, -1)
        self._shape = (-1, *[1] * (-axis - 1))
        rows = rows.reshape(-1, rows.shape[-1])
        count = rows.shape[0]
        if _is_synchronized(norm):
            sums = [rows.sum(0), rows.new_full((1,), count)]
            total = all_reduce(torch.cat(sums), group=norm.process_group)
            several = total[-1]
            self.mean = total[:-1] / several
            squares = all_reduce((rows - self.mean).square().sum(0), group=norm.process_group)
            self.variance = squares / several
        else:
            require_several(count)
            several = rows.new_full((), count)
            self.variance, self.mean = torch.var_mean(rows, 0, correction=0)
        if not eligible.is_in_backward():  # activation checkpointing calls a forward again
            with torch.no_grad():
                self._update(several)

    def _update(self, count: Tensor) -> None:
        norm = self.norm
        if not norm.track_running_stats:
            return
        share: Any = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            share = norm.num_batches_tracked.float().reciprocal() if share is None else share
        share = 0.0 if share is None else share
        unbiased = self.variance * (count / (count - 1))
        for running, found in ((norm.running_mean, self.mean + self.bias), (norm.running_var, unbiased)):
            running.mul_(1 - share).add_((share * found).to(running.dtype))

    def normalized(self, products: Tensor, on_grid: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the layer's output.

        Parameters
        ----------
        products : Tensor
            Its products with the folded, quantized weight, without a bias.
        on_grid : callable
            What puts an integer bias on its grid.

        Returns
        -------
        Tensor, shape and dtype of `products`
        """
        norm = self.norm
        deviation = (self.variance + norm.eps).sqrt()
        running = _deviation(norm)
        bias = (self.bias * 0 - self.mean) * _gain(norm)  # its own bias cancels, and gets a gradient of 0
        if norm.bias is not None:
            bias = bias + _wide(norm.bias) * (deviation / running)
        added = _wide(products) + on_grid(bias).reshape(self._shape)
        outputs: Tensor = (added * (running / deviation).reshape(self._shape)).to(products.dtype)
        return outputs


def _is_synchronized(norm: Any) -> bool:
    """Return whether a batch norm has the statistics of all ranks' batches."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size(norm.process_group or dist.group.WORLD) > 1
