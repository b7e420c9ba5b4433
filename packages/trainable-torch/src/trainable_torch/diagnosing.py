"""What hurts a quantized model, what of it trains, and what to change: what core's loops need of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm.auto import tqdm

from trainable_core.diagnosis import model as core
from trainable_core.diagnosis import suggestion
from trainable_core.diagnosis.model import DiagnosedModel, Forward, Place, Seen, VariableKey, trained_variables
from trainable_core.diagnosis.objective import Metric, Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.diagnosis.suggestion import WIDTHS, Budget, Suggestion
from trainable_core.errors import ModelError
from trainable_torch import kernels
from trainable_torch.calibration import put_back
from trainable_torch.description import place_of_holder
from trainable_torch.distillation import main_output
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.state import plan_of, present_state, state_of
from trainable_torch.structure.operations import CONTAINER
from trainable_torch.training import call_with, evaluating, quantizers_of
from trainable_torch.wrapper import CALL, QuantizationWrapper

Array = NDArray[Any]


def diagnose(  # noqa: PLR0913 - each is a choice of its own
    qmodel: nn.Module,
    batches: Iterable[Any],
    teacher: nn.Module | None = None,
    *,
    metric: Metric = "kl",
    axis: int = -1,
    greater_is_better: bool = True,
    gradients: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Return what hurts a quantized model, what of it trains, and what to do about it.

    Parameters
    ----------
    qmodel : Module
        A wrapped and calibrated model, trained or not, or a finalized one; left as it is.
    batches : iterable
        What the model is called with, as for `calibrate`; a few hundred inputs. Read once.
    teacher : Module, optional
        What the outputs are compared with; by default the model itself without quantization. After a training with
        quantization the float model that it began with says more.
    metric : {"kl", "mse"} or callable
        What counts. ``kl``: the divergence of the output's class probabilities from the reference's. ``mse``: the
        squared distance of the output from the reference's, relative to its energy. Or ``metric(outputs, batch)``, a
        number for what the model returned for a batch, labels included: an accuracy, for instance.
    axis : int
        Axis of the classes, for ``kl``.
    greater_is_better : bool
        Whether a larger number of a `metric` of your own is better.
    gradients : bool
        Whether gradients of thresholds and the like are computed, which takes a backward pass for each batch.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Diagnosis
        Its `findings` are sentences that say what to do, the most important first; `layers`, `quantizers` and
        `variables` are the figures. Prints as a table; `rows` are for data frames, `to_json` gives all as a document.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or has nothing quantized.
    QuantizerStateError
        When a quantizer has no numbers yet.
    CalibrationError
        When there are no batches, or outputs of the reference are not finite.
    InvalidArgumentError
        When the metric is unknown, returns no number, or says nothing of the outputs.

    Notes
    -----
    The model is called ``2 + 2 * layers`` times for each batch: in float, quantized, and for each layer once with
    nothing else quantized and once with everything else. Memory does not grow with the number of batches. Everything is
    computed in evaluation mode; gradients are those of the metric (for one of your own, of ``mse``) with the quantizers
    in training mode. Afterwards modes, buffers, gradients and the random state are to the bit what they were.
    """
    diagnosed = TorchDiagnosis(qmodel, "diagnose", forward)
    _check_teacher("diagnose", teacher)
    return core.diagnose(
        diagnosed,
        batches,
        teacher=teacher,
        objective=Objective(metric, axis=axis, greater_is_better=greater_is_better),
        gradients=gradients,
        show_progress=partial(_bar, "diagnose", progress),
    )


