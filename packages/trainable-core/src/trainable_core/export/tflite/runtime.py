"""LiteRT with every code visible, and which kernels ran."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np

from trainable_core.errors import ModelError
from trainable_core.export.graph import Array
from trainable_core.export.libraries import first_of
from trainable_core.export.runtime import Processor, processor_flags
from trainable_core.export.tflite.flatbuffer import EXTRA, to_bytes
from trainable_core.export.tflite.program import Program, TfliteOperator, TfliteTensor
from trainable_core.integer.lite import OPTIMIZED, REFERENCE, XNNPACK, Ties

RUNTIMES = ("ai_edge_litert.interpreter", "tensorflow.lite.python.interpreter")
"""Modules with an interpreter: LiteRT's, or TensorFlow's."""

DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tensorflow": "tensorflow"}

KERNELS = {"default": "AUTO", "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}
"""The choices of kernels, by name, with what the runtime calls them."""


class Runtime:
    """A file in LiteRT.

    Parameters
    ----------
    content : bytes
        The file.
    program : Program
        What is in it.
    watched : sequence of str
        Tensors that are to be outputs besides the file's own; kernels stay as they are.
    kernels : {"default", "builtin", "reference"}
        Which kernels run: what the runtime uses by default, its own optimized ones, or its reference ones.

    Raises
    ------
    MissingLibraryError
        When no runtime is installed.
    ModelError
        When the runtime refuses the file.
    """

    def __init__(self, content: bytes, program: Program, watched: Sequence[str] = (), kernels: str = "default") -> None:
        self.library = first_of(RUNTIMES, "running an exported file", EXTRA)
        self.own = list(program.outputs)
        self.names = [*self.own, *(name for name in dict.fromkeys(watched) if name not in self.own)]
        if len(self.names) > len(self.own):
            content = to_bytes(replace(program, outputs=self.names, metadata=""), "running an exported file")
        self.inputs, self.kernels = list(program.inputs), kernels
        resolver = getattr(self.library.OpResolverType, KERNELS[kernels])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TensorFlow's interpreter tells of LiteRT's
                self.interpreter = self.library.Interpreter(
                    model_content=content, experimental_op_resolver_type=resolver, num_threads=1
                )
            self.interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{version()} refuses the file: {error}") from error
        self._inputs = [each["index"] for each in self.interpreter.get_input_details()]
        self._outputs = [each["index"] for each in self.interpreter.get_output_details()]
        self.families = self._families()

    def _families(self) -> dict[str, str]:
        """Return the family of kernels that makes each watched tensor."""
        details = self.interpreter._get_ops_details()  # noqa: SLF001 - there is no public way
        delegated = {int(i) for each in details if each["op_name"] == "DELEGATE" for i in each["outputs"]}
        own = REFERENCE if self.kernels == "reference" else OPTIMIZED
        places = dict(zip(self.names, self._outputs, strict=True))
        return {name: XNNPACK if place in delegated else own for name, place in places.items()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output and every watched tensor.

        Raises
        ------
        ModelError
            When the runtime fails.
        """
        try:
            for index, name in zip(self._inputs, self.inputs, strict=True):
                if tuple(self.interpreter.get_tensor(index).shape) != feeds[name].shape:
                    self.interpreter.resize_tensor_input(index, list(feeds[name].shape))
            self.interpreter.allocate_tensors()
            for index, name in zip(self._inputs, self.inputs, strict=True):
                self.interpreter.set_tensor(index, np.ascontiguousarray(feeds[name]))
            self.interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{version()} fails: {error}") from error
        self.families = self._families()
        pairs = zip(self.names, self._outputs, strict=True)
        return {name: np.array(self.interpreter.get_tensor(index)) for name, index in pairs}


@functools.cache
def kernel_ties() -> Ties:
    """Return how the runtime's XNNPACK rounds ties, found out with means of a half and of one and a half.

    The zero point is 1, so a tie goes to another code where that is added before the mean is rounded.
    """
    scale, codes = np.asarray(1, np.float32), np.asarray([[[[1, 3]], [[0, 0]]]], np.int8)
    program = Program()
    for tensor in (
        TfliteTensor("x", "int8", codes.shape, scale, np.asarray(0, np.int32)),
        TfliteTensor("axes", "int32", (2,), data=np.asarray([1, 2], np.int32)),
        TfliteTensor("mean", "int8", (1, 2), scale, np.asarray(1, np.int32)),
    ):
        program.tensors[tensor.name] = tensor
    program.operators = [TfliteOperator("MEAN", ("x", "axes"), ("mean",), {"keepDims": False})]
    program.inputs, program.outputs = ["x"], ["mean"]
    found = Runtime(to_bytes(program), program).run({"x": codes})["mean"]
    return {(1, 3): Ties.EVEN, (2, 2): Ties.EVEN_CODE}.get((int(found[0, 0]), int(found[0, 1])), Ties.AWAY)


def version() -> str:
    """Return the name and the version of the runtime."""
    library: Any = first_of(RUNTIMES, "running an exported file", EXTRA)
    root = library.__name__.partition(".")[0]
    # TensorFlow comes in distributions of several names, such as tensorflow-cpu
    distribution = next(iter(metadata.packages_distributions().get(root, ())), DISTRIBUTIONS[root])
    return f"{DISTRIBUTIONS[root]} {metadata.version(distribution)}"


def processor() -> Processor:
    """Return which runtime and which processor this is."""
    return Processor(version(), processor_flags())
