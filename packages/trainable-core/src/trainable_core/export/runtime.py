"""ONNX Runtime with every code visible: its tensors, and the kernels that it chose."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainable_core.errors import ModelError
from trainable_core.export.graph import Array
from trainable_core.export.libraries import library

CPU = ("CPUExecutionProvider",)

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""Features of a processor that decide which integer kernels there are."""


EXACT_SUMS = ("session.x64quantprecision", "1")
"""Entry of a session's configuration by which pairs of products of 8-bit codes are added up in more than 16 bits.

x86 processors with AVX2 or AVX-512 and no VNNI saturate them without it; elsewhere it has no effect.
"""


class Runtime:
    """A file in ONNX Runtime's CPU provider, with its default optimizations and exact sums.

    Parameters
    ----------
    model : onnx.ModelProto
        With its data.
    watched : sequence of str
        Tensors that are to be outputs besides the graph's own. Fused kernels stay as they are, because what they give
        are codes.
    """

    def __init__(self, model: Any, watched: Sequence[str] = ()) -> None:
        self.library = library("onnxruntime", "running an exported file")
        onnx = library("onnx", "running an exported file")
        instrumented = type(model)()
        instrumented.CopyFrom(model)
        own = [each.name for each in model.graph.output]
        types = _types(onnx, model)
        for name in watched:
            if name not in own:
                instrumented.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
        self.names = [*own, *(name for name in watched if name not in own)]
        self.own = own
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            optimized = Path(folder) / "optimized.onnx"
            onnx.save(instrumented, str(path), save_as_external_data=_is_large(model), location="model.data")
            options = self.library.SessionOptions()
            options.log_severity_level = 3
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(*EXACT_SUMS)
            try:
                self.session = self.library.InferenceSession(str(path), options, providers=list(CPU))
            except Exception as error:  # its own classes, all of them subclasses of Exception
                raise ModelError(f"ONNX Runtime {self.library.__version__} refuses the file: {error}") from error
            self.kernels = kernels_of(onnx.load(str(optimized), load_external_data=False))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output and every watched tensor."""
        return dict(zip(self.names, self.session.run(self.names, dict(feeds)), strict=True))


def _types(onnx: Any, model: Any) -> dict[str, int]:
    """Return the element type of each tensor that codes stand in: that of the zero point of its QuantizeLinear."""
    constants = {each.name: each.data_type for each in model.graph.initializer}
    found = dict(constants)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            found[node.output[0]] = constants[node.input[2]]
        elif node.input and node.input[0] in found:
            found.update(dict.fromkeys(node.output, found[node.input[0]]))
        else:
            found.update(dict.fromkeys(node.output, onnx.TensorProto.FLOAT))
    return found


def _is_large(model: Any) -> bool:
    return sum(len(each.raw_data) for each in model.graph.initializer) > 1 << 30


def kernels_of(optimized: Any) -> dict[str, str]:
    """Return the kernel that computes each tensor, by the graph that the runtime made for itself.

    A runtime lays tensors out as its kernels want them; what only moves values is looked through.
    """
    made = {name: node for node in optimized.graph.node for name in node.output if name}
    found = {}
    for name, maker in made.items():
        node = maker
        while node.op_type in ("Transpose", "Reshape", "ReorderOutput") and node.input[0] in made:
            node = made[node.input[0]]
        found[name] = node.op_type
    return found


@dataclass(frozen=True)
class Processor:
    """What a comparison ran on.

    Parameters
    ----------
    runtime : str
        Name and version of the runtime.
    flags : tuple of str
        Those of `FLAGS` that the processor has; empty where the system does not tell.
    """

    runtime: str
    flags: tuple[str, ...]

    @property
    def saturates(self) -> bool:
        """Whether ONNX Runtime saturates sums of 8-bit products unless a session has the entry `EXACT_SUMS`."""
        known = self.runtime.startswith("onnxruntime") and "avx2" in self.flags
        return known and not {"avx_vnni", "avx512_vnni"} & {*self.flags}


def processor() -> Processor:
    """Return which runtime and which processor this is."""
    runtime = library("onnxruntime", "running an exported file")
    return Processor(f"onnxruntime {runtime.__version__}", processor_flags())


def processor_flags() -> tuple[str, ...]:
    """Return those of `FLAGS` that the processor has; none where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    line = next((each for each in text.splitlines() if each.startswith(("flags", "Features"))), "")
    return tuple(flag for flag in FLAGS if flag in line.split())


def seconds(call: Any, repeats: int = 5) -> float:
    """Return the shortest time that a call took."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