def suggest(  # noqa: PLR0913 - each is a choice of its own
    qmodel: nn.Module,
    batches: Iterable[Any],
    budget: Budget,
    teacher: nn.Module | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    metric: Metric = "kl",
    axis: int = -1,
    greater_is_better: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> Suggestion:
    """Return which layer's weights should have how many bits, so that the model is best under a budget.

    Parameters
    ----------
    qmodel : Module
        A wrapped and calibrated model, not finalized; left as it is. Each layer is measured with the others as they
        are, so wrap it with wide weights first.
    batches : iterable
        What the model is called with, as for `calibrate`; a few hundred inputs. Read once.
    budget : float or mapping
        A number is the average number of bits of a weight. ``{"average_bits": 4}`` says the same, ``{"bytes": 10_000}``
        is the size of all codes, and ``{"costs": {layer: {n_bits: cost}}, "limit": limit}`` has a table of what each
        width costs in each layer, such as its latency.
    teacher : Module, optional
        What the outputs are compared with; by default the model itself without quantization.
    widths : sequence of int
        The widths to choose among; those that the recipe's target lacks are left out.
    metric, axis, greater_is_better
        As for `diagnose`.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Suggestion
        `recipe` is the model's recipe with a rule for each layer: wrap the float model with it. `rows` are the
        measurements and the choice. Prints as a table.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or has no quantized weights.
    QuantizerStateError
        When a quantizer has no numbers yet, or the model is finalized.
    CalibrationError
        When there are no batches, or outputs of the reference are not finite.
    InvalidArgumentError
        When the budget is not one or too small, or an argument is wrong.
    MissingLibraryError
        When SciPy is not installed.

    Notes
    -----
    For each layer and width the model is called once for each batch, with that layer's weights calibrated anew for the
    width and rounded to the nearest codes. What a choice costs is taken to be the sum of what each layer adds by
    itself, and the choice of the least sum is found exactly, by ``scipy.optimize.milp``.
    """
    diagnosed = TorchDiagnosis(qmodel, "suggest", forward)
    _check_teacher("suggest", teacher)
    return suggestion.suggest(
        diagnosed,
        batches,
        budget,
        teacher=teacher,
        widths=widths,
        objective=Objective(metric, axis=axis, greater_is_better=greater_is_better),
        show_progress=partial(_bar, "suggest", progress),
    )


def _check_teacher(what: str, teacher: Any) -> None:
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ModelError(f"{what}: the teacher is {type(teacher).__name__}, not a torch.nn.Module")


def _bar(what: str, progress: bool | None, total: int | None) -> Any:  # noqa: FBT001 - as the verbs have it
    return tqdm(desc=what, total=total, disable=None if progress is None else not progress, leave=False)


class TorchDiagnosis(DiagnosedModel):
    """What core's loops ask of PyTorch.

    Parameters
    ----------
    qmodel : Module
        A wrapped model.
    what : str
        The verb, for errors.
    forward : callable or None
        As `diagnose` has it.
    """

    package = "trainable_torch"

    def __init__(self, qmodel: nn.Module, what: str, forward: Forward | None) -> None:
        state_of(qmodel)
        require_whole(qmodel, what)
        super().__init__(qmodel, present_state(qmodel), forward)
        self._places = list(_places(qmodel, self.state.plans))

    def places(self) -> Sequence[Place]:
        """Return the model's quantizers in its order."""
        return self._places

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return isinstance(batches, Tensor)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluate without gradients, and leave buffers, modes, random state and notes as they were."""
        calls = [vars(each)[CALL] for each in self.model.modules() if isinstance(each, QuantizationWrapper)]
        noted = [dict(call.read) for call in calls]
        try:
            with _eagerly(), put_back(self.model, random=True), evaluating(self.model):
                yield
        finally:
            for call, read in zip(calls, noted, strict=True):
                call.read.clear()
                call.read.update(read)

    @contextmanager
    def quantizing(self, layers: Collection[str] | None) -> Iterator[None]:
        """Let only some layers quantize."""
        silent = [each.part for each in self._places if layers is not None and each.layer.name not in layers]
        wrappers = [part for part in silent if isinstance(part, QuantizationWrapper)]
        holders: list[Any] = [part for part in silent if isinstance(part, ActivationQuantizationHolder)]
        try:
            for wrapper in wrappers:
                wrapper.quantizes_weights = False
            for holder in holders:
                holder.observer = _PASSING
            yield
        finally:
            for wrapper in wrappers:
                wrapper.quantizes_weights = True
            for holder in holders:
                holder.observer = None

    @contextmanager
    def watching(self, seen: Seen) -> Iterator[None]:
        """Show inputs and outputs of the holders, by hooks."""

        def shown(place: Place) -> Any:
            def hook(_holder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                before, after = (each.data if isinstance(each, PackedSequence) else each for each in (args[0], output))
                for x, q in _pairs(before, after):
                    seen(place, _array(x), _array(q))

            return hook

        handles = [each.part.register_forward_hook(shown(each)) for each in self._places if not each.is_weight]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weight(self, place: Place) -> Array:
        """Return a weight's float values."""
        return _array(self._weight(place))

    def quantized_weight(self, place: Place) -> Array:
        """Return what a weight's quantizer makes of it."""
        weight, quantizer = self._weight(place), place.quantizer
        trainable = isinstance(quantizer, BasePytorchTrainableQuantizer)
        return _array(quantizer(weight, False) if trainable else quantizer(weight))  # noqa: FBT003 - mctq's call

    def _weight(self, place: Place) -> Tensor:
        wrapper: QuantizationWrapper = place.part
        wrapper.compute_weights()
        found = {str(attribute): weight for attribute, weight, _ in wrapper.get_weights_vars()}
        weight: Tensor = found[place.tensor]
        return weight

    @contextmanager
    def replacing(self, values: Mapping[Place, Array]) -> Iterator[None]:
        """Let quantizers of weights return given values."""
        replaced = {id(place.quantizer): (place.quantizer, array) for place, array in values.items()}
        try:
            for quantizer, array in replaced.values():
                vars(quantizer)["forward"] = partial(_given, array)
                kernels.forget(quantizer)
            yield
        finally:
            for quantizer, _ in replaced.values():
                vars(quantizer).pop("forward", None)
                kernels.forget(quantizer)  # it tells functions apart by their ids, and a later one may have the same

    @contextmanager
    def outputs_of(self, place: Place) -> Iterator[list[Array]]:
        """Note the outputs of a weight's layer, by a hook."""
        found: list[Array] = []

        def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
            value = main_output(output)
            if isinstance(value, Tensor) and not value.is_nested:
                found.append(_array(value).copy())  # what comes behind may write into it in place

        handle = place.part.register_forward_hook(hook)
        try:
            yield found
        finally:
            handle.remove()

    def call(self, batch: Any) -> Any:
        """Call the model with a batch: a mapping is its keyword arguments."""
        return call_with(self.model, batch)

    def call_teacher(self, teacher: nn.Module, batch: Any) -> Any:
        """Call another model in evaluation mode."""
        with evaluating(teacher), put_back(teacher, random=False):
            if self.forward is not None:
                return self.forward(teacher, batch)
            return call_with(teacher, batch)

    def main_output(self, outputs: Any) -> Array:
        """Return the values of the logits, or of the first output."""
        return _array(self._main(outputs))

    def _main(self, outputs: Any) -> Tensor:
        found = main_output(outputs)
        if not isinstance(found, Tensor):
            problem = f"diagnose: the model returned {type(found).__name__}, and no tensor is found in it"
            raise ModelError(problem, "forward=lambda qmodel, batch: ... returns the tensor that counts.")
        return found

    def variables(self) -> Mapping[VariableKey, Tensor]:
        """Return the quantizers' parameters that need a gradient."""
        return trained_variables(quantizers_of(self.model).values())

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Array], Array]
    ) -> Mapping[VariableKey, Array | None]:
        """Return gradients with the quantizers in training mode; nothing is accumulated in the parameters."""
        with put_back(self.model, random=True), torch.enable_grad():
            with _training(self.model):
                output = self._main(self.run(batch))
            if not output.requires_grad:
                return dict.fromkeys(variables)
            given = torch.as_tensor(upstream(_array(output)), dtype=output.dtype, device=output.device)
            found = torch.autograd.grad(output, list(variables.values()), given, allow_unused=True)
        return {key: None if each is None else _array(each) for key, each in zip(variables, found, strict=True)}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Let quantizers compute as in training; batch norms, dropout and whatever has no quantizer don't."""
    parts = QuantizationWrapper, ActivationQuantizationHolder, BasePytorchTrainableQuantizer
    modes = {each: each.training for each in model.modules() if isinstance(each, parts)}
    try:
        for each in modes:
            each.training = True
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


