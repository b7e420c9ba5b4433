"""From a deployed model to a file for a runtime: what only PyTorch can tell; the rest is `trainable_core.export`."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from trainable_core.calibration.batches import inputs_of
from trainable_core.documents.files import as_path, require_writable, write_atomically
from trainable_core.errors import (
    InvalidArgumentError,
    MissingLibraryError,
    ModelError,
    QuantizerStateError,
    UnsupportedConfigError,
    nearest,
)
from trainable_core.export import qdq, qonnx
from trainable_core.export.libraries import library
from trainable_core.export.report import ExportReport
from trainable_core.export.source import DOMAIN, NAME_TARGET, QUANTIZE, QuantizerRecord, Source
from trainable_core.qparams import QParams
from trainable_torch import __version__
from trainable_torch.copying import copied
from trainable_torch.description import place_of_holder
from trainable_torch.granularity import DynamicInferableQuantizer
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.mctq import to_mctq
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.structure.operations import CONTAINER
from trainable_torch.wrapper import QuantizationWrapper
from trainable_torch.wrapping import state_of

EXTRA = "trainable-torch[onnx]"

TARGETS = ("mctq", "onnx", "qonnx")
"""What `export` can write."""


def export(
    deployed: nn.Module,
    path: str | PathLike[str],
    target: str = "onnx",
    *,
    example: Any = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Write a deployed model for a runtime, with the very integers that it computes with.

    Parameters
    ----------
    deployed : Module
        What `finalize` returned; left as it is.
    path : path
        File to write; an old one is replaced only once the new one is complete on disk.
    target : {"onnx", "qonnx", "mctq"}
        ``onnx``: QuantizeLinear and DequantizeLinear with integer constants, for ONNX Runtime and OpenVINO. ``qonnx``:
        ``Quant`` nodes with the true widths, for FPGA flows. ``mctq``: what `to_mctq` returns, by `torch.save`.
    example : batch
        A batch as `calibrate` takes them: the model is traced with it. The number of rows of a file is free. ``mctq``
        needs it only where `to_mctq` does.
    external_data : bool, optional
        Whether large constants go into a second file beside it; by default from one gigabyte on.

    Returns
    -------
    ExportReport
        What is in the file, and which parts of it stay float, with the reasons. Prints as text.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, is of another backend, is sharded, or can't be traced.
    QuantizerStateError
        When it is not finalized.
    UnsupportedConfigError
        When the target can't express something; names layer and tensor.
    InvalidArgumentError
        When the target is unknown, or the example is missing.
    MissingLibraryError
        When a library that the target needs is not installed; names the extra.
    DocumentError
        When the file can't be written.
    """
    if target not in TARGETS:
        problem = f"there is no target {target!r}; there are {', '.join(TARGETS)}{nearest(target, TARGETS)}"
        raise InvalidArgumentError("export", problem)
    state_of(deployed)
    require_whole(deployed, "export")
    require_finalized(deployed, "export")
    require_writable(as_path(path))
    if target == "mctq":
        return _write_mctq(deployed, path, example)
    source = source_of(deployed, example)
    write = qonnx.write if target == qonnx.TARGET else qdq.write
    return write(source, path, external_data)


def _write_mctq(deployed: nn.Module, path: Any, example: Any) -> ExportReport:
    stock = to_mctq(deployed, example)
    for module in stock.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                # `torch.save` looks for the module of a type, and a postponed one is a string
                node.type = None if isinstance(node.type, str) else node.type
            module.recompile()
    buffer = io.BytesIO()
    torch.save(stock, buffer)
    write_atomically(as_path(path), buffer.getvalue())
    return ExportReport(str(path), "mctq", len(buffer.getvalue()))


def require_finalized(model: nn.Module, verb: str) -> None:
    """Refuse a model with quantizers that are still trainable, or were made by others."""
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, BasePytorchTrainableQuantizer):
            if quantizer.quantization_config.enabled:
                problem = f"{quantizer.subject} is still trainable"
                raise QuantizerStateError(type(model).__name__, problem, f"{verb}(finalize(qmodel), ...).")
        elif isinstance(quantizer, DynamicInferableQuantizer):
            problem = f"{name} computes its scales from the activation itself, which no file format here holds"
            raise UnsupportedConfigError(verb, problem, NAME_TARGET)
        elif not isinstance(quantizer, InferableQuantizer):
            kind = f"{type(quantizer).__module__}.{type(quantizer).__name__}"
            problem = f"{name} is a {kind}, whose codes are not known"
            raise UnsupportedConfigError(verb, problem, "a quantizer's convert2inferable returns one of this package.")
        elif quantizer.blocks is not None:
            problem = f"{name} has a scale for each group of weights or each expert, which no file format here holds"
            raise UnsupportedConfigError(verb, problem, NAME_TARGET)


def named_quantizers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return every quantizer in use with a name, the same one several times where it is shared."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizationWrapper):
            layer = name or "model"
            found += [(f"{layer}.{attribute}", quantizer) for attribute, quantizer in module.weights_quantizers.items()]
        elif isinstance(module, ActivationQuantizationHolder):
            found.append((holder_name(name), module.activation_holder_quantizer))
    return found


def holder_name(name: str) -> str:
    """Return the name of a holder's quantizer in files, from that of its module."""
    layer, tensor = place_of_holder(name.removeprefix(f"{CONTAINER}."))
    return f"{layer}: {tensor}"


# ---- what the framework tells ---------------------------------------------------------------------------------------


