"""Roundings learned layer by layer against the float model; see `trainable_core.reference.adaround`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.reconstruction import SUBJECT, ReconstructedLayer, Reconstruction, check_request
from trainable_core.calibration.batches import inputs_of
from trainable_core.errors import ModelError
from trainable_core.reference import adaround
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.adaround import AdaroundQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.state import state_of
from trainable_torch.training import evaluating, quantizers_of
from trainable_torch.wrapper import QuantizationWrapper

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def reconstruct(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    learning_rate: float = 0.01,
    progress: bool | None = None,
) -> Reconstruction:
    """Learn the roundings of a model's weights layer by layer, against what the float model's layers give.

    Parameters
    ----------
    qmodel : Module
        A wrapped, calibrated model with weights of training method ADAROUND; these are changed in place.
    batches : iterable
        What the model is called with, as for `calibrate`; some hundred inputs without labels. All are kept in memory,
        with the inputs and outputs of one layer at a time.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    learning_rate : float
        Of Adam.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Reconstruction
        The distances of each layer's outputs from the float model's, before and after; prints as a table.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or has no weights of training method ADAROUND; or when the
        batches don't reach such a layer.
    QuantizerStateError
        When a quantizer has no numbers yet.
    CalibrationError
        When there are no batches.

    Notes
    -----
    Layers are taken in the order in which they are called. Each learns on the inputs that it has behind the quantized
    layers before it, and is to give what it gives in the float model (Nagel et al. 2020, equation 25), for as many
    steps as the schedule of its method lasts, a batch at each. The loss is the squared distance, summed over channels
    and averaged over the rest, and the regularizer. Everything else is in evaluation mode, and stays as it is.
    """
    state_of(qmodel)
    require_whole(qmodel, SUBJECT)
    layers = {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantizationWrapper) and _learners(module)
    }
    listed = check_request(layers, batches, forward, single=isinstance(batches, Tensor))
    require_calibrated(quantizers_of(qmodel).values(), type(qmodel).__name__, "trainable_torch")

    def run() -> None:
        with torch.no_grad():
            for batch in listed:
                if forward is not None:
                    forward(qmodel, batch)
                else:
                    qmodel(**batch) if isinstance(batch, Mapping) else qmodel(inputs_of(batch))

    with evaluating(qmodel):
        with _order(layers) as order:
            run()
        missed = [name or "model" for name in layers if name not in order]
        if missed:
            raise ModelError(f"{SUBJECT}: no batch reached {', '.join(missed)}")
        rows, done = [], set[int]()
        for name in tqdm(order, desc=SUBJECT, disable=None if progress is None else not progress, leave=False):
            layer = layers[name]
            learners = [each for each in _learners(layer) if id(each) not in done]
            done |= {id(each) for each in learners}
            rows.append(_learn(name, layer, learners, run, qmodel, learning_rate))
    return Reconstruction(tuple(rows))


def _learners(wrapper: QuantizationWrapper) -> list[AdaroundQuantizer]:
    quantizers = (quantizer for quantizer in wrapper.weights_quantizers.values())
    return [q for q in quantizers if isinstance(q, AdaroundQuantizer) and q.quantization_config.enabled]


def _learn(
    name: str,
    layer: Any,
    learners: list[AdaroundQuantizer],
    run: Callable[[], None],
    qmodel: nn.Module,
    learning_rate: float,
) -> ReconstructedLayer:
    """Let the roundings of one layer learn; return what became of its outputs."""
    for quantizer in learners:
        quantizer.assign(quantizer.rounding, quantizer.to_numpy(torch.zeros_like(quantizer.rounding)))
        quantizer.counted_steps = 0
    with _float(qmodel), _calls(layer) as told:
        run()
    targets = [output for _, output in told]
    with _calls(layer) as told:
        run()
    inputs = [arguments for arguments, _ in told]
    nearest = _distance(layer, inputs, targets)
    roundings = [quantizer.rounding for quantizer in learners if quantizer.rounding.requires_grad]
    if not roundings:
        return ReconstructedLayer(name or "model", nearest, nearest)
    optimizer = torch.optim.Adam(roundings, lr=learning_rate)
    layer.training = True
    try:
        for step in range(max(adaround.schedule_end(quantizer.beta) for quantizer in learners)):
            for quantizer in learners:
                quantizer.advance()
            (args, kwargs), target = inputs[step % len(inputs)], targets[step % len(inputs)]
            with torch.enable_grad():
                output = _first(layer(*args, **kwargs))
                loss = (output - target).float().square().mean() * _channels(layer)
                for _, weight, quantizer in layer.get_weights_vars():
                    term = quantizer.regularization_of(weight.float()) if quantizer in learners else None
                    loss = loss if term is None else loss + term
                if not loss.requires_grad:  # the schedule is over
                    break
                gradients = torch.autograd.grad(loss, roundings, allow_unused=True)
            for rounding, gradient in zip(roundings, gradients, strict=True):
                rounding.grad = torch.zeros_like(rounding) if gradient is None else gradient
            optimizer.step()
    finally:
        layer.training = False
        for rounding in roundings:
            rounding.grad = None
    learned = _distance(layer, inputs, targets)
    if not learned <= nearest:
        for quantizer in learners:
            quantizer.assign(quantizer.rounding, quantizer.to_numpy(torch.zeros_like(quantizer.rounding)))
        learned = nearest
    return ReconstructedLayer(name or "model", nearest, learned)


def _channels(layer: Any) -> int:
    """Return how many output channels a layer has: the loss is a sum over them."""
    _, weight, quantizer = layer.get_weights_vars()[0]
    axis = quantizer.quantization_config.weights_channels_axis
    return int(weight.shape[0 if axis is None else axis])


@torch.no_grad()
def _distance(layer: Any, inputs: list[Arguments], targets: list[Tensor]) -> float:
    pairs = zip(inputs, targets, strict=True)
    found = [(_first(layer(*args, **kwargs)) - target).double().square().mean() for (args, kwargs), target in pairs]
    return float(torch.stack(found).mean())


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _order(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Note the names of layers, in the order in which they are first called."""
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(*_: Any) -> None:
            if name not in found:
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _calls(layer: nn.Module) -> Iterator[list[tuple[Arguments, Tensor]]]:
    """Note inputs and outputs of a layer, as they are at the call: the model may write into both in place."""
    found: list[tuple[Arguments, Tensor]] = []
    given: list[Arguments] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs)))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append((given.pop(), _first(output).clone()))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Passing:
    """An observer that only lets a holder pass on what it gets."""

    def update(self, values: Any) -> None:
        """Do nothing."""


@contextmanager
def _float(model: nn.Module) -> Iterator[None]:
    """Let a model compute with float weights and activations."""
    wrappers = [module for module in model.modules() if isinstance(module, QuantizationWrapper)]
    holders: list[Any] = [module for module in model.modules() if isinstance(module, ActivationQuantizationHolder)]
    try:
        for wrapper in wrappers:
            wrapper.quantizes_weights = False
        for holder in holders:
            holder.observer = _Passing()
        yield
    finally:
        for wrapper in wrappers:
            wrapper.quantizes_weights = True
        for holder in holders:
            holder.observer = None
