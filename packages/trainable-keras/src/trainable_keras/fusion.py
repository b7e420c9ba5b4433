"""Fake quantization in one pass over memory on TensorFlow: XLA compiles the elementwise functions of `tensor_ops`.

TensorFlow runs the plain expression operation by operation, and each writes a tensor of the input's size. Compiled
they are one loop. The same bits come out (`tests/keras/test_fusion.py` looks next to every tie): XLA rounds as often as
the expression says, since it contracts no product that is used twice, and a function of its own has no neighbours to be
fused with. Sums are left to TensorFlow: XLA's, in order on a CPU, are slower and two to five times as far off.

Compiling costs tens of milliseconds for each shape, so small tensors run the plain expression, and so do tensors whose
shape says that it may change at every call: another dimension than the first is unknown, or more shapes than `SHAPES`
have been seen. So does everything where there is another device than a CPU, or a TensorFlow without XLA, and on other
processors than x86-64, where what a compiler contracts has not been measured.

TensorFlow itself is an argument: core imports no framework.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

Tensor = Any

LEAST = 2**15
"""Elements from which on one compiled call is cheaper than the plain operations."""

BATCH = 32
"""What a batch of unknown size is taken for."""

SHAPES = 512
"""Most shapes that are compiled in one process; later ones run the plain expression."""


class Fusion:
    """Compiles elementwise functions where that pays.

    Parameters
    ----------
    tf : module
        TensorFlow.
    """

    def __init__(self, tf: Any) -> None:
        self._tf = tf
        self.compiled_shapes: set[tuple[int | None, ...]] = set()
        """Shapes for which functions have been compiled, at most `SHAPES`."""
        self.possible = functools.cache(self._possible)
        """Returns whether there is nothing but CPUs of the kind measured, and XLA to compile for them."""

    def _possible(self) -> bool:
        devices = {device.device_type for device in self._tf.config.list_physical_devices()}
        measured = platform.machine() in {"x86_64", "AMD64"}
        return devices == {"CPU"} and measured and bool(self._tf.test.is_built_with_xla())

    def pays(self, x: Tensor) -> bool:
        """Return whether a tensor is quantized by a compiled function; see the module."""
        if not x.shape.rank:
            return False
        shape = tuple(x.shape.as_list())
        known = self._tf.TensorShape(shape[1:]).num_elements()
        if known is None or known * (BATCH if shape[0] is None else shape[0]) < LEAST or not self.possible():
            return False
        if len(self.compiled_shapes) < SHAPES:
            self.compiled_shapes.add(shape)
        return shape in self.compiled_shapes

    def fused(self, plain: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Return a function that gives what `plain` gives, in one pass where that pays.

        Parameters
        ----------
        plain : callable
            Elementwise, of float32 tensors that broadcast to the first; returns a tensor of its shape, or a tuple of
            such.
        compiled : callable, optional
            What is compiled instead; it gives the same.
        """
        tf = self._tf

        @functools.cache
        def function(ranks: tuple[int | None, ...]) -> Any:
            # one trace for all shapes: TensorFlow warns of functions that are traced again and again
            specs = [tf.TensorSpec(None if rank is None else [None] * rank, tf.float32) for rank in ranks]
            return tf.function(compiled or plain, input_signature=specs, autograph=False, jit_compile=True)

        def run(x: Tensor, *others: Tensor) -> Any:
            if not self.pays(x):
                return plain(x, *others)
            # no tape looks inside: it would have the function return all that its own gradient needs
            given = [tf.stop_gradient(each) for each in (x, *others)]
            outputs = function(tuple(each.shape.rank for each in given))(*given)
            for each in outputs if isinstance(outputs, tuple) else (outputs,):
                each.set_shape(x.shape)
            return outputs

        return run
