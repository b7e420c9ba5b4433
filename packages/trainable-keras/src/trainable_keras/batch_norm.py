"""Batch norms that are simulated as folded while a model trains; defined by `trainable_core.reference.batch_norm`.

A quantized layer does the work of the batch norm behind it: its kernel is multiplied by the batch norm's gain before it
is quantized, and its output is normalized. The batch norm stays at its place with its variables, and passes on what it
is given.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from trainable_core.errors import ModelError
from trainable_keras.functions import Functions, Tensor
from trainable_keras.two_classes import OfTwoClasses

FROZEN = "_trainable_frozen"
"""Attribute of a batch norm that uses its moving statistics in training too."""

ESTIMATING = "_trainable_estimating"
"""Attribute of a batch norm whose statistics are estimated anew: what is called before each batch."""

SIMULATION = "_trainable_simulation"
"""Attribute of a simulated batch norm: the key of its `Simulation`."""

Own = Callable[[Mapping[int, Tensor]], Tensor]
"""Calls a layer's own class with some values in the place of its variables, by their ``id``."""


class _Known(threading.local):
    def __init__(self) -> None:
        self.simulations: weakref.WeakValueDictionary[str, Simulation] = weakref.WeakValueDictionary()


_KNOWN = _Known()


class Simulated(OfTwoClasses):
    """A batch norm whose work the quantized layer before it does; it passes on what it is given."""

    _wraps_call = True

    def call(self, inputs: Any, *_: Any, **__: Any) -> Any:
        """Return the input."""
        return inputs

    def _told_now(self) -> dict[str, Any]:
        return {"simulated": told_of_norm(self)}


def told_of_norm(norm: Any) -> dict[str, Any]:
    """Return what makes a batch norm the simulated one that it is; JSON-clean."""
    return {"key": vars(norm)[SIMULATION], "frozen": is_frozen(norm)}


def is_frozen(norm: Any) -> bool:
    """Return whether a simulated batch norm uses its moving statistics in training too."""
    return bool(vars(norm).get(FROZEN))


def freeze(norm: Any, frozen: bool) -> None:  # noqa: FBT001 - reads as a fact
    """Let a simulated batch norm use its moving statistics in training too, or no longer."""
    vars(norm)[FROZEN] = frozen