@contextmanager
def _eagerly() -> Iterator[None]:
    """Leave compiled forwards aside, which would be compiled anew for each state of the model; without gradients."""
    with torch.inference_mode(mode=False), torch.no_grad():
        if hasattr(torch.compiler, "set_stance"):  # PyTorch 2.6
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield


class _Passing:
    """An observer that only lets a holder pass on what it gets."""

    def update(self, values: Any) -> None:
        """Do nothing."""


_PASSING: Any = _Passing()


def _given(values: Array, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return given values as a tensor like a weight."""
    return torch.as_tensor(values, dtype=weight.dtype, device=weight.device)


def _places(qmodel: nn.Module, plans: Mapping[str, Any]) -> Iterator[Place]:
    """Yield the quantizers of a model in its order, as `describe` lists them."""
    held: set[nn.Module] = set()
    for path, module in qmodel.named_modules():
        name = path or "model"
        if isinstance(module, QuantizationWrapper):
            plan = plan_of(name, module)
            for attribute, quantizer in module.weights_quantizers.items():
                yield Place(plan.layer, str(attribute), plan.weights[attribute], quantizer, module)
            own = [*module.input_holders.items()]
            own += [] if module.output_holder is None else [("output", module.output_holder)]
            for tensor, holder in own:
                yield _held(plan, tensor, holder)
            held |= set(module.holders)
        elif isinstance(module, ActivationQuantizationHolder) and module not in held:
            operation, tensor = place_of_holder(name.removeprefix(f"{CONTAINER}."))
            yield _held(plans[operation], tensor, module)


def _held(plan: Any, tensor: str, holder: Any) -> Place:
    of_tensor = plan.float_inputs if plan.integer and tensor != "output" else plan.activation
    return Place(plan.layer, tensor, of_tensor, holder.activation_holder_quantizer, holder)


def _pairs(before: Any, after: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a holder got and returned as plain tensors of floating point numbers."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.is_floating_point():
        return
    if before.is_nested:
        yield from zip(before.unbind(), after.unbind(), strict=True)
    else:
        yield before, after


def _array(tensor: Tensor) -> Array:
    array: Array = np.asarray(tensor.detach().to("cpu", torch.float32).numpy())
    return array
