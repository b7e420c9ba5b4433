"""From seen values to thresholds: what core's calibration loop needs of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from trainable_core.calibration import Observer
from trainable_core.calibration.model import ModelCalibration
from trainable_core.calibration.unseen import Sight, value_text
from trainable_core.errors import CalibrationError, IntegerRangeError, ShapeMismatchError
from trainable_core.qparams import shape_with, variable_shape
from trainable_core.quantizer import Structure
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import eligible
from trainable_torch.quantizers.base import RESHAPED, BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole, world_size
from trainable_torch.state import state_of
from trainable_torch.structure.computed import Uses, reason
from trainable_torch.training import call_with
from trainable_torch.wrapper import QuantizationWrapper, check_biases


def calibrate(
    qmodel: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    force: bool = False,
    training: bool = False,
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
    training : bool
        Also pass every batch in training mode, and calibrate what evaluation mode does not reach, such as an auxiliary
        head, by what is seen there. Dropout and normalization modules stay in evaluation mode, and the model's buffers
        and the random state are put back.
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
    ShapeMismatchError
        When a weight has another number of channels than when it was wrapped, and `force` is false.
    QuantizerStateError
        When every quantizer has its numbers and `force` is false, or when the model is finalized.
    CalibrationError
        When there are no batches, values are not finite, or another rank failed.
    IntegerRangeError
        When int32 does not hold the code of a bias with these thresholds.
    UnseenTensorsError
        When quantized tensors were never seen; the message names all of them, and why.

    Notes
    -----
    Activations are seen in eval mode, without gradients, with float weights; what the forward writes into the model's
    buffers is put back. Quantizers that already have numbers
    (from a config, or from a former calibration) keep them unless forced. Tied weights share one quantizer; it is
    calibrated once. In a distributed job every rank sees its own batches and sets the thresholds of all of them
    together.

    After weights were changed from outside, as by merging adapters into them, calibrate with `force`. A weight that has
    another number of channels by then, as a resized embedding, gets new variables, which an optimizer made before does
    not know.
    """
    state = state_of(qmodel)
    require_whole(qmodel, "calibrate")
    _leave_meta(qmodel)
    with _fitted_to_shapes(qmodel, force=force and not state.finalized), _biases_checked(qmodel):
        TorchCalibration(qmodel, state).run(
            batches,
            forward,
            force=force,
            training=training,
            show_progress=lambda shown: tqdm(
                shown, desc="calibrate", disable=None if progress is None else not progress, leave=False
            ),
        )
    return qmodel


class TorchCalibration(ModelCalibration):
    """What core's loop asks of PyTorch."""

    model: nn.Module
    training_forward = "forward=lambda qmodel, batch: qmodel.train()(batch)"

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

    def call(self, batch: Any, *, training: bool = False) -> Any:  # noqa: ARG002 - the mode is the modules'
        """Call the model with a batch: a mapping is its keyword arguments."""
        return call_with(self.model, batch)

    def observe(
        self, holders: Sequence[Any], batches: Iterable[Any], call: Callable[[Any, bool], Any], *, training: bool
    ) -> Sequence[Observer]:
        """Return what each holder sees on all ranks of a distributed job together."""
        try:
            observers = super().observe(holders, batches, self._looking(call), training=training)
        except Exception as error:
            _all_ranks(f"{type(error).__name__}: {error}")  # the others wait to hear what this one saw
            raise
        return _over_ranks(observers)

    def _looking(self, call: Callable[[Any, bool], Any]) -> Callable[[Any, bool], Any]:
        """Return a call of the model that sees the first time what the model computes of its weights."""
        weights = {
            f"{name}.{attribute}".lstrip("."): weight
            for name, wrapper in self.model.named_modules()
            if isinstance(wrapper, QuantizationWrapper)
            for attribute, weight, _ in wrapper.get_weights_vars()
        }
        waiting = [Uses(weights, [*self.model.parameters(), *self.model.buffers()])]

        def called(batch: Any, training: bool) -> Any:  # noqa: FBT001 - as `call`
            if not waiting:
                return call(batch, training)
            uses = waiting.pop()
            with uses:
                result = call(batch, training)
            self.state.left_out |= {name: reason(operation) for name, operation in uses.found.items()}
            return result

        return called

    @property
    def may_try(self) -> bool:
        """Whether a further call is safe: in a distributed job, it might wait for ranks that don't make it."""
        return world_size() == 1

    @contextmanager
    def observing(self, observers: Mapping[Any, Observer], *, training: bool = False) -> Iterator[None]:
        """Let the holders show what reaches them to the observers, with float weights and without gradients."""
        wrappers = _wrappers(self.model)
        modes = {m: m.training for m in self.model.modules() if hasattr(m, "training")}  # a frozen script has none
        kept = put_back(self.model, random=training)
        try:
            self.model.train(training)
            for module in self.model.modules():
                if training and isinstance(module, eligible.DROPOUT + eligible.NORMALIZATION):
                    module.training = False
            for wrapper in wrappers:
                wrapper.quantizes_weights = False
            for holder, observer in observers.items():
                holder.observer = observer
            with torch.no_grad(), kept:
                yield
        finally:
            for holder in observers:
                holder.observer = None
            for wrapper in wrappers:
                wrapper.quantizes_weights = True
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def watching(self, sights: Mapping[Any, Sight], *, readers: bool = False) -> Iterator[None]:
        """Note what reaches each of some holders, and how their layers are called, by hooks."""
        owners = {holder: wrapper for wrapper in _wrappers(self.model) for holder in wrapper.holders}
        hooks = []
        weights: dict[int, list[Sight]] = {}
        for holder, sight in sights.items():
            hooks.append(holder.register_forward_pre_hook(_note_value(sight)))
            owner = owners.get(holder)
            if owner is not None:
                hooks.append(owner.register_forward_pre_hook(_note_call(sight), with_kwargs=True))
                for parameter in owner.parameters(recurse=False):
                    weights.setdefault(id(parameter), []).append(sight)
        try:
            with _Readers(weights) if readers else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _note_value(sight: Sight) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0] if args else None
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            sight.reached(value_text(dtype, value.numel(), floating=value.is_floating_point()))
        else:
            sight.reached(f"an object of type {type(value).__name__}")

    return hook