class Simulation:
    """What a quantized layer knows of the batch norm behind it, whose work it does.

    Parameters
    ----------
    key : str
        What tells the layer from the others of its model.
    kernel : str
        The layer's attribute of the kernel that takes the batch norm over.
    axes : sequence of int
        Its axes of output channels.
    channels_axis : int
        Axis of the channels in the layer's output.
    keeps_bias : bool
        Whether the layer has a bias of its own; one that was added for folding does not learn.

    Notes
    -----
    A layer's config can't refer to another layer, so the batch norm finds this by its key: a layer that is made from a
    config is noted under it in the thread, and the batch norm comes behind it.
    """

    def __init__(self, key: str, kernel: str, axes: Any, channels_axis: int, *, keeps_bias: bool) -> None:
        self.key, self.kernel, self.axes = key, kernel, tuple(axes)
        self.channels_axis, self.keeps_bias = channels_axis, keeps_bias
        self.norm: Any = None

    def config(self) -> dict[str, Any]:
        """Return what `of_config` makes it of again; JSON-clean."""
        names = ("key", "kernel", "channels_axis", "keeps_bias")
        return {**{name: getattr(self, name) for name in names}, "axes": list(self.axes)}

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Simulation:
        """Return one equal to that which `config` was called on, and note it for the batch norm."""
        made = cls(**config)
        _KNOWN.simulations[made.key] = made
        return made

    @staticmethod
    def attach(told: Mapping[str, Any], norm: Any) -> None:
        """Let a batch norm of two classes be that of the layer that was made before it.

        Raises
        ------
        ModelError
            When that layer was not made from a config.
        """
        found = _KNOWN.simulations.get(told["key"])
        if found is None:
            problem = f"the batch norm {norm.name!r} is simulated by the layer {told['key']!r}, which was not read"
            raise ModelError(problem, "read the whole model.")
        found.take(norm)
        freeze(norm, told["frozen"])

    def take(self, norm: Any) -> None:
        """Simulate a batch norm."""
        self.norm = norm
        vars(norm)[SIMULATION] = self.key

    def require_norm(self) -> None:
        """Raise ModelError when the layer was made from a config and its batch norm was not."""
        if self.norm is None:
            raise ModelError(f"the batch norm behind the layer {self.key!r} was not read", "read the whole model.")

    def uses_batches(self, training: Any) -> bool:
        """Return whether the statistics of batches normalize, as Keras has it; `training` of None is false."""
        estimating = vars(self.norm).get(ESTIMATING)
        if estimating is not None:
            estimating()
            return True
        return bool(self.norm.trainable) and not is_frozen(self.norm) and bool(training)

    # ---- the arithmetic, in float32 whatever the dtypes are ----------------------------------------------------------

    def _deviation(self, f: Functions, value_of: Any) -> Tensor:
        """Return ``sigma`` of the moving statistics; a constant that Grappler does not turn into ``rsqrt``."""
        variance = f.cast(value_of(self.norm.moving_variance), "float32")
        return f.hide_shape(f.stop_gradient(f.sqrt(variance + self.norm.epsilon)))

    def _of_norm(self, f: Functions, value_of: Any, name: str) -> Tensor | None:
        variable = getattr(self.norm, name)
        return None if variable is None else f.cast(value_of(variable), "float32")

    def _gain(self, f: Functions, value_of: Any) -> Tensor:
        deviation, gamma = self._deviation(f, value_of), self._of_norm(f, value_of, "gamma")
        gain = f.reciprocal(deviation) if gamma is None else gamma / deviation
        return f.show_shape(gain, value_of(self.norm.moving_variance))

    def folded_kernel(self, f: Functions, value_of: Any, kernel: Tensor) -> Tensor:
        """Return the kernel as it is quantized, and deployed: multiplied by the gain of each output channel."""
        shape = [1] * len(kernel.shape)
        for axis in self.axes:
            shape[axis] = int(kernel.shape[axis])
        folded = f.cast(kernel, "float32") * f.reshape(self._gain(f, value_of), shape)
        return f.cast(folded, f.dtype_of(kernel))

    def folded_bias(self, f: Functions, value_of: Any, bias: Tensor) -> Tensor:
        """Return the bias that the layer is deployed with."""
        own = self._learning(f, f.cast(bias, "float32"))
        mean = f.cast(value_of(self.norm.moving_mean), "float32")
        beta = self._of_norm(f, value_of, "beta")
        folded = (own - mean) * self._gain(f, value_of)
        return f.cast(folded if beta is None else folded + beta, f.dtype_of(bias))

    def _learning(self, f: Functions, bias: Tensor) -> Tensor:
        """Return a bias that gets a gradient of 0 where the layer has none of its own."""
        constant = f.stop_gradient(bias)
        return bias if self.keeps_bias else constant + (bias - constant) * 0.0

    def normalized(
        self,
        f: Functions,
        value_of: Any,
        assign: Callable[[Any, Tensor], None],
        *,
        bias: Tensor,
        floats: Tensor,
        quantized: Callable[[], Tensor],
        on_grid: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the layer's output in training; the moving statistics take in those of the batch.

        Parameters
        ----------
        f : Functions
            The framework's.
        value_of : callable
            Returns a variable's value.
        assign : callable
            Sets a variable to a tensor.
        bias : tensor
            The layer's own bias.
        floats : tensor
            The layer's products with its float weights, without a bias.
        quantized : callable
            Returns its products with the folded, quantized weights, without a bias.
        on_grid : callable
            What puts an integer bias on its grid.
        """
        products = f.cast(floats, "float32")
        channels_axis = self.channels_axis % len(products.shape)
        axes = [axis for axis in range(len(products.shape)) if axis != channels_axis]
        shape = [-1 if axis == channels_axis else 1 for axis in range(len(products.shape))]
        count = f.size(products) / int(products.shape[channels_axis])
        mean = f.sum(products, axis=axes) / count
        variance = _squares(f, products - f.reshape(mean, shape), axes) / count
        bias = f.cast(bias, "float32")
        self._update(f, value_of, assign, mean + bias, variance, count)
        deviation, running = f.sqrt(variance + self.norm.epsilon), self._deviation(f, value_of)
        added = (bias * 0.0 - mean) * self._gain(f, value_of)  # its own bias cancels, and gets a gradient of 0
        beta = self._of_norm(f, value_of, "beta")
        if beta is not None:
            added = added + beta * (deviation / running)
        made = quantized()
        outputs = (f.cast(made, "float32") + f.reshape(on_grid(added), shape)) * f.reshape(running / deviation, shape)
        return f.cast(f.show_shape(outputs, made), f.dtype_of(made))

    def _update(self, f: Functions, value_of: Any, assign: Any, mean: Tensor, variance: Tensor, count: Any) -> None:
        momentum = self.norm.momentum
        if getattr(self.norm, "fused", False):  # Keras 2's kernel corrects the variance for the size of the batch
            less = max(count - 1, 1) if isinstance(count, int | float) else f.maximum(count - 1.0, 1.0)
            variance = variance * (count / less)
        for variable, found in ((self.norm.moving_mean, mean), (self.norm.moving_variance, variance)):
            before = f.cast(value_of(variable), "float32")
            after = before * momentum + f.stop_gradient(found) * (1.0 - momentum)
            assign(variable, f.cast(after, f.dtype_of(value_of(variable))))


def _squares(f: Functions, x: Tensor, axes: list[int]) -> Tensor:
    return f.sum(x * x, axis=axes)


def folded_values(simulation: Simulation, f: Functions, value_of: Any, kernel: Any, bias: Any) -> list[NDArray[Any]]:
    """Return kernel and bias as they are deployed, of variables.

    Parameters
    ----------
    simulation : Simulation
        With its batch norm.
    f : Functions
        The framework's.
    value_of : callable
        Returns a variable's value.
    kernel, bias : variable
        The layer's.
    """
    folded = (
        simulation.folded_kernel(f, value_of, value_of(kernel)),
        simulation.folded_bias(f, value_of, value_of(bias)),
    )
    return [f.to_numpy(each) for each in folded]
