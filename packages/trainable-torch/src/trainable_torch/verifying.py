"""A file beside the deployed model that it was written from: what PyTorch's quantizers give, code by code."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from trainable_core.calibration.batches import in_a_list
from trainable_core.errors import InvalidArgumentError
from trainable_core.export import qdq
from trainable_core.export.graph import Array
from trainable_core.export.verification import Verification, VerificationReport
from trainable_torch.copying import copied
from trainable_torch.exporting import Call, named_quantizers, require_finalized, source_of
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.wrapping import state_of


def verify(deployed: nn.Module, path: str | PathLike[str], batches: Iterable[Any]) -> VerificationReport:
    """Run a file in ONNX Runtime, and compare every code with the model's and with NumPy's.

    Parameters
    ----------
    deployed : Module
        The finalized model that `export` wrote.
    path : path
        What `export` wrote for the target ``onnx``.
    batches : iterable of batches
        As `calibrate` takes them.

    Returns
    -------
    VerificationReport
        One row for each quantized activation: which kernel ran, whether equality is certified, and the codes that
        differ between NumPy and the runtime, and between the model and the runtime. `changed` names each constant of
        the file that is not the model's. `ok` says whether all is well, and the report prints as a table.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, or can't be traced; or when the runtime refuses the file.
    QuantizerStateError
        When it is not finalized.
    InvalidArgumentError
        When there is no batch, or it lacks an input.
    DocumentError
        When the file is missing, damaged, or was not written by `export`.
    MissingLibraryError
        When onnx, onnxscript or ONNX Runtime is not installed.
    """
    state_of(deployed)
    require_whole(deployed, "verify")
    require_finalized(deployed, "verify")
    given = iter(in_a_list(batches))
    first = next(given, None)
    if first is None:
        raise InvalidArgumentError("verify", "there are no batches", "a generator can be read only once.")
    verification = Verification(path)
    expected, _ = qdq.build(source_of(deployed, first))
    verification.compare_constants(expected)
    model = copied(deployed).eval()
    watched = _Watched(model)
    for batch in itertools.chain([first], given):
        call = Call.of(batch)
        results = watched.run(call)
        outputs = verification.run(_feeds(verification, call), watched.codes)
        for name, value in zip(outputs, results, strict=False):
            verification.note_result(name, outputs[name], value)
    return verification.report


def _feeds(verification: Verification, call: Call) -> dict[str, Array]:
    """Return a call's tensors by the names of a file's inputs."""
    names = [each.name for each in verification.graph.inputs]
    if all(name in call.kwargs for name in names):
        return {name: _array(call.kwargs[name]) for name in names}
    tensors = call.tensors
    if len(tensors) < len(names):
        raise InvalidArgumentError("verify", f"a batch has {len(tensors)} tensors; the file's inputs are {names}")
    return {name: _array(value) for name, value in zip(names, tensors, strict=False)}


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().cpu().numpy()
    return found


class _Watched:
    """A copy of a deployed model whose activation quantizers tell their codes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.codes: dict[str, list[Array]] = {}
        names: dict[int, str] = {}
        for name, quantizer in named_quantizers(model):
            if isinstance(quantizer, InferableQuantizer) and id(quantizer) not in names:
                names[id(quantizer)] = name
                quantizer.__dict__["forward"] = functools.partial(self._told, name, quantizer)

    def _told(self, name: str, quantizer: InferableQuantizer, x: Tensor) -> Tensor:
        value = type(quantizer).forward(quantizer, x)
        scale = quantizer.grid_scale.double()
        steps = torch.round(value.double() / scale).to(torch.int64)
        self.codes.setdefault(name, []).append(_array(steps))
        return value

    def run(self, call: Call) -> list[Array]:
        """Run the model on a batch; returns its outputs in order."""
        self.codes.clear()
        with torch.no_grad():
            result = self.model(*call.args, **call.kwargs)
        return [_array(each) for each in _tensors(result)]


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for each in result.values():
            yield from _tensors(each)
    elif isinstance(result, tuple | list):
        for each in result:
            yield from _tensors(each)
