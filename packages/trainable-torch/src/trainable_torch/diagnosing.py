"""What hurts a quantized model, what of it trains, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from trainable_core.diagnosis import examination, suggestion
from trainable_core.diagnosis.objective import Metric, Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.diagnosis.suggestion import WIDTHS, Budget, Suggestion
from trainable_core.errors import ModelError
from trainable_torch.viewing import TorchView


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
    view = TorchView(qmodel, "diagnose", forward)
    _check_teacher("diagnose", teacher)
    return examination.diagnose(
        view,
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
    view = TorchView(qmodel, "suggest", forward)
    _check_teacher("suggest", teacher)
    return suggestion.suggest(
        view,
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