def source_of(deployed: nn.Module, example: Any) -> Source:
    """Return a deployed model as `trainable_core.export` takes it."""
    library("onnx", "export", EXTRA)
    library("onnxscript", "export", EXTRA)
    if example is None:
        raise InvalidArgumentError("export", "it needs an example, a batch as `calibrate` takes them", "example=batch.")
    _require_float32(deployed)
    _require_no_tables(deployed)
    quantizers = records(deployed)
    state = state_of(deployed)
    versions = {"trainable-torch": __version__, **{name: metadata.version(name) for name in ("torch", "onnxscript")}}
    recipe = state.recipe.model_dump(mode="json", exclude_none=True)
    return Source(_traced(deployed, example), quantizers, recipe, versions)


def _require_no_tables(model: nn.Module) -> None:
    """Refuse a model with values of a look-up table, of which integer kernels would round to every code."""
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, InferableQuantizer) and quantizer.qparams.levels:
            problem = f"{name} has values of a table, which integer kernels don't have"
            raise UnsupportedConfigError("export", problem, NAME_TARGET)


def _require_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values to export")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            problem = f"{name} is {parameter.dtype}; integer kernels know float32 alone"
            raise UnsupportedConfigError("export", problem, "deployed.float() before it.")


def records(deployed: nn.Module) -> dict[str, QuantizerRecord]:
    """Return what is told of every quantizer of a deployed model, by name; a shared one is named by its first place."""
    found: dict[str, QuantizerRecord] = {}
    seen: set[int] = set()
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizationWrapper):
            layer = name or "model"
            module.compute_weights()
            values = module.get_quantized_weights()
            for attribute, _, quantizer in module.get_weights_vars():
                if isinstance(quantizer, InferableQuantizer) and id(quantizer) not in seen:
                    seen.add(id(quantizer))
                    codes = codes_of(values[attribute], quantizer.qparams)
                    record = QuantizerRecord(
                        f"{layer}.{attribute}", layer, str(attribute), quantizer.num_bits, quantizer.qparams, codes
                    )
                    found[record.name] = record
        elif isinstance(module, ActivationQuantizationHolder):
            quantizer = module.activation_holder_quantizer
            if isinstance(quantizer, InferableQuantizer) and id(quantizer) not in seen:
                seen.add(id(quantizer))
                layer, tensor = place_of_holder(name.removeprefix(f"{CONTAINER}."))
                record = QuantizerRecord(f"{layer}: {tensor}", layer, tensor, quantizer.num_bits, quantizer.qparams)
                found[record.name] = record
    return found


def codes_of(value: Tensor, grid: QParams) -> Any:
    """Return the codes, int32, of values that are on a grid."""
    along = grid.along(value.dim())
    steps = np.rint(value.detach().cpu().numpy().astype(np.float64) / along.scale.astype(np.float64))
    return (steps.astype(np.int64) + along.zero_point).astype(np.int32)


# ---- tracing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How a model is called with a batch.

    Parameters
    ----------
    args : tuple
        Positional arguments.
    kwargs : dict
        Arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: Any) -> Call:
        """Return the call with a batch as `calibrate` takes them."""
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        return cls((inputs_of(batch),), {})

    @property
    def tensors(self) -> list[Tensor]:
        """Its arguments that are tensors."""
        return [each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)]

    def repeated(self) -> Call:
        """Return the same with two rows in the place of a single one, which tracing would take for a constant."""
        rows = self._rows()
        if rows != 1:
            return self
        double = functools.partial(_doubled, rows=rows)
        return Call(tuple(map(double, self.args)), {name: double(value) for name, value in self.kwargs.items()})

    def dynamic(self) -> Any:
        """Return which dimensions of the arguments may have other sizes: the rows."""
        rows = self._rows()

        def of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            return {0: torch.export.Dim.AUTO} if value.dim() and value.shape[0] == rows else {}

        return {name: of(value) for name, value in self.kwargs.items()} if self.kwargs else tuple(map(of, self.args))

    def _rows(self) -> int:
        return next((int(each.shape[0]) for each in self.tensors if each.dim()), 0)


def _doubled(value: Any, rows: int) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value


def _traced(deployed: nn.Module, example: Any) -> Any:
    """Return the model as an ONNX graph in which each quantizer is one node."""
    ops = getattr(torch.onnx, "ops", None)
    if ops is None or not hasattr(ops, "symbolic"):
        raise MissingLibraryError(
            "torch", "export", f"torch {torch.__version__} has no torch.onnx.ops.symbolic", "pip install 'torch>=2.8'"
        )
    model = copied(deployed).eval()
    names: dict[int, str] = {}
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, InferableQuantizer):
            names.setdefault(id(quantizer), name)
            quantizer.__dict__["forward"] = functools.partial(_as_node, names[id(quantizer)])
    _store_biases(model)
    call = Call.of(example).repeated()
    try:
        with torch.no_grad(), _without_remarks():
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=call.dynamic(), strict=False)
            written = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        problem = f"{type(deployed).__name__} can't be traced for export: {told}"
        raise ModelError(
            problem, "torch.onnx.export(model, (batch,), dynamo=True) must take the float model."
        ) from error
    assert written is not None  # noqa: S101 - it returns a program unless it is given a file
    return written.model_proto


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what the exporter warns and logs of its own internals."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _store_biases(model: nn.Module) -> None:
    """Put the biases that a model computes with into the parameters of a copy that is traced."""
    for module in model.modules():
        stored = module.integer_bias() if isinstance(module, QuantizationWrapper) else None
        if stored is not None:
            name, value = stored
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001 - past our class's reading
            quantizer: Any = module.bias_quantizer
            quantizer.__dict__["forward"] = _unchanged


def _unchanged(bias: Tensor) -> Tensor:
    return bias


OPSET = 20
"""The opset that is asked of the exporter: the newest that it writes without converting."""


def _as_node(name: str, x: Tensor) -> Tensor:
    """Stand for a quantizer in a trace."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{QUANTIZE}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return result
