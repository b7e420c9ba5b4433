"""Roundings learned by layers or blocks against the float model; see `trainable_core.reference.adaround`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.reconstruction import (
    SUBJECT,
    ReconstructedLayer,
    Reconstruction,
    check_blocks,
    check_request,
)
from trainable_core.errors import ModelError
from trainable_core.reference import adaround
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.adaround import AdaroundQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.state import state_of
from trainable_torch.training import call_with, evaluating, quantizers_of
from trainable_torch.wrapper import QuantizationWrapper

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_PLAIN = (Tensor, bool, int, float, complex, str, torch.Size, torch.dtype, torch.device, type(None))
"""Types of arguments that a block can be called with again and again."""


@dataclass(frozen=True)
class _Part:
    """What learns at once: a layer, or a block of layers.

    `layers` are the quantized layers that learn, in the order in which they are called.
    """

    name: str
    module: nn.Module
    layers: list[QuantizationWrapper]
    learners: list[AdaroundQuantizer]


def reconstruct(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    learning_rate: float = 0.01,
    blocks: Collection[str] | None = None,
    progress: bool | None = None,
) -> Reconstruction:
    """Learn the roundings of a model's weights layer by layer, against what the float model's layers give.

    Layers of a block, if blocks are named, learn together against what the float model's block gives.

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
    blocks : collection of str, optional
        Names of modules, as ``named_modules`` gives them, whose layers learn together: the blocks of a residual network
        or a transformer. Layers in none of them learn by themselves.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Reconstruction
        The distances of each layer's or block's outputs from the float model's, before and after; prints as a table.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or has no weights of training method ADAROUND; or when the
        batches don't reach such a layer or a block; or when a block is called with objects that a call may change, such
        as a cache, or its output, or the first of several, is not a floating tensor.
    InvalidArgumentError
        When `blocks` are no names of modules, no layer learns in a block, or one learns in two of them.
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

    A block takes the place of its layers (Li et al. 2021, BRECQ, algorithm 1): it learns on the inputs that it has
    behind the quantized parts before it, and is to give what it gives in the float model. The squared distance is
    summed over the channels of the layer in it that is called last.
    """
    state_of(qmodel)
    require_whole(qmodel, SUBJECT)
    layers = {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantizationWrapper) and _learners(module)
    }
    listed = check_request(layers, batches, forward)
    parts = _named_parts(qmodel, layers, blocks)
    require_calibrated(quantizers_of(qmodel).values(), type(qmodel).__name__, "trainable_torch")

    def run() -> None:
        with torch.no_grad():
            for batch in listed:
                if forward is not None:
                    forward(qmodel, batch)
                else:
                    call_with(qmodel, batch)

    with evaluating(qmodel):
        watched = {**layers, **{name: module for name, (module, _) in parts.items()}}
        with _order(watched, checked=parts.keys() - layers.keys()) as order:
            run()
        missed = [name or "model" for name in watched if name not in order]
        if missed:
            hint = "" if set(missed) <= set(layers) else "a block is a module that the model calls."
            raise ModelError(f"{SUBJECT}: no batch reached {', '.join(missed)}", hint)
        rows, done = [], set[int]()
        called = [name for name in order if name in parts]
        for name in tqdm(called, desc=SUBJECT, disable=None if progress is None else not progress, leave=False):
            module, names = parts[name]
            within = [layers[each] for each in order if each in names]
            learners = list({id(q): q for layer in within for q in _learners(layer) if id(q) not in done}.values())
            done |= {id(each) for each in learners}
            rows.append(_learn(_Part(name or "model", module, within, learners), run, qmodel, learning_rate))
    return Reconstruction(tuple(rows))


def _named_parts(
    qmodel: nn.Module, layers: Mapping[str, nn.Module], blocks: Collection[str] | None
) -> dict[str, tuple[nn.Module, list[str]]]:
    """Return what learns at once, each module with the names of its layers: blocks, and the layers in none of them."""
    names = {id(layer): name for name, layer in layers.items()}
    modules = {} if blocks is None else dict(qmodel.named_modules(remove_duplicate=False))
    learning = {
        name: [names[id(each)] for each in module.modules() if id(each) in names] for name, module in modules.items()
    }
    parts = {name: (modules[name], learning[name]) for name in check_blocks(blocks, learning)}
    taken = {each for _, within in parts.values() for each in within}
    return parts | {name: (layer, [name]) for name, layer in layers.items() if name not in taken}


def _learners(wrapper: QuantizationWrapper) -> list[AdaroundQuantizer]:
    quantizers = (quantizer for quantizer in wrapper.weights_quantizers.values())
    return [q for q in quantizers if isinstance(q, AdaroundQuantizer) and q.quantization_config.enabled]


def _learn(part: _Part, run: Callable[[], None], qmodel: nn.Module, learning_rate: float) -> ReconstructedLayer:
    """Let the roundings of one part learn; return what became of its outputs."""
    learners = part.learners
    _forget(learners)
    with _float(qmodel), _calls(part.module) as told:
        run()
    targets = [output for _, output in told]
    with _calls(part.module) as told:
        run()
    inputs = [arguments for arguments, _ in told]
    nearest = _distance(part.module, inputs, targets)
    ends = {q: adaround.schedule_end(q.beta) for q in learners if q.rounding.requires_grad}
    if not ends:
        return ReconstructedLayer(part.name, nearest, nearest)
    roundings = [quantizer.rounding for quantizer in ends]
    optimizer = torch.optim.Adam(roundings, lr=learning_rate)
    channels = _channels(part.layers[-1])
    weights = {q: weight for layer in part.layers for _, weight, q in layer.get_weights_vars() if q in learners}
    try:
        for layer in part.layers:
            layer.training = True
        for step in range(max(adaround.schedule_end(quantizer.beta) for quantizer in learners)):
            for quantizer in learners:
                quantizer.advance()
            with torch.enable_grad():
                output, target = _output(part.module, inputs[step % len(inputs)]), targets[step % len(inputs)]
                loss = (output - target).float().square().mean() * channels
                for quantizer, weight in weights.items():
                    term = quantizer.regularization_of(weight.float())
                    loss = loss if term is None else loss + term
                if not loss.requires_grad:  # the schedule is over
                    break
                gradients = torch.autograd.grad(loss, roundings, allow_unused=True)
            for (quantizer, end), gradient in zip(ends.items(), gradients, strict=True):
                # Adam would go on moving one whose schedule is over before that of another layer of its block
                quantizer.rounding.grad = gradient if step < end else None
            optimizer.step()
    finally:
        for layer in part.layers:
            layer.training = False
        for rounding in roundings:
            rounding.grad = None
    learned = _distance(part.module, inputs, targets)
    if not learned <= nearest:
        _forget(learners, steps=False)
        learned = nearest
    return ReconstructedLayer(part.name, nearest, learned)


def _forget(learners: list[AdaroundQuantizer], *, steps: bool = True) -> None:
    """Give quantizers the nearest codes, and let their schedules begin anew."""
    for quantizer in learners:
        quantizer.assign(quantizer.rounding, quantizer.to_numpy(torch.zeros_like(quantizer.rounding)))
        if steps:
            quantizer.counted_steps = 0


def _channels(layer: Any) -> int:
    """Return how many output channels a layer has: the loss is a sum over them."""
    _, weight, quantizer = layer.get_weights_vars()[0]
    axis = quantizer.quantization_config.weights_channels_axis
    return int(weight.shape[0 if axis is None else axis])


@torch.no_grad()
def _distance(module: nn.Module, inputs: list[Arguments], targets: list[Tensor]) -> float:
    pairs = zip(inputs, targets, strict=True)
    found = [(_output(module, arguments) - target).double().square().mean() for arguments, target in pairs]
    return float(torch.stack(found).mean())


def _output(module: nn.Module, arguments: Arguments) -> Any:
    """Return what a layer or block gives; the arguments are copies, because a block may write into them."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, arguments)
    return _first(module(*args, **kwargs))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _order(modules: Mapping[str, nn.Module], checked: Collection[str]) -> Iterator[list[str]]:
    """Note the names of modules, in the order in which their first calls end, and check the calls of some."""
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in checked:
                _check_call(name or "model", (args, kwargs), output)
            if name not in found:
                found.append(name)

        return hook

    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_call(name: str, arguments: Arguments, output: Any) -> None:
    """Raise ModelError where a block can't be called again with what it was given, or gives no floating tensor."""
    for each in tree_leaves(arguments):
        if not isinstance(each, _PLAIN):
            problem = f"{SUBJECT}: block {name!r} is called with a {type(each).__name__}, which a call may change"
            raise ModelError(problem, "call the model without it, as with use_cache=False, or name smaller blocks.")
    first = _first(output)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        problem = f"{SUBJECT}: block {name!r} gives a {type(first).__name__}, not a floating tensor"
        raise ModelError(problem, "name the blocks within it.")


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[Arguments, Tensor]]]:
    """Note inputs and outputs of a module, as they are at the call: the model may write into both in place."""
    found: list[tuple[Arguments, Tensor]] = []
    given: list[Arguments] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs)))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append((given.pop(), _first(output).clone()))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
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
