"""From seen values to thresholds: one pass over the batches, then all quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.batches import check_batches, feed, inputs_of, waiting_quantizers
from trainable_core.calibration.quantizers import Params, activation_params, set_all, weights_params
from trainable_core.errors import CalibrationError, QuantizerStateError
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
    if state.finalized:
        raise QuantizerStateError(type(qmodel).__name__, "it is finalized; its quantizers don't change any more")
    quantizers = [module for module in qmodel.modules() if isinstance(module, BasePytorchTrainableQuantizer)]
    waiting = waiting_quantizers(quantizers, type(qmodel).__name__, force=force)
    new: list[tuple[BasePytorchTrainableQuantizer, Params]] = []
    spec = state.recipe.calibration
    holders = {name: holder for name, holder in _holders(qmodel) if id(holder.trainable_quantizer) in waiting}
    if holders:
        observers = _observe(qmodel, holders, batches, forward, progress=progress)
        for name, holder in holders.items():
            quantizer = holder.trainable_quantizer
            assert quantizer is not None  # noqa: S101 - that is how `holders` was chosen
            new.append((quantizer, activation_params(quantizer, observers[name], spec)))
    done: set[int] = set()
    for wrapper in _wrappers(qmodel):
        for _, weight, quantizer in wrapper.get_weights_vars():
            if id(quantizer) in waiting and id(quantizer) not in done:
                done.add(id(quantizer))
                values = weight.detach().to("cpu", torch.float32).numpy()
                new.append((quantizer, weights_params(quantizer, values, spec)))
    set_all(new)
    return qmodel


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


def _holders(model: nn.Module) -> list[tuple[str, ActivationQuantizationHolder]]:
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, ActivationQuantizationHolder)
    ]


def _observe(
    qmodel: nn.Module,
    holders: Mapping[str, ActivationQuantizationHolder],
    batches: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    *,
    progress: bool | None,
) -> dict[str, Observer]:
    check_batches(batches, forward, len(holders), single=isinstance(batches, Tensor))
    observers = {name: Observer() for name in holders}
    try:
        with observing(qmodel, {holders[name]: observer for name, observer in observers.items()}):
            shown = tqdm(batches, desc="calibrate", disable=None if progress is None else not progress, leave=False)
            feed(shown, lambda batch: (forward or _call)(qmodel, batch))
    except Exception as error:
        _all_ranks(f"{type(error).__name__}: {error}")  # the others wait to hear what this one saw
        raise
    return _over_ranks(observers)


def _all_ranks(told: Any) -> list[Any]:
    """Return what every rank of a distributed job tells, in their order."""
    if world_size() == 1:
        return [told]
    answers: list[Any] = [None] * world_size()
    distributed.all_gather_object(answers, told)
    return answers


def _over_ranks(observers: dict[str, Observer]) -> dict[str, Observer]:
    """Return what all ranks of a distributed job saw together, so that every rank sets the same thresholds."""
    if world_size() == 1:
        return observers
    states = _all_ranks({name: observer.state() for name, observer in observers.items()})
    for rank, state in enumerate(states):
        if isinstance(state, str):
            raise CalibrationError("calibrate", f"rank {rank} failed with {state}")
    merged = {}
    for name in observers:
        merged[name], *others = (Observer.from_state(state[name]) for state in states)
        for other in others:
            merged[name].merge(other)
    return merged


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(inputs_of(batch))


@contextmanager
def observing(qmodel: nn.Module, observers: Mapping[ActivationQuantizationHolder, Observer]) -> Iterator[None]:
    """Let holders see and pass on what comes, with float weights, in eval mode; everything is put back afterwards."""
    wrappers = _wrappers(qmodel)
    layers = [wrapper.layer for wrapper in wrappers if isinstance(wrapper.layer, nn.Module)]  # no children of the model
    modes = {module: module.training for module in [*qmodel.modules(), *layers]}
    passing = [holder for _, holder in _holders(qmodel)]
    try:
        qmodel.eval()
        for wrapper in wrappers:
            wrapper.quantizes_weights = False
        for holder in passing:
            holder.observer = observers.get(holder, Observer())
        with torch.no_grad():
            yield
    finally:
        for holder in passing:
            holder.observer = None
        for wrapper in wrappers:
            wrapper.quantizes_weights = True
        for module, mode in modes.items():
            module.training = mode
