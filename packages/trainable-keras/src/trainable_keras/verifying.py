"""A file beside the deployed model that it was written from: what Keras's quantizers give, code by code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.batches import in_a_list, inputs_of
from trainable_core.documents.files import as_path
from trainable_core.enums import TieRule
from trainable_core.errors import InvalidArgumentError
from trainable_core.export import channels_first, qdq
from trainable_core.export import verification as onnx
from trainable_core.export.files import is_tflite
from trainable_core.export.network import Network
from trainable_core.export.tflite.verification import Verification
from trainable_core.export.verification import VerificationReport
from trainable_keras.calibration import calls_replaced
from trainable_keras.exporting import network_of, require_finalized, same_places
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.inferable import KerasInferableQuantizer
from trainable_keras.parts import KerasHolder, plan_of, told_of

Codes = dict[str, list[NDArray[Any]]]


def verify(framework: Framework, deployed: Any, path: Any, batches: Iterable[Any]) -> VerificationReport:
    """Run a file and compare every code with the model's and with NumPy's; see `trainable_keras.verify`."""
    require_finalized(framework, deployed, "verify")
    given = iter(in_a_list(batches))
    first = next(given, None)
    if first is None:
        raise InvalidArgumentError("verify", "there are no batches", "a generator can be read only once.")
    tflite = is_tflite(path) or not as_path(path).exists()
    verification = Verification(path) if tflite else onnx.Verification(path)
    network = network_of(framework, deployed)
    called = same_places(network.layers, verification.metadata.get("layers", ()))
    if called:
        network = network_of(framework, deployed, called=called)
    if isinstance(verification, onnx.Verification):
        _note_ties(verification, network)
    if isinstance(verification, Verification):
        verification.compare_with(network)
    else:
        verification.compare_constants(qdq.build(channels_first.source_of(network))[0])
    for batch in itertools.chain([first], given):
        inputs = inputs_of(batch)
        feeds = _feeds(framework, list(network.inputs), inputs)
        codes, results = told(framework, deployed, inputs, called)
        if not tflite:
            codes = {name: [_channels_first(each) for each in calls] for name, calls in codes.items()}
        outputs = verification.run(feeds, codes)
        for name, value in zip(outputs, results, strict=False):
            verification.note_result(name, outputs[name], value)
    return verification.report


def _note_ties(verification: onnx.Verification, network: Network) -> None:
    """Note where an ONNX file's codes need not be equal: behind a quantizer that rounds otherwise than the runtime."""
    rules = {each["name"]: network.quantizers.get(each["name"]) for each, _, _ in verification.calls}
    if all(each is not None and each.tie_rule is TieRule.HALF_EVEN for each in rules.values()):
        return
    for row in verification.report.rows:
        row.must_be_equal = False
        row.certificate = "exact but ties" if row.certificate == "exact" else row.certificate


def _channels_first(codes: NDArray[Any]) -> NDArray[Any]:
    """Return the codes of images as an ONNX file has them."""
    return codes.transpose(channels_first.FIRST) if codes.ndim == channels_first.IMAGE else codes


def told(
    framework: Framework, deployed: Any, inputs: Any, called: Mapping[str, str] | None = None
) -> tuple[Codes, list[NDArray[Any]]]:
    """Return what a model's activation quantizers give, counted from the code of zero, and the model's outputs.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    deployed : model
        The model.
    inputs : tensors
        What it is called with.
    called : mapping of str to str, optional
        Other names for layers than the model's.
    """
    codes: Codes = {}
    to_numpy = framework.functions.to_numpy
    holders = [layer for layer in layers_within(deployed) if isinstance(layer, KerasHolder)]
    replaced = [(holder, partial(_noted, codes, holder, called or {}, to_numpy)) for holder in holders]
    with calls_replaced(replaced), framework.eagerly():
        result = deployed(inputs, training=False)
    return codes, [to_numpy(each) for each in framework.flat(result)]


def _noted(
    codes: Codes, holder: Any, names: Mapping[str, str], to_numpy: Callable[[Any], NDArray[Any]], call: Any
) -> Callable[..., Any]:
    layer = plan_of(holder).layer.name
    key = f"{names.get(layer, layer)}: {told_of(holder).tensor}"

    def called(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        quantizer = holder.activation_holder_quantizer
        if isinstance(quantizer, KerasInferableQuantizer):
            steps = np.rint(to_numpy(result).astype(np.float64) / np.float64(quantizer.qparams.scale))
            codes.setdefault(key, []).append(steps.astype(np.int64))
        return result

    return called


def _feeds(framework: Framework, names: list[str], inputs: Any) -> dict[str, NDArray[Any]]:
    """Return a batch's arrays by the names of a file's inputs."""
    to_numpy = framework.functions.to_numpy

    def array(value: Any) -> NDArray[Any]:
        return np.asarray(to_numpy(value) if framework.functions.is_tensor(value) else value)

    if isinstance(inputs, Mapping) and all(name in inputs for name in names):
        return {name: array(inputs[name]) for name in names}
    values = framework.flat(inputs)
    if len(values) < len(names):
        raise InvalidArgumentError("verify", f"a batch has {len(values)} tensors; the file's inputs are {names}")
    return {name: array(value) for name, value in zip(names, values, strict=False)}
