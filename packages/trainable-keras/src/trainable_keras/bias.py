"""Biases as integers, in training and after, whichever Keras it is; defined by `trainable_core.reference.bias`."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.reference import bias as reference
from trainable_keras.functions import Function, Functions, Tensor
from trainable_keras.inferable import KerasInferableQuantizer


class _Known(threading.local):
    def __init__(self) -> None:
        self.holders: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


_KNOWN = _Known()


def remember(key: str, holder: Any) -> None:
    """Note a holder that was made from a config, for the biases of the layers that are made after it."""
    _KNOWN.holders[key] = holder


class BiasQuantizer:
    """Puts the bias of a layer on the grid of the layer's sums of products.

    Parameters
    ----------
    attribute : str
        The layer's attribute of its bias.
    key : str
        What tells the holder, whose quantizer makes what the layer is given, from the others of its model.
    source : KerasHolder or None
        That holder; None where `remember` is going to know it.
    of_weights : mapping of str to quantizer
        The layer's quantizers of weights.
    weight : str
        Which of them is that of the weight that the bias is added to the products with.
    repeats : int
        How many neighbouring channels of the bias share a channel of the weight, as in a depthwise convolution with a
        multiplier.
    subject : str
        Layer and attribute, for errors.

    Notes
    -----
    It is no layer and has no variables: its scale is made of those of the input and the weight, as they are at each
    call.
    """

    def __init__(
        self,
        attribute: str,
        key: str,
        source: Any,
        of_weights: Mapping[str, Any],
        *,
        weight: str,
        repeats: int,
        subject: str,
    ) -> None:
        self.attribute, self.key, self.weight = attribute, key, weight
        self.repeats, self.subject = repeats, subject
        self._source, self._of_weights = source, of_weights

    @property
    def source(self) -> Any:
        """The holder whose quantizer makes what the layer is given.

        Raises
        ------
        ModelError
            When the layer was made from a config, and the layer that has the holder was not.
        """
        if self._source is None:
            self._source = _KNOWN.holders.get(self.key)
        if self._source is None:
            problem = f"the bias {self.subject!r} needs the quantizer of {self.key!r}, which was not read"
            raise ModelError(problem, "read the whole model.")
        return self._source

    def follow(self, of_weights: Mapping[str, Any]) -> None:
        """Take other quantizers of the layer's weights."""
        self._of_weights = of_weights

    @property
    def _quantizers(self) -> tuple[Any, Any]:
        return self.source.activation_holder_quantizer, self._of_weights[self.weight]

    @property
    def is_switched_off(self) -> bool:
        """Whether the bias stays float, because the quantizer of the input or of the weight is switched off."""
        trainable = [each for each in self._quantizers if isinstance(each, BaseTrainableQuantizer)]
        return any(not each.quantization_config.enabled for each in trainable)

    def __call__(self, bias: Tensor) -> Tensor:
        """Return a float32 bias on the grid; the gradient passes to the float bias as it is."""
        of_x, of_weight = self._quantizers
        trainable = [each for each in (of_x, of_weight) if isinstance(each, BaseTrainableQuantizer)]
        if self.is_switched_off or not all(each.calibrated for each in trainable):
            return bias  # whoever has no numbers says so by itself
        functions: Functions = of_weight.functions
        scale = functions.stop_gradient(_scale_of(of_x, self.subject) * _scale_of(of_weight, self.subject))
        if self.repeats > 1 and len(scale.shape):
            scale = functions.reshape(functions.stack([scale] * self.repeats, axis=-1), (-1,))
        on_grid: Tensor = functions.show_shape(_snap(functions)(bias, scale), bias)
        return on_grid

    def scale(self) -> NDArray[np.float32]:
        """Return the real width of one unit of the bias: () or one for each of its channels."""
        of_x, of_weight = (_qparams_of(each, self.subject).scale for each in self._quantizers)
        scale = reference.bias_scale(of_x, of_weight)
        return np.repeat(scale, self.repeats) if self.repeats > 1 and scale.ndim else scale

    def check(self, bias: NDArray[Any]) -> None:
        """Raise IntegerRangeError when int32 does not hold a code of the bias."""
        if not self.is_switched_off:
            reference.check_bias(self.subject, bias, self.scale())

    def config(self) -> dict[str, Any]:
        """Return what `of_config` makes it of again; JSON-clean."""
        return {name: getattr(self, name) for name in ("attribute", "key", "weight", "repeats", "subject")}

    @classmethod
    def of_config(cls, config: Mapping[str, Any], of_weights: Mapping[str, Any]) -> BiasQuantizer:
        """Return a quantizer equal to the one that `config` was called on, in a layer with these weights."""
        rest = {name: config[name] for name in ("weight", "repeats", "subject")}
        return cls(config["attribute"], config["key"], _KNOWN.holders.get(config["key"]), of_weights, **rest)


def _scale_of(quantizer: Any, subject: str) -> Tensor:
    """Return the scale of a quantizer's grid as a tensor, without dimensions or along the channels."""
    if isinstance(quantizer, BaseTrainableQuantizer):
        scale = quantizer.grid(quantizer.tensor_ndim).scale  # type: ignore[attr-defined] # a Keras quantizer's
    elif isinstance(quantizer, KerasInferableQuantizer):
        # hidden as in training; see `KerasInferableQuantizer.snapped`
        scale = quantizer.functions.hide_shape(quantizer.functions.read(quantizer.grid_scale))
    else:
        raise _foreign(quantizer, subject)
    functions: Functions = quantizer.functions
    return functions.reshape(scale, (-1,)) if len(scale.shape) else scale


def _qparams_of(quantizer: Any, subject: str) -> Any:
    """Return the numbers of a quantizer's grid."""
    if isinstance(quantizer, BaseTrainableQuantizer):
        return quantizer.current_qparams(quantizer.selected_width)
    if isinstance(quantizer, KerasInferableQuantizer):
        return quantizer.qparams
    raise _foreign(quantizer, subject)


def _foreign(quantizer: Any, subject: str) -> QuantizerStateError:
    problem = f"its bias needs the scale of a {type(quantizer).__name__}, which is none of trainable_keras's"
    return QuantizerStateError(subject, problem)


@functools.cache
def _snap(functions: Functions) -> Function:
    """Return the function that puts a bias on a grid; the gradient passes to the bias as it is, and none to scales."""
    f = functions

    def forward(bias: Tensor, scale: Tensor) -> Tensor:
        codes = f.minimum(f.maximum(f.round(bias / scale), reference.CODE_MIN), reference.CODE_MAX)
        return codes * scale

    def backward(upstream: Tensor, _: Tensor, __: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return upstream, f.zeros_like(scale)

    made: Function = f.with_gradient(forward, backward)
    return made
