# ruff: noqa: PLC0415 - only the engine that Keras runs on has to be installed
"""Gradients of a call on whatever engine Keras runs: `keras.ops` has none of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from trainable_keras.keras3.engine import ENGINE, Tensor


def pull_back(
    call: Callable[[Tensor], Tensor], x: Tensor, variables: Mapping[str, keras.Variable], upstream: Tensor
) -> list[Any]:
    """Return ``call(x)`` and the gradients of ``sum(upstream * call(x))``.

    Parameters
    ----------
    call : callable
        Of a tensor; on JAX, what it assigns to variables is dropped.
    x : Tensor, any shape
        Where to call it.
    variables : mapping of str to keras.Variable
        What to differentiate by besides `x`.
    upstream : Tensor or array, shape of the output
        Gradient of a loss with respect to the output.

    Returns
    -------
    list of Tensor or None
        The output, the gradient of `x`, the gradients of the variables in their order; None where none arrives.
    """
    values = [variable.value for variable in variables.values()]
    if ENGINE == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            output = call(x)
        return [output, *tape.gradient(output, [x, *values], output_gradients=ops.cast(upstream, output.dtype))]
    if ENGINE == "jax":
        import jax

        def function(x: Tensor, values: list[Tensor]) -> Tensor:
            with keras.StatelessScope(list(zip(variables.values(), values, strict=True))):
                return call(x)

        output, pull = jax.vjp(function, x, values)
        d_x, found = pull(ops.cast(upstream, output.dtype))
        return [output, d_x, *found]
    import torch

    output = call(x.requires_grad_())
    wanted = [each for each in (x, *values) if each.requires_grad and output.requires_grad]
    given = ops.cast(upstream, output.dtype)
    found = iter(torch.autograd.grad(output, wanted, given, allow_unused=True) if wanted else ())  # keeps the .grad
    return [output.detach(), *(next(found) if any(each is one for one in wanted) else None for each in (x, *values))]