def _note_call(sight: Sight) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sight.called(len(args), list(kwargs))

    return hook


class _Readers(TorchFunctionMode):
    """Notes which functions are given the weights of some layers."""

    def __init__(self, weights: Mapping[int, Sequence[Sight]]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # not who asks for a shape or a device
            for value in tree_leaves((args, kwargs)):
                for sight in self.weights.get(id(value), ()):
                    sight.read(_name_of(func))
        return result


def _name_of(function: Any) -> str:
    name = str(getattr(function, "__name__", function))
    return str(function.__self__.__name__) if name == "__get__" else name  # reading a property such as `T`


@contextmanager
def put_back(model: nn.Module, *, random: bool) -> Iterator[None]:
    """Put back a model's buffers, which a forward may change, and with `random` also the random state."""
    owned = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]  # noqa: SLF001 - a forward may exchange them
    values = [buffer.detach().clone() for _, _, buffer in owned]
    tensors = [*model.buffers(), *model.parameters()] if random else []
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices), enabled=random):
        try:
            yield
        finally:
            for (buffers, name, buffer), value in zip(owned, values, strict=True):
                buffers[name] = buffer
                buffer.copy_(value)


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
            new.modify(quantizer.modifiers)
            new.initialize_quantization(shapes.get(quantizer), quantizer.subject, None)
            quantizer.load_state_dict(new.state_dict(), assign=True)


@contextmanager
def _fitted_to_shapes(qmodel: nn.Module, *, force: bool) -> Iterator[None]:
    """Give quantizers of weights that have another shape by now variables of that shape; take them back on an error."""
    shapes: dict[BasePytorchTrainableQuantizer, tuple[int, ...]] = {}
    outgrown: dict[BasePytorchTrainableQuantizer, tuple[int, ...]] = {}
    for wrapper in _wrappers(qmodel):
        for _, weight, quantizer in wrapper.get_weights_vars():
            if not isinstance(quantizer, BasePytorchTrainableQuantizer) or not quantizer.variable_names:
                continue
            shape = tuple(weight.shape)
            needed = variable_shape(quantizer.quantization_config, shape, quantizer.subject)
            if quantizer.fits_one_shape and shape != quantizer.tensor_shape:
                if not force or quantizer in shapes:
                    expected = f"shape {quantizer.tensor_shape}"
                    raise ShapeMismatchError(quantizer.subject, expected, f"a weight of shape {shape}", RESHAPED)
                outgrown[quantizer] = shape
            if needed != shapes.get(quantizer, quantizer.structure.shape) and (not force or quantizer in shapes):
                expected = f"{shapes.get(quantizer, quantizer.structure.shape)[0]} channels"
                raise ShapeMismatchError(quantizer.subject, expected, f"a weight of shape {shape}", RESHAPED)
            shapes[quantizer] = needed
    changed = {q: shape for q, shape in shapes.items() if shape != q.structure.shape or q in outgrown}
    before = [(q, {name: copy(value) for name, value in q.__dict__.items()}) for q in changed]
    try:
        for quantizer, shape in changed.items():
            _renew(quantizer, shape, outgrown.get(quantizer))
        yield
    except BaseException:
        for quantizer, attributes in before:
            quantizer.__dict__.update(attributes)
        raise


@contextmanager
def _biases_checked(qmodel: nn.Module) -> Iterator[None]:
    """Check the codes of int32 biases in the end; give quantizers back what they had before when one is refused."""
    quantizers = [m for m in qmodel.modules() if isinstance(m, BasePytorchTrainableQuantizer)]
    if not any(wrapper.quantizes_bias for wrapper in _wrappers(qmodel)):
        yield
        return
    before = [
        (q, q.calibrated, q.quantization_config, {n: v.clone() for n, v in q.state_dict().items()}) for q in quantizers
    ]
    yield
    try:
        check_biases(qmodel)
    except IntegerRangeError:
        for quantizer, calibrated, config, variables in before:
            quantizer.load_state_dict(variables)
            quantizer.calibrated, quantizer.quantization_config = calibrated, config
        raise


def _renew(
    quantizer: BasePytorchTrainableQuantizer, channels: tuple[int, ...], whole: tuple[int, ...] | None = None
) -> None:
    """Give a quantizer new variables, without numbers, for another number of channels; or for a whole other shape."""
    shape = whole or shape_with(quantizer.quantization_config, quantizer.tensor_ndim, channels)
    first = _variables(quantizer)[0]
    for name in quantizer.variable_names:
        delattr(quantizer, name)
    quantizer._variable_groups = {}  # noqa: SLF001 - what it is initialized by
    quantizer.structure = Structure()
    quantizer.calibrated = False
    with first.device:
        quantizer.initialize_quantization(shape, quantizer.subject, None)


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
