"""From seen values to thresholds: what core's calibration loop needs of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.errors import CalibrationError
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole, world_size
from trainable_torch.wrapper import QuantizationWrapper
from trainable_torch.wrapping import state_of


def calibrate(
    qmodel: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Set the thresholds of a wrapped model from its weights and from what its activations look like.

    Parameters
    ----------
    qmodel : Module
        What `wrap` returned; changed in place, and only when everything went well.
    batches : iterable, optional
        What the model is called with; needed when activations are quantized. A mapping is passed as keyword arguments,
        of a tuple or list only the first item (a loader's inputs without its labels), anything else as it is.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    force : bool
        Overwrite thresholds that are already set, trained ones included.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Module
        `qmodel`.

    Raises
    ------
    ModelError
        When the model is not wrapped, or sharded over ranks: calibrate before ``fully_shard``.
    QuantizerStateError
        When every quantizer has its numbers and `force` is false, or when the model is finalized.
    CalibrationError
        When there are no batches, a quantized tensor was never seen, values are not finite, or another rank failed.

    Notes
    -----
    Activations are seen in eval mode, without gradients, with float weights. Quantizers that already have numbers
    (from a config, or from a former calibration) keep them unless forced. Tied weights share one quantizer; it is
    calibrated once. In a distributed job every rank sees its own batches and sets the thresholds of all of them
    together.
    """
    state = state_of(qmodel)
    require_whole(qmodel, "calibrate")
    _leave_meta(qmodel)
    TorchCalibration(qmodel, state).run(
        batches,
        forward,
        force=force,
        show_progress=lambda shown: tqdm(
            shown, desc="calibrate", disable=None if progress is None else not progress, leave=False
        ),
    )
    return qmodel


class TorchCalibration(ModelCalibration):
    """What core's loop asks of PyTorch."""

    model: nn.Module

    def quantizers(self) -> list[BasePytorchTrainableQuantizer]:
        """Return the model's trainable quantizers."""
        return [module for module in self.model.modules() if isinstance(module, BasePytorchTrainableQuantizer)]

    def holders(self) -> list[ActivationQuantizationHolder]:
        """Return the model's holders."""
        return [module for module in self.model.modules() if isinstance(module, ActivationQuantizationHolder)]

    def weights(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield each quantized weight with its quantizer."""
        for wrapper in _wrappers(self.model):
            with torch.no_grad():
                wrapper.compute_weights()
            for _, weight, quantizer in wrapper.get_weights_vars():
                yield weight, quantizer

    def to_numpy(self, weight: Tensor) -> NDArray[Any]:
        """Return a weight's values."""
        values: NDArray[Any] = weight.detach().to("cpu", torch.float32).numpy()
        return values

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return isinstance(batches, Tensor)

    def call(self, batch: Any) -> Any:
        """Call the model with a batch: a mapping is its keyword arguments."""
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(inputs_of(batch))

    def observe(self, holders: Sequence[Any], batches: Iterable[Any], call: Callable[[Any], Any]) -> Sequence[Observer]:
        """Return what each holder sees on all ranks of a distributed job together."""
        try:
            observers = super().observe(holders, batches, call)
        except Exception as error:
            _all_ranks(f"{type(error).__name__}: {error}")  # the others wait to hear what this one saw
            raise
        return _over_ranks(observers)

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer]) -> Iterator[None]:
        """Let the holders show what reaches them to the observers, in eval mode and with float weights."""
        wrappers = _wrappers(self.model)
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            for wrapper in wrappers:
                wrapper.quantizes_weights = False
            for holder, observer in observers.items():
                holder.observer = observer
            with torch.no_grad():
                yield
        finally:
            for holder in observers:
                holder.observer = None
            for wrapper in wrappers:
                wrapper.quantizes_weights = True
            for module, mode in modes.items():
                module.training = mode


def _leave_meta(qmodel: nn.Module) -> None:
    """Give quantizers that were made on the meta device the variables of a new one, where the weights are by now."""
    quantizers = [m for m in qmodel.modules() if isinstance(m, BasePytorchTrainableQuantizer)]
    empty = [q for q in quantizers if any(variable.is_meta for variable in _variables(q))]
    own = {id(variable) for q in empty for variable in q.parameters()}
    others = [(name, parameter) for name, parameter in qmodel.named_parameters() if id(parameter) not in own]
    for name, parameter in others:
        if parameter.is_meta:
            hint = "load or initialize the weights first."
            raise CalibrationError("calibrate", f"{name!r} is on the meta device and has no values", hint)
    shapes = {q: tuple(weight.shape) for wrapper in _wrappers(qmodel) for _, weight, q in wrapper.get_weights_vars()}
    with others[0][1].device if others else torch.device("cpu"):
        for quantizer in empty:
            config, arguments = quantizer.quantization_config, quantizer.get_arguments()
            new = type(quantizer)(config, quantizer.freeze_quant_params, **arguments)
            new.initialize_quantization(shapes.get(quantizer), quantizer.subject, None)
            quantizer.load_state_dict(new.state_dict(), assign=True)


def _variables(quantizer: BasePytorchTrainableQuantizer) -> list[Tensor]:
    return [quantizer.get_quantizer_variable(name) for name in quantizer.variable_names]


def _wrappers(model: nn.Module) -> list[QuantizationWrapper]:
    return [module for module in model.modules() if isinstance(module, QuantizationWrapper)]


def _all_ranks(told: Any) -> list[Any]:
    """Return what every rank of a distributed job tells, in their order."""
    if world_size() == 1:
        return [told]
    answers: list[Any] = [None] * world_size()
    distributed.all_gather_object(answers, told)
    return answers


def _over_ranks(observers: Sequence[Observer]) -> Sequence[Observer]:
    """Return what all ranks of a distributed job saw together, so that every rank sets the same thresholds."""
    if world_size() == 1:
        return observers
    states = _all_ranks([observer.state() for observer in observers])
    for rank, state in enumerate(states):
        if isinstance(state, str):
            raise CalibrationError("calibrate", f"rank {rank} failed with {state}")
    merged = []
    for seen in zip(*states, strict=True):
        first, *others = map(Observer.from_state, seen)
        for other in others:
            first.merge(other)
        merged.append(first)
    return merged
