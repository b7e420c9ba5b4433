"""A wrapped Keras model as core looks at it: to diagnose it, to follow its training, and to report on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from trainable_core.backend.view import Forward, ModelView, QuantizedTensor, See, VariableKey
from trainable_core.calibration.batches import inputs_of
from trainable_core.errors import ModelError
from trainable_core.qparams import Float32
from trainable_keras.calibration import calls_replaced, in_inference, put_back
from trainable_keras.description import quantized_tensors
from trainable_keras.distillation import main_output
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, parts_among, told_of, variable_of
from trainable_keras.statistics import batch_norms
from trainable_keras.wrapping import state_of


class KerasView(ModelView):
    """What core asks of Keras.

    Parameters
    ----------
    framework : Framework
        The Keras that the model belongs to.
    qmodel : keras.Model
        What `wrap` or `finalize` returned.
    forward : callable, optional
        ``forward(qmodel, batch)``, when batches need another call.
    """

    package = "trainable_keras"

    def __init__(self, framework: Framework, qmodel: Any, forward: Forward | None = None) -> None:
        state = state_of(framework, qmodel)
        self.framework = framework
        self.layers = layers_within(qmodel)
        super().__init__(qmodel, state, tuple(quantized_tensors(parts_among(self.layers))), forward)

    # ---- the model as it stands -------------------------------------------------------------------------------------

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values."""
        return self._array(variable_of(tensor.part, tensor.tensor))

    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""
        with self.framework.eagerly():
            found = tensor.part.get_quantized_weights(False, (tensor.tensor,))  # noqa: FBT003 - mctq's call
            return self._array(found[tensor.tensor])

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that learns."""
        return {
            norm.name: (self._array(norm.moving_mean), self._array(norm.moving_variance))
            for norm in batch_norms(self.framework, self.model)
        }

    # ---- the model while it runs ------------------------------------------------------------------------------------

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Call eagerly, and leave variables and notes as they were."""
        told = [told_of(each) for each in self.layers if isinstance(each, KerasWrapper)]
        noted = [set(each.read) for each in told]
        try:
            with self.framework.eagerly(), put_back(self.framework, self.model):
                yield
        finally:
            for each, read in zip(told, noted, strict=True):
                each.read = read

    @contextmanager
    def watching(self, seen: Mapping[QuantizedTensor, See]) -> Iterator[None]:
        """Show what holders are called with and return."""
        replaced = [(tensor.part, partial(self._shown, see)) for tensor, see in seen.items()]
        with calls_replaced(replaced):
            yield

    def _shown(self, see: See, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(inputs, *args, **kwargs)
            if "float" in str(getattr(inputs, "dtype", "")):
                see(self._array(inputs), lambda: self._array(output))
            return output

        return called

    @contextmanager
    def quantizing(self, layers: Collection[str] | None) -> Iterator[None]:
        """Let only some layers quantize."""
        silent = [each.part for each in self.tensors() if layers is not None and each.layer.name not in layers]
        wrappers = [told_of(part) for part in silent if isinstance(part, KerasWrapper)]
        holders = [part for part in silent if isinstance(part, KerasHolder)]
        try:
            for told in wrappers:
                told.quantizes_weights = False
            with calls_replaced([(holder, _passing) for holder in holders]):
                yield
        finally:
            for told in wrappers:
                told.quantizes_weights = True

    @contextmanager
    def replacing(self, values: Mapping[QuantizedTensor, Float32]) -> Iterator[None]:
        """Let quantizers of weights return given values."""
        f = self.framework.functions
        arrays = {id(tensor.quantizer): (tensor.quantizer, array) for tensor, array in values.items()}

        def giving(array: Float32, _call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda weight, *_, **__: f.cast(f.floats(array), f.dtype_of(weight))

        with calls_replaced([(quantizer, partial(giving, array)) for quantizer, array in arrays.values()]):
            yield

    @contextmanager
    def outputs_of(self, tensor: QuantizedTensor) -> Iterator[list[Float32]]:
        """Note the outputs of a weight's layer."""
        found: list[Float32] = []

        def noted(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                output = call(*args, **kwargs)
                value = main_output(output)
                if self.framework.functions.is_tensor(value):
                    found.append(self._array(value))
                return output

            return called

        with calls_replaced([(tensor.part, noted)]):
            yield found

    def call(self, batch: Any) -> Any:
        """Call the model with a batch's inputs."""
        return self.model(inputs_of(batch), training=False)

    def call_teacher(self, teacher: Any, batch: Any) -> Any:
        """Call another model in inference."""
        return teacher(inputs_of(batch), training=False) if self.forward is None else self.forward(teacher, batch)

    def main_output(self, outputs: Any) -> Float32:
        """Return the values of the first output."""
        return self._array(self._main(outputs))

    def _main(self, outputs: Any) -> Any:
        found = main_output(outputs)
        if not self.framework.functions.is_tensor(found):
            problem = f"the model returned {type(found).__name__}, and no tensor is found in it"
            raise ModelError(problem, "forward=lambda qmodel, batch: ... returns the tensor that counts.")
        return found

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Float32], Float32]
    ) -> Mapping[VariableKey, Float32 | None]:
        """Return gradients with the quantizers in training mode."""

        def output() -> Any:
            if self.forward is not None:
                return self._main(self.forward(self.model, batch))
            return self._main(self.model(inputs_of(batch), training=True))

        with put_back(self.framework, self.model), in_inference(self.framework, self.layers):
            given = upstream(self._array(output()))
        with put_back(self.framework, self.model), in_inference(self.framework, self.layers):
            named = {f"{number} {name}": each for (number, name), each in variables.items()}
            found = self.framework.pull_back(output, named, given)
        return {key: None if each is None else self._array(each) for key, each in zip(variables, found, strict=True)}

    def _array(self, value: Any) -> Float32:
        return np.asarray(self.framework.functions.to_numpy(value), np.float32)


def _passing(_call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in the place of a holder's call, and passes its input on."""
    return lambda inputs, *_, **__: inputs
