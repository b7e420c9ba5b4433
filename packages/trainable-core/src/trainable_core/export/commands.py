"""The command ``trainable verify``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainable_core.errors import DocumentError, InvalidArgumentError
from trainable_core.export.graph import Array

if TYPE_CHECKING:
    from trainable_core.export.tflite.program import TfliteTensor
    from trainable_core.export.verification import VerificationReport

EQUAL, DIFFERENT = 0, 1
"""Exit codes: the file is as it was written and every code is equal; something is not."""

ROWS = 8
"""Rows of a random batch."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("file", type=Path, help="what `export` wrote for the target onnx or tflite")
    parser.add_argument("--inputs", type=Path, metavar="NPZ", help="arrays by the names of the file's inputs")
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="random batches without --inputs")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random batches")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of tables")


def verify(
    given: argparse.Namespace, print_table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]
) -> int:
    """Run a file and print what differs; returns the exit code."""
    if given.batches < 1:
        raise InvalidArgumentError("trainable verify", f"--batches must be at least 1, got {given.batches}")
    from trainable_core.export.files import is_tflite  # noqa: PLC0415 - no other command needs it

    report = (_verify_tflite if is_tflite(given.file) else _verify_onnx)(given)
    if given.json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        print_table("codes", *report.table())
        sys.stdout.write(report.summary() + "\n")
    return EQUAL if report.ok else DIFFERENT


def _verify_onnx(given: argparse.Namespace) -> VerificationReport:
    from trainable_core.export.verification import Verification, feeds_of  # noqa: PLC0415 - no other command needs it

    verification = Verification(given.file)
    inputs = verification.graph.inputs
    random = np.random.default_rng(given.seed)
    batches: list[Mapping[str, Array]]
    if given.inputs is not None:
        batches = [feeds_of(inputs, _arrays(given.inputs))]
    else:
        batches = [{each.name: _random(each, random) for each in inputs} for _ in range(given.batches)]
    for feeds in batches:
        verification.run(feeds)
    return verification.report


def _verify_tflite(given: argparse.Namespace) -> VerificationReport:
    from trainable_core.export.tflite.verification import Verification  # noqa: PLC0415 - no other command needs it

    verification = Verification(given.file)
    random = np.random.default_rng(given.seed)
    if given.inputs is not None:
        verification.run(_arrays(given.inputs))
        return verification.report
    tensors = [verification.program.tensors[name] for name in verification.program.inputs]
    for _ in range(given.batches):
        shapes = {each.name: [ROWS if size is None else size for size in each.shape] for each in tensors}
        verification.run(
            {name: _numbers(verification.program.tensors[name], shape, random) for name, shape in shapes.items()}
        )
    return verification.report


def _numbers(tensor: TfliteTensor, shape: list[int], random: np.random.Generator) -> Array:
    """Return random codes, or random numbers where an input is real."""
    if tensor.is_quantized:
        return random.integers(-128, 128, shape).astype(np.int8)
    return random.standard_normal(shape).astype(np.float32)


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: a single array has no names
        raise DocumentError(path, f"no file of NumPy's arrays by name: {error}") from error


def _random(info: Any, random: np.random.Generator) -> Array:
    """Return a random input: normal numbers, or zeros and ones where it takes integers."""
    kind = info.type.tensor_type
    shape = [each.dim_value or ROWS for each in kind.shape.dim]
    if kind.elem_type == 1:
        return np.asarray(random.standard_normal(shape), np.float32)
    dtypes = {6: np.int32, 7: np.int64, 9: np.bool_}
    if kind.elem_type not in dtypes:
        problem = f"input {info.name!r} has the element type {kind.elem_type}, for which there are no random values"
        raise InvalidArgumentError("trainable verify", problem, "--inputs FILE.npz.")
    return random.integers(0, 2, shape).astype(dtypes[kind.elem_type])
