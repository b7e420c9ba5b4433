"""Batch normalization that is simulated as folded while a model trains: what is quantized is what is deployed.

The weight is multiplied by the gain of the running statistics before it is quantized, ``w' = w * gamma / sigma``, as it
is when the model is deployed. In training, batches are normalized by their own statistics: these are taken from the
layer's products with the float weight, and the products with the quantized weight are corrected by ``sigma /
sigma_batch``. So the grid of the weight moves with the running statistics only, while the layer computes what batch
normalization computes.

References
----------
Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018, arXiv:1806.08342,
section 3.2.2 and figures 7 and 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]


def gain(gamma: Float | None, variance: Float, epsilon: float) -> Float:
    """Return what the weights of each output channel are multiplied by: ``gamma / sigma``.

    Parameters
    ----------
    gamma : float array, shape (C,), or None
        The normalization's own scale; None counts as ones.
    variance : float array, shape (C,)
        The running variance.
    epsilon : float
        What is added to it.

    Returns
    -------
    float array, shape (C,)
        Square root and quotient are each rounded once, in the dtype of `variance`; backends compute in float32.

    Examples
    --------
    >>> gain(np.array([3.0]), np.array([3.0]), 1.0)
    array([1.5])
    """
    deviation = np.sqrt(variance + variance.dtype.type(epsilon))
    return np.asarray((np.ones_like(deviation) if gamma is None else gamma) / deviation)


def folded_bias(bias: Float, gamma: Float, beta: Float, mean: Float, variance: Float, epsilon: float) -> Float:
    """Return the bias of the folded layer: ``(b - mean) * gamma / sigma + beta``.

    Parameters
    ----------
    bias : float array, shape (C,)
        The layer's own bias; zeros where it has none.
    gamma, beta : float array, shape (C,)
        The normalization's scale and shift.
    mean, variance : float array, shape (C,)
        Its running statistics.
    epsilon : float
        What is added to the variance.

    Returns
    -------
    float array, shape (C,)
        What the layer adds in evaluation mode, in training with frozen statistics, and when it is deployed.

    Examples
    --------
    >>> one = np.ones(1)
    >>> folded_bias(2 * one, 3 * one, one, one, 3 * one, 1.0)
    array([2.5])
    """
    return np.asarray((bias - mean) * gain(gamma, variance, epsilon) + beta)


def updated(running: Float, of_batch: Float, momentum: float) -> Float:
    """Return a running statistic after a batch: ``(1 - momentum) * running + momentum * of_batch``.

    Parameters
    ----------
    running, of_batch : float array, shape (C,)
        What there was, and what the batch has.
    momentum : float
        Share of the batch, as PyTorch counts; Keras's momentum is the share of what there was.

    Returns
    -------
    float array, shape (C,)
    """
    return np.asarray((1 - momentum) * running + momentum * of_batch)


class Statistics(NamedTuple):
    """Mean and biased variance of a batch, each of shape (C,)."""

    mean: Float
    variance: Float


def batch_statistics(products: Float) -> Statistics:
    """Return the statistics of a layer's products with its float weight.

    Parameters
    ----------
    products : float array, shape (..., C)
        Without the bias; the mean of what is normalized is that much larger.

    Returns
    -------
    Statistics

    Examples
    --------
    >>> [float(each[0]) for each in batch_statistics(np.array([[1.0], [5.0]]))]
    [3.0, 4.0]
    """
    rows = products.reshape(-1, products.shape[-1])
    return Statistics(rows.mean(0), rows.var(0))


class Layer(NamedTuple):
    """What a layer and its normalization have for each channel: float arrays of shape (C,).

    `running_variance` is the one after the batch; see `training_output`.
    """

    bias: Float
    gamma: Float
    beta: Float
    running_variance: Float
    epsilon: float


def training_output(quantized: Float, products: Float, layer: Layer) -> Float:
    """Return what a layer and its normalization give in training.

    Parameters
    ----------
    quantized : float array, shape (..., C)
        Products of the input with the folded, quantized weight, without a bias.
    products : float array, shape (..., C)
        Products of the same input with the float weight, without a bias.
    layer : Layer
        Bias, scale, shift and running variance.

    Returns
    -------
    float array, shape (..., C)

    Notes
    -----
    ``(quantized + b') * c`` with ``c = sigma / sigma_batch`` and ``b' = -mean_batch * gamma / sigma + beta / c``: the
    bias ``b`` cancels, because the mean of what is normalized has it too. With ``quantized = products * gamma / sigma``
    it is ``(products - mean_batch) * gamma / sigma_batch + beta``, which is batch normalization. Where the bias is an
    int32 code, ``b'`` is what is rounded to the grid of the products.

    *Deviation:* the running variance is that after the batch, so that the model in evaluation mode and an activation
    checkpoint which computes the layer again fold the same weight.

    Examples
    --------
    >>> layer = Layer(*(np.ones(1) for _ in range(4)), 0.0)
    >>> products = np.array([[1.0], [5.0]])
    >>> training_output(products, products, layer).T
    array([[0., 2.]])
    """
    statistics = batch_statistics(products)
    correction = _correction(statistics, layer)
    bias = -statistics.mean * gain(layer.gamma, layer.running_variance, layer.epsilon) + layer.beta / correction
    return np.asarray((quantized + bias) * correction)


class Gradients(NamedTuple):
    """The loss's gradients: of the products, shape (..., C), and of what there is one of per channel, shape (C,)."""

    quantized: Float
    products: Float
    bias: Float
    gamma: Float
    beta: Float


def training_gradients(upstream: Float, quantized: Float, products: Float, layer: Layer) -> Gradients:
    """Return the gradients of `training_output`.

    Parameters
    ----------
    upstream : float array, shape (..., C)
        Gradient of the output.
    quantized, products, layer
        As for `training_output`.

    Returns
    -------
    Gradients
        That of `gamma` is the direct one; through the folded weight it gets another, ``sum(d_w' * w) / sigma`` over the
        weights of its channel, where ``d_w'`` is what the quantizer passes to its input.

    Notes
    -----
    Running statistics are constants. Batch statistics are not: with ``m`` rows, ``d_mean = -sum(G) * gamma /
    sigma_batch``, ``d_sigma_batch = sum(G * (mean * gamma / sigma_batch - c * quantized)) / sigma_batch``, and each row
    of the products gets ``d_mean / m + d_sigma_batch / sigma_batch * (row - mean) / m``. The bias gets none, exactly.
    """
    statistics = batch_statistics(products)
    channels = products.shape[-1]
    grad, of_quantized, rows = (each.reshape(-1, channels) for each in (upstream, quantized, products))
    deviation = np.sqrt(statistics.variance + layer.epsilon)
    correction = _correction(statistics, layer)
    ratio = layer.gamma / deviation
    total = grad.sum(0)
    of_deviation = (grad * (statistics.mean * ratio - correction * of_quantized)).sum(0) / deviation
    of_rows = (-total * ratio + of_deviation / deviation * (rows - statistics.mean)) / len(rows)
    return Gradients(
        quantized=upstream * correction,
        products=of_rows.reshape(products.shape),
        bias=np.zeros_like(layer.bias),
        gamma=-total * statistics.mean / deviation,
        beta=total,
    )


def _correction(statistics: Statistics, layer: Layer) -> Float:
    """Return ``sigma / sigma_batch``."""
    return np.asarray(np.sqrt((layer.running_variance + layer.epsilon) / (statistics.variance + layer.epsilon)))
