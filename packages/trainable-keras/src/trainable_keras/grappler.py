"""What keeps Grappler, the optimizer of TensorFlow's graphs, from changing the last bit of ``1 / scale``.

Grappler replaces ``1 / y`` by an operation of its own, ``Reciprocal``, which gives another float32 in a third of the
cases. It does so only where it knows that the quotient has the shape of `y`. So a grid's scale reaches a training
method as a tensor whose shape Grappler does not know, and a method may simply write ``x * (1 / grid.scale)``.
"""

from __future__ import annotations

from typing import Any

Tensor = Any


def hide_shape(tf: Any, x: Tensor) -> Tensor:
    """Return `x`; in a graph, as a tensor whose shape Python knows and Grappler does not.

    Parameters
    ----------
    tf : module
        TensorFlow.
    x : Tensor
        Any tensor; gradients don't pass.
    """
    if tf.executing_eagerly():
        return x
    hidden = tf.raw_ops.PlaceholderWithDefault(input=x, shape=tf.TensorShape(None))
    hidden.set_shape(x.shape)
    return hidden


def show_shape(tf: Any, x: Tensor, shape: Any) -> Tensor:
    """Return `x`; in a graph, as a tensor whose shape Grappler knows as well as Python does.

    Parameters
    ----------
    tf : module
        TensorFlow.
    x : Tensor
        What was computed with a tensor of hidden shape.
    shape : TensorShape
        Its shape.
    """
    return x if tf.executing_eagerly() or shape.rank is None else tf.ensure_shape(x, shape)
