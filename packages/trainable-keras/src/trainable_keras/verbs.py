"""The verbs: each asks the model which Keras it belongs to, and hands that to the module that does the work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from trainable_core.backend.description import Description
from trainable_core.backend.reconstruction import Reconstruction
from trainable_core.diagnosis.objective import Metric, Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.diagnosis.suggestion import WIDTHS, Budget, Suggestion
from trainable_core.export.report import ExportReport
from trainable_core.export.verification import VerificationReport
from trainable_core.recipe.document import RecipeSource
from trainable_core.reporting.report import Asked
from trainable_keras import (
    calibration,
    callback,
    description,
    diagnosing,
    distillation,
    exporting,
    finalized,
    mctq,
    reconstruction,
    reporting,
    serialization,
    statistics,
    tracking,
    training,
    verifying,
    wrapping,
)
from trainable_keras.which import framework_of, framework_of_class


def wrap(model: Any, recipe: RecipeSource) -> Any:
    """Return a new model whose weights and activations are quantized while it trains.

    Parameters
    ----------
    model : keras.Model
        The float model, built; left untouched.
    recipe : QuantizationRecipe, mapping, or path
        Which tensors, on which grid, trained how.

    Returns
    -------
    keras.Model
        A copy of the model, not compiled, in which layers sit in quantization wrappers and activation quantizers in
        holders. It needs `calibrate` before its first call. Where activations have ``placement: integer``, separable
        convolutions are two layers, the second under the name of the one.

    Raises
    ------
    ModelError
        When `model` is not a Keras model, is not built, or can't be copied; on Keras 3 also when it has a Lambda layer.
    QuantizerStateError
        When it is wrapped already.
    TrainableError, pydantic.ValidationError
        When the recipe doesn't fit; the message names field or layer.
    """
    framework = framework_of(model, "wrap: the model")
    wrapped = wrapping.wrap(framework, model, recipe)
    exporting.fit_to_target(framework, wrapped)
    return wrapped


def calibrate(
    qmodel: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    training: bool = False,
    progress: bool | None = None,
) -> Any:
    """Set the thresholds of a wrapped model from its weights and from what its activations look like.

    Parameters
    ----------
    qmodel : keras.Model
        What `wrap` returned; changed in place, and only when everything went well.
    batches : iterable, optional
        What the model is called with, such as a ``tf.data.Dataset``; needed when activations are quantized. Of a tuple
        or list only the first item is passed (a dataset's inputs without its labels), anything else as it is; a mapping
        too, for models with named inputs.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    force : bool
        Overwrite thresholds that are already set, trained ones included.
    training : bool
        Also pass every batch in training mode, and calibrate what inference does not reach, such as an auxiliary head,
        by what is seen there. Dropout and batch-normalization layers stay in inference mode, and the model's
        non-trainable variables are put back.
    progress : bool, optional
        Whether to show a progress bar; by default when the output is a terminal.

    Returns
    -------
    keras.Model
        `qmodel`.

    Raises
    ------
    QuantizerStateError
        When every quantizer has its numbers and `force` is false, or when the model is finalized.
    CalibrationError
        When there are no batches, or values are not finite.
    UnseenTensorsError
        When quantized tensors were never seen; the message names all of them, and why.

    Notes
    -----
    Activations are seen in inference mode and eagerly, with float weights. Quantizers that already have numbers (from a
    config, or from an earlier calibration) keep them unless forced.
    """
    framework = framework_of(qmodel, "calibrate: the model")
    return calibration.calibrate(
        framework, qmodel, batches, forward=forward, force=force, training=training, progress=progress
    )


def parameter_groups(
    qmodel: Any,
    *,
    weights: Mapping[str, Any] | None = None,
    qparams: Mapping[str, Any] | None = None,
    pace: str = "threshold",
) -> list[dict[str, Any]]:
    """Return the model's trainable variables in groups, for one optimizer each in a training loop of your own.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped model.
    weights : mapping, optional
        Options of the group WEIGHTS, such as a learning rate: everything that is not a quantizer's.
    qparams : mapping, optional
        Options of the group QPARAMS: thresholds, ranges, attention logits. Without a ``weight_decay`` here it is 0:
        decay would pull thresholds to zero.
    pace : {"threshold", "scale"}
        ``threshold`` is for Adam and all that divide by the gradient's size. ``scale`` is for SGD: the learning rate
        of thresholds and ranges, which `qparams` or `weights` must have, is multiplied by ``4**(n_bits -
        signed)``, which moves the scale as SGD on the scale itself would, and there is a group QPARAMS for each factor.

    Returns
    -------
    list of dict
        ``{"params": [...], "name": "WEIGHTS" or "QPARAMS", **options}``; a group without variables is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    InvalidArgumentError
        When options are not a mapping, or one would replace the variables or the name, or `pace` is unknown or has no
        learning rate.

    Notes
    -----
    A Keras optimizer has no groups. With one optimizer for all, as in `fit`, `exclude_from_weight_decay` keeps weight
    decay off the thresholds.
    """
    return training.parameter_groups(
        framework_of(qmodel, "parameter_groups: the model"), qmodel, weights, qparams, pace
    )


def exclude_from_weight_decay(optimizer: Any, qmodel: Any) -> None:
    """Let an optimizer leave thresholds, ranges and the like out of weight decay.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        An optimizer that has made no variables yet; changed in place.
    qmodel : keras.Model
        A wrapped model.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    ValueError
        Keras's own, when the optimizer is built already.
    """
    framework = framework_of(qmodel, "exclude_from_weight_decay: the model")
    training.exclude_from_weight_decay(framework, optimizer, qmodel)


def regularization(qmodel: Any) -> Any:
    """Return the sum of the quantizers' terms for the loss; a zero scalar when no method has one.

    A call with ``training=True`` adds the same terms to ``qmodel.losses``, which `fit` minimizes; so a training loop
    adds either these or those.
    """
    return training.regularization(framework_of(qmodel, "regularization: the model"), qmodel)


def freeze_quant_params(qmodel: Any, frozen: bool = True) -> Any:  # noqa: FBT001, FBT002 - reads as a fact
    """Stop every quantizer's variables from learning, or let them learn again; returns the model.

    Compile a compiled model again afterwards: its optimizer has the variables that were trainable then.
    """
    return training.freeze_quant_params(framework_of(qmodel, "freeze_quant_params: the model"), qmodel, frozen)


def advance_schedules(qmodel: Any) -> None:
    """Count one training step in every quantizer with a schedule.

    A call with ``training=True`` counts by itself; call this only to skip steps.
    """
    training.advance_schedules(framework_of(qmodel, "advance_schedules: the model"), qmodel)


def reestimate_batch_norm(
    qmodel: Any, batches: Iterable[Any], *, forward: Callable[[Any, Any], Any] | None = None
) -> Any:
    """Estimate the statistics of the model's batch norms anew, from the quantized model as it is.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped, calibrated model with batch norms that were not folded; changed in place, and only when everything
        went well.
    batches : iterable
        What the model is called with, as for `calibrate`; some 50 batches of the size of training.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.

    Returns
    -------
    keras.Model
        `qmodel`.

    Raises
    ------
    ModelError
        When the model is not wrapped, or has no batch norm that learns.
    CalibrationError
        When there are no batches, or they don't reach some batch norm; names it.

    Notes
    -----
    Batch norms are called as in training, everything else as in inference, eagerly; the statistics are the averages of
    those of the batches, all of equal weight. No schedule advances. A batch norm with ``trainable = False`` keeps its
    statistics, as it does in training.
    """
    framework = framework_of(qmodel, "reestimate_batch_norm: the model")
    return statistics.reestimate_batch_norm(framework, qmodel, batches, forward)


def training_callback(
    qmodel: Any,
    *,
    freeze_at: int | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    log: Callable[[dict[str, float]], Any] | None = None,
    log_every: int = 100,
) -> Any:
    """Return what a trainer calls so that thresholds freeze, statistics are estimated anew, and numbers are logged.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped model.
    freeze_at : int, optional
        Number of optimizer steps after which thresholds and ranges stop learning; by default they never do.
    batches : iterable, optional
        Read anew before each evaluation and at the end, to estimate batch-norm statistics from; see
        `reestimate_batch_norm`.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.
    log : callable, optional
        Called with a dictionary of numbers by name, such as `print` or ``wandb.log``.
    log_every : int
        Number of optimizer steps between two calls of `log`.

    Returns
    -------
    keras.callbacks.Callback
        For ``fit(callbacks=[...])``; its methods `start`, `step_end` and `before_evaluation` are for a loop of your
        own.

    Raises
    ------
    ModelError
        When the model is not wrapped, or there are batches and no batch norm that learns.
    InvalidArgumentError
        When an argument is of a wrong kind, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    UnsupportedConfigError
        For `freeze_at` on JAX, where Keras's trainer can't go on with fewer variables.
    """
    framework = framework_of(qmodel, "training_callback: the model")
    return callback.training_callback(
        framework, qmodel, freeze_at=freeze_at, batches=batches, forward=forward, log=log, log_every=log_every
    )


def track(
    qmodel: Any,
    path: str | PathLike[str],
    *,
    every: int = 100,
    batches: Iterable[Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Return what a trainer calls so that thresholds, gradients, clipping and codes are written down as it trains.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped model.
    path : path
        A file whose name ends in ``.csv``, which gets one number a line and goes on where an earlier run stopped; any
        other name is a folder for TensorBoard.
    every : int
        Number of optimizer steps between two records.
    batches : iterable, optional
        A few batches, as `calibrate` takes them, with which activations are looked at for each record; read anew each
        time. By default activations tell their thresholds alone.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.

    Returns
    -------
    keras.callbacks.Callback
        For ``fit(callbacks=[...])``; its methods `start`, `step_end` and `end` are for a loop of your own. `problems`
        tells what was warned of.

    Raises
    ------
    ModelError
        When the model is not wrapped, or is finalized.
    InvalidArgumentError
        When `every` is not a whole number from 1, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    DocumentError
        When the path can't be written to, or is a CSV file of others.

    Warns
    -----
    GradientMissingWarning
        When thresholds that should learn had no gradient at three records in a row, or did not change where gradients
        are not seen.
    ThresholdCollapsedWarning
        When a step is below a hundredth of what it was, at its lower bound, or not finite.
    StatisticsRunAwayWarning
        When the variance of a batch norm, or the largest value of an activation, is ten thousand times what it was.
    RecordsLostWarning
        When a record can't be written any more, or the file was removed and is begun anew; the training goes on.

    Notes
    -----
    Training is the same to the last bit. A record looks at no more than 65,536 elements of a weight, evenly spread, and
    passes the batches in inference; what that changes in the model is put back. Gradients are noted as the optimizer
    that the model was compiled with is given them. They are not seen on JAX, with several replicas, with an optimizer
    that the model doesn't know, and on Keras 2 where `fit` has run before.
    """
    framework = framework_of(qmodel, "track: the model")
    return tracking.track(framework, qmodel, path, every=every, batches=batches, forward=forward)


def distill(
    qmodel: Any,
    teacher: Any,
    *,
    temperature: float = 1.0,
    logits: float = 1.0,
    features: Mapping[str, float] | Sequence[str] | None = None,
    axis: int = -1,
) -> Any:
    """Return a model that trains a wrapped one: its losses have the term that the one learns from its teacher by.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped, calibrated model.
    teacher : keras.Model
        The float model, or any other of the same outputs; it is called in inference mode and does not learn.
    temperature : float
        Of the softmax of both models' logits.
    logits : float
        Factor of the term for the logits, the first output; 0 leaves them out.
    features : mapping of str to float, or sequence of str, optional
        Layers whose outputs are to be those of the teacher's layers of the same names, with the factors of their mean
        squared distances. A convolution with a folded batch norm gives what the teacher's batch norm gives: name that.
    axis : int
        Axis of the classes.

    Returns
    -------
    keras.Model
        Compile it and call its `fit`; or call it with ``training=True`` in a loop of your own, and minimize its
        `losses` too. It trains `qmodel` itself, which is what you save and finalize.

    Raises
    ------
    ModelError
        When `qmodel` is not wrapped, or the teacher is no model of the same Keras.
    InvalidArgumentError
        When a factor is negative, a name is unknown, or all factors are 0.
    ShapeMismatchError
        In a call, when outputs or features of the two models differ in shape.
    """
    framework = framework_of(qmodel, "distill: the model")
    return distillation.distill(
        framework, qmodel, teacher, temperature=temperature, logits=logits, features=features, axis=axis
    )


def reconstruct(
    qmodel: Any,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    learning_rate: float = 0.01,
    blocks: Collection[str] | None = None,
    progress: bool | None = None,
) -> Reconstruction:
    """Learn the roundings of a model's weights layer by layer, against what the float model's layers give.

    Layers of a block, if blocks are named, learn together against what the float model's block gives.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped, calibrated model with weights of training method ADAROUND; these are changed in place.
    batches : iterable
        What the model is called with, as for `calibrate`; some hundred inputs without labels. All are kept in memory,
        with the inputs and outputs of one layer at a time.
    forward : callable, optional
        ``forward(qmodel, batch)`` instead, when batches need another call.
    learning_rate : float
        Of Adam.
    blocks : collection of str, optional
        Names of models within the model, or of layers with layers inside, whose layers learn together: the blocks of a
        residual network or a transformer. Layers in none of them learn by themselves. Names of layers further inside
        are those of the layers around them and their own, with dots: ``"stage.block"``.
    progress : bool, optional
        Whether to show a progress bar; by default when a terminal is there.

    Returns
    -------
    Reconstruction
        The distances of each layer's or block's outputs from the float model's, before and after; prints as a table.

    Raises
    ------
    ModelError
        When the model is not wrapped, or has no weights of training method ADAROUND; or when the batches don't reach
        such a layer or a block; or when a layer or block that learns is called with objects that are no tensors, is
        called in several ways, or gives no floating tensor; or when its tensors don't all have the batch as first axis.
    InvalidArgumentError
        When `blocks` are no names of layers, no layer learns in a block, or one learns in two of them.
    QuantizerStateError
        When a quantizer has no numbers yet.
    CalibrationError
        When there are no batches.

    Notes
    -----
    Layers are taken in the order in which they are called. Each learns on the inputs that it has behind the quantized
    layers before it, and is to give what it gives in the float model (Nagel et al. 2020, equation 25), for as many
    steps as the schedule of its method lasts, a batch at each. The loss is the squared distance, summed over channels
    and averaged over the rest, and the regularizer. Everything else is in inference mode, and stays as it is.

    A block takes the place of its layers (Li et al. 2021, BRECQ, algorithm 1): it learns on the inputs that it has
    behind the quantized parts before it, and is to give what it gives in the float model.
    """
    return reconstruction.reconstruct(
        framework_of(qmodel, "reconstruct: the model"),
        qmodel,
        batches,
        forward=forward,
        learning_rate=learning_rate,
        blocks=blocks,
        progress=progress,
    )


def finalize(qmodel: Any) -> Any:
    """Return a new model with inferable quantizers, which gives bit for bit what `qmodel` gives in inference.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped, calibrated model; left as it is, and still trains.

    Returns
    -------
    keras.Model
        Not compiled, with inferable quantizers in wrappers and holders; on TensorFlow they are instances of mctq's
        classes. Of a finalized model a copy is returned.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    QuantizerStateError
        When a quantizer has no numbers yet; names the layers.
    """
    return finalized.finalize(framework_of(qmodel, "finalize: the model"), qmodel)


def to_mctq(model: Any) -> Any:
    """Return a new model made of mct-quantizers' own classes, which opens where only mct-quantizers is installed.

    Parameters
    ----------
    model : keras.Model
        What `finalize` returned, a functional or Sequential model of Keras 2; left as it is.

    Returns
    -------
    keras.Model
        Not compiled; layers are of their own classes, wrappers, holders and quantizers of mctq's.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`.
    QuantizerStateError
        When it is not finalized.
    UnsupportedConfigError
        When mctq can't express something, or computes it otherwise; names every layer and tensor, and the reason. On
        Keras 3 always.

    Notes
    -----
    TensorFlow's kernels, which mctq's quantizers call, may give the next code where a value lies within
    ``2**n_bits * 2**-22`` steps of a tie.
    """
    return mctq.to_mctq(framework_of(model, "to_mctq: the model"), model)


def export(
    deployed: Any,
    path: str | PathLike[str],
    target: str = "tflite",
    *,
    packed: bool = False,
    external_data: bool | None = None,
) -> ExportReport:
    """Write a deployed model for a runtime, with the very integers that it computes with.

    Parameters
    ----------
    deployed : keras.Model
        What `finalize` returned, a functional or Sequential model; left as it is.
    path : path
        File to write; an old one is replaced only once the new one is complete on disk.
    target : {"tflite", "onnx", "qonnx"}
        ``tflite``: integers throughout, for TensorFlow Lite (LiteRT). The file's inputs and outputs are int8 codes; its
        grids say which real numbers they stand for. ``onnx``: QuantizeLinear and DequantizeLinear with integer
        constants, for ONNX Runtime and OpenVINO. ``qonnx``: ``Quant`` nodes with the true widths, for FPGA flows. The
        number of rows is free.
    packed : bool
        Whether weights of at most 4 bits stand two in a byte. The runtime computes them with kernels of its own then,
        which round twice; with 8 bits for each, the file gives what the model gives. For ``tflite`` alone.
    external_data : bool, optional
        Whether large constants of an ONNX file go into a second file beside it; by default from one gigabyte on.

    Returns
    -------
    ExportReport
        What is in the file, and which parts of it stay float, with the reasons. Prints as text.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, or has no graph.
    QuantizerStateError
        When it is not finalized.
    UnsupportedConfigError
        When the target can't express something; names the layer, and says why.
    InvalidArgumentError
        When the target is unknown, or an argument is not for it.
    MissingLibraryError
        When a library that the target needs is not installed; names the extra.
    DocumentError
        When the file can't be written.
    """
    framework = framework_of(deployed, "export: the model")
    return exporting.export(framework, deployed, path, target, packed=packed, external_data=external_data)


def verify(deployed: Any, path: str | PathLike[str], batches: Iterable[Any]) -> VerificationReport:
    """Run a file in LiteRT or ONNX Runtime, and compare every code with the model's and with NumPy's.

    Parameters
    ----------
    deployed : keras.Model
        The finalized model that `export` wrote.
    path : path
        What `export` wrote for the target ``tflite`` or ``onnx``.
    batches : iterable of batches
        As `calibrate` takes them.

    Returns
    -------
    VerificationReport
        One row for each quantized activation: which kernel ran, whether equality is certified, and the codes that
        differ between NumPy and the runtime, and between the model and the runtime. `changed` names each constant and
        each grid of the file that is not the model's. `ok` says whether all is well, and the report prints as a table.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, or has no graph; or when the runtime refuses the file.
    QuantizerStateError
        When it is not finalized.
    InvalidArgumentError
        When there is no batch, or it lacks an input.
    DocumentError
        When the file is missing, damaged, or was not written by `export`.
    MissingLibraryError
        When the runtime is not installed; names the extra.
    """
    return verifying.verify(framework_of(deployed, "verify: the model"), deployed, path, batches)


def describe(qmodel: Any) -> Description:
    """Return what `wrap` made of a model: one row for each quantizer, and the reasons for what was left out.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped or finalized model.

    Returns
    -------
    Description
        Prints as a table; `to_dict` and `to_json` give the same as a document.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    """
    return description.describe(framework_of(qmodel, "describe: the model"), qmodel)


def report(
    qmodel: Any,
    path: str | PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    training: str | PathLike[str] | None = None,
    exported: str | PathLike[str] | None = None,
    diagnosis: Diagnosis | None = None,
    title: str | None = None,
) -> Path:
    """Write a page about a model: what is quantized and what is not, how tensors fit their grids, how it trained.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped or finalized model.
    path : path
        The page, whose name ends in ``.html``. It is one file that needs no network.
    batches : iterable, optional
        What activations are looked at with, in evaluation mode, as `calibrate` takes them; by default they are not.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.
    training : path, optional
        The CSV file that `track` wrote, to show thresholds over the steps.
    exported : path, optional
        A file that `export` wrote, to show what is computed in integers and what stays float.
    diagnosis : Diagnosis, optional
        What `diagnose` returned, to show what each layer costs and what to do.
    title : str, optional
        What stands at the top; by default the name of the model's class.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    DocumentError
        When the page can't be written or its name ends otherwise, or one of the other files is not what it should be.
    CalibrationError
        When the batches are none, or one.
    InvalidArgumentError
        When `diagnosis` or `title` is of a wrong kind.
    MissingLibraryError
        When Matplotlib or Jinja is not installed: the extra ``report`` of trainable-core brings them.

    Notes
    -----
    The model is as it was afterwards. Of each weight at most 262,144 elements are looked at, evenly spread, and as many
    of each activation in every call.
    """
    asked = Asked(batches=batches, training=training, exported=exported, diagnosis=diagnosis, title=title)
    return reporting.report(framework_of(qmodel, "report: the model"), qmodel, path, asked, forward)


def diagnose(  # noqa: PLR0913 - each is a choice of its own
    qmodel: Any,
    batches: Iterable[Any],
    teacher: Any = None,
    *,
    metric: Metric = "kl",
    axis: int = -1,
    greater_is_better: bool = True,
    gradients: bool = True,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Return what hurts a quantized model, what of it trains, and what to do about it.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped and calibrated model, trained or not, or a finalized one; left as it is.
    batches : iterable
        What the model is called with, as for `calibrate`; a few hundred inputs. Read once.
    teacher : keras.Model, optional
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
        When the model is not wrapped, or has nothing quantized.
    QuantizerStateError
        When a quantizer has no numbers yet.
    CalibrationError
        When there are no batches, or outputs of the reference are not finite.
    InvalidArgumentError
        When the metric is unknown, returns no number, or says nothing of the outputs.

    Notes
    -----
    The model is called ``2 + 2 * layers`` times for each batch, eagerly: in float, quantized, and for each layer once
    with nothing else quantized and once with everything else. Memory does not grow with the number of batches.
    Everything is computed in inference; gradients are those of the metric (for one of your own, of ``mse``) with the
    quantizers in training mode, or as `forward` calls them. Afterwards the model's variables are to the bit what they
    were.
    """
    return diagnosing.diagnose(
        framework_of(qmodel, "diagnose: the model"),
        qmodel,
        batches,
        teacher,
        objective=Objective(metric, axis=axis, greater_is_better=greater_is_better),
        gradients=gradients,
        forward=forward,
        progress=progress,
    )


def suggest(  # noqa: PLR0913 - each is a choice of its own
    qmodel: Any,
    batches: Iterable[Any],
    budget: Budget,
    teacher: Any = None,
    *,
    widths: Sequence[int] = WIDTHS,
    metric: Metric = "kl",
    axis: int = -1,
    greater_is_better: bool = True,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
) -> Suggestion:
    """Return which layer's weights should have how many bits, so that the model is best under a budget.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped and calibrated model, not finalized; left as it is. Each layer is measured with the others as they
        are, so wrap it with wide weights first.
    batches : iterable
        What the model is called with, as for `calibrate`; a few hundred inputs. Read once.
    budget : float or mapping
        A number is the average number of bits of a weight. ``{"average_bits": 4}`` says the same, ``{"bytes": 10_000}``
        is the size of all codes, and ``{"costs": {layer: {n_bits: cost}}, "limit": limit}`` has a table of what each
        width costs in each layer, such as its latency.
    teacher : keras.Model, optional
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
        When the model is not wrapped, or has no quantized weights.
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
    return diagnosing.suggest(
        framework_of(qmodel, "suggest: the model"),
        qmodel,
        batches,
        budget,
        teacher,
        widths=widths,
        objective=Objective(metric, axis=axis, greater_is_better=greater_is_better),
        forward=forward,
        progress=progress,
    )


def save(qmodel: Any, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model.

    Parameters
    ----------
    qmodel : keras.Model
        What `wrap` or `finalize` returned.
    path : path
        File to write; an old one is replaced only once the new one is complete on disk.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    DocumentError
        When the file can't be written.

    Notes
    -----
    A zip of ``.npy`` files: the variables in the model's order, bfloat16 ones as float32, and a document with the
    recipe, the signs that calibration decided, which quantizers are frozen, and the version of this format. The
    optimizer's variables are not in it; a ``.keras`` file, which Keras writes, has them.
    """
    serialization.save(framework_of(qmodel, "save: the model"), qmodel, path)


def load(path: str | PathLike[str], model: Any) -> Any:
    """Return a wrapped model as it was saved: training resumes bit for bit.

    Parameters
    ----------
    path : path
        What `save` wrote.
    model : keras.Model
        A float model of the same architecture and the same Keras, built; left untouched, its values don't matter.

    Returns
    -------
    keras.Model
        Wrapped, or finalized if that is what was saved.

    Raises
    ------
    DocumentError
        When the file is missing, truncated, damaged, of another format, or for another architecture.
    DocumentVersionError
        When it was written in a version of the format that this release doesn't know.
    ModelError
        When `model` is not a Keras model.
    """
    framework = framework_of(model, "load: the float model")
    qmodel = serialization.load(framework, path, model)
    exporting.fit_to_target(framework, qmodel)
    return qmodel


def register_layer(
    cls: type, op: str, weights: Mapping[str, int] | None = None, inputs: tuple[str, ...] = ("inputs",)
) -> None:
    """Tell how a layer type of your own is quantized.

    Parameters
    ----------
    cls : type
        Layer type; subclasses are meant too.
    op : str
        Its op kind, one of `trainable_core.recipe.document.OPS`.
    weights : mapping of str to int, optional
        Axis of the output channels, by weight attribute.
    inputs : tuple of str
        Names of its tensor arguments, in positional order.

    Raises
    ------
    ModelError
        When `cls` is not a layer type of Keras.
    InvalidArgumentError
        When the op kind is unknown, or an axis or a name is not one.
    """
    framework_of_class(cls).types.register(cls, op, weights, inputs)


def _leave_to_python(verbs: Iterable[Any]) -> None:
    """Keep AutoGraph from rewriting verbs that are called inside of a `tf.function`, and from warning that it can't.

    What is set is what ``tf.autograph.experimental.do_not_convert`` sets. It doesn't reach the model that a verb calls,
    whose layers may need AutoGraph.
    """
    for verb in verbs:
        verb.autograph_info__ = {}


_leave_to_python(each for each in list(vars().values()) if getattr(each, "__module__", None) == __name__)
