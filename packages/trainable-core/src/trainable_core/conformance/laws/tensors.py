"""Laws on calls: dtype, shape and device of the output, and what a call must not change."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject
from trainable_core.conformance.law import law, require, same_bits

FLOATS: dict[str, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


@law("The next layer fails, or takes more memory, when quantization changes the dtype, shape or device.")
def dtype_shape_device(subject: Subject, case: Case) -> None:
    """The output has the input's dtype, shape and device, and is computed in float32."""
    quantizer = subject.quantizer(case)
    for device in subject.adapter.devices:
        for dtype in subject.adapter.dtypes:
            for training in (False, True):
                run = subject.run(quantizer, case.x, training=training, dtype=dtype, device=device)
                got = (run.dtype, run.values.shape, run.device)
                require(
                    "dtype, shape and device", got == (dtype, case.x.shape, device), (dtype, case.x.shape, device), got
                )
            if dtype in FLOATS and device == subject.adapter.devices[0]:
                with np.errstate(over="ignore"):
                    given = case.x.astype(FLOATS[dtype])
                    single = subject.values(quantizer, given.astype(np.float32)).astype(FLOATS[dtype])
                got_values = subject.run(quantizer, given, dtype=dtype).values
                same_bits(f"a {dtype} tensor computed in float32", got_values.astype(FLOATS[dtype]), single)


@law("The caller may need the tensor again, for example for a residual connection.")
def no_mutation(subject: Subject, case: Case) -> None:
    """No forward or backward call changes its input."""
    quantizer = subject.quantizer(case)
    for training in (False, True):
        for upstream in (case.upstream, None):  # also an input that needs no gradient
            run = subject.run(quantizer, case.x, training=training, upstream=upstream)
            same_bits("the input after the call", run.input_after, case.x)


@law("Two evaluations of a model must agree, and an evaluation must not train it.")
def determinism(subject: Subject, case: Case) -> None:
    """In eval mode the same call gives the same bits, whatever was called between, and nothing changes in the state."""
    quantizer = subject.quantizer(case)
    before = subject.adapter.entries(quantizer)
    first = subject.values(quantizer, case.x)
    subject.values(quantizer, case.x[::-1] * np.float32(3) if case.x.ndim else case.x * np.float32(3))
    subject.run(quantizer, case.x, upstream=case.upstream)  # as for a saliency map
    same_bits("the same call again", subject.values(quantizer, case.x), first)
    after = subject.adapter.entries(quantizer)
    require("names in the state after evaluating", sorted(after) == sorted(before), sorted(before), sorted(after))
    for name, value in after.items():
        same_bits(f"{name} after evaluating", value, before[name])
