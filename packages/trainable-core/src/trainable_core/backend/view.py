"""A wrapped model as core looks at it: its quantized tensors, what they hold, and what the model gives in each state.

One class of each backend is all that `diagnose`, `suggest`, `track` and `report` need of a framework.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.batches import check_batches, explained, feed
from trainable_core.enums import QuantizationTarget, TrainingMethod, VariableGroup
from trainable_core.granularity import Blocks
from trainable_core.qparams import Float32, QParams
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.layers import LayerInfo
from trainable_core.recipe.plan import QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_core.reference.dqa import candidate_widths

Forward = Callable[[Any, Any], Any]
"""The user's own call: ``forward(qmodel, batch)``."""

See = Callable[[Float32, Callable[[], Float32]], None]
"""What is given the values of an activation and what returns them quantized, once for each call of its quantizer."""

VariableKey = tuple[int, str]
"""A variable of a quantizer: the quantizer's ``id``, and the variable's name."""

TRAINED_GROUPS = (VariableGroup.QPARAMS, VariableGroup.WEIGHTS)
"""Groups of variables that training changes."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A place where a model quantizes.

    Parameters
    ----------
    layer : LayerInfo
        Its layer or functional operation, under its present name.
    tensor : str
        Weight attribute, input or output, as `describe` names it.
    plan : QuantizerPlan
        By which the quantizer was made.
    quantizer : BaseTrainableQuantizer or inferable quantizer
        The quantizer.
    part : any
        The wrapper or holder that has it, for the backend.
    """

    layer: LayerInfo
    tensor: str
    plan: QuantizerPlan
    quantizer: Any
    part: Any

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight."""
        return self.plan.config.target is QuantizationTarget.Weights

    @property
    def name(self) -> str:
        """The name in files: ``fc.weight``, or ``fc: output``."""
        return f"{self.layer.name}{'.' if self.is_weight else ': '}{self.tensor}"

    @property
    def switched_on(self) -> bool:
        """Whether it is quantized."""
        trainable = isinstance(self.quantizer, BaseTrainableQuantizer)
        return bool(self.quantizer.quantization_config.enabled) if trainable else True

    @property
    def grid(self) -> QParams | None:
        """The grid as it is deployed now; None where there is none.

        It is not calibrated, switched off, computed from each tensor, or known to a quantizer's own class alone.
        """
        quantizer = self.quantizer
        if isinstance(quantizer, BaseTrainableQuantizer):
            ready = self.switched_on and quantizer.calibrated and bool(quantizer.variable_names)
            known = not quantizer.computes_grid and not quantizer.deploys_itself
            return quantizer.deployed_qparams() if ready and known else None
        dynamic = self.plan.training_method == TrainingMethod.DYNAMIC
        found = None if dynamic else getattr(quantizer, "qparams", None)
        return found if isinstance(found, QParams) else None

    @property
    def n_bits(self) -> int:
        """Width of the codes; of several candidates the selected one."""
        quantizer = self.quantizer
        if isinstance(quantizer, BaseTrainableQuantizer):
            return quantizer.quantization_config.n_bits if quantizer.computes_grid else quantizer.selected_width
        return int(getattr(quantizer, "num_bits", self.plan.config.n_bits))

    @property
    def candidates(self) -> tuple[int, ...]:
        """Widths that the method chooses among by itself, ascending; none where the config says the width."""
        if isinstance(self.quantizer, BaseTrainableQuantizer):
            return tuple(sorted(self.quantizer.widths)) if self.quantizer.chooses_width else ()
        chosen = self.plan.training_method == TrainingMethod.DQA or self.plan.config.candidates is not None
        return candidate_widths(self.plan.config) if chosen else ()

    @property
    def blocks(self) -> Blocks | None:
        """What shares a scale where it is finer than channels."""
        if isinstance(self.quantizer, BaseTrainableQuantizer):
            return self.quantizer.quantization_config.blocks
        return getattr(self.quantizer, "blocks", None)

    @property
    def clips(self) -> bool:
        """Whether the values themselves are held against the grid's ends, and not what a method makes of them first."""
        return getattr(self.quantizer, "depends_on", "element") == "element"


class ModelView(ABC):
    """One wrapped or finalized model; a backend writes what only its framework can do.

    Parameters
    ----------
    model : model
        What `wrap` or `finalize` returned.
    state : WrappedState
        What it knows about itself.
    tensors : sequence of QuantizedTensor
        Its quantized tensors.
    forward : callable, optional
        ``forward(model, batch)``, called instead of `call`.
    """

    package: ClassVar[str]
    """Name of the backend's package, for hints."""

    def __init__(
        self, model: Any, state: WrappedState, tensors: Sequence[QuantizedTensor], forward: Forward | None = None
    ) -> None:
        self.model, self.state, self.forward = model, state, forward
        self._tensors = tuple(tensors)

    # ---- what a backend writes: the model as it stands --------------------------------------------------------------

    @abstractmethod
    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values as they are now; that they are read changes nothing in the model."""

    @abstractmethod
    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""

    @abstractmethod
    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that the model has, by name."""

    # ---- what a backend writes: the model while it runs -------------------------------------------------------------

    @abstractmethod
    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs as it is deployed: in evaluation mode, eagerly, without gradients.

        Behind it, also after an error, everything is to the bit as it was: modes, buffers, counters and the random
        state.
        """

    @abstractmethod
    def watching(self, seen: Mapping[QuantizedTensor, See]) -> AbstractContextManager[None]:
        """Show what the quantizers of some activations are given and return, as float32 arrays of one shape."""

    @abstractmethod
    def quantizing(self, layers: Collection[str] | None) -> AbstractContextManager[None]:
        """Let only some layers quantize, by their names; None: all of them."""

    @abstractmethod
    def replacing(self, values: Mapping[QuantizedTensor, Float32]) -> AbstractContextManager[None]:
        """Let weights be read as given arrays, in the place of what their quantizers return."""

    @abstractmethod
    def outputs_of(self, tensor: QuantizedTensor) -> AbstractContextManager[list[Float32]]:
        """Note the outputs of the layer of a weight, float32, at each of its calls; of several the first."""

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """Call the model with a batch as `calibrate` takes it; `inputs_of` leaves the labels out."""

    @abstractmethod
    def call_teacher(self, teacher: Any, batch: Any) -> Any:
        """Call another model in evaluation mode as this one is called."""

    @abstractmethod
    def main_output(self, outputs: Any) -> Float32:
        """Return the values of the tensor that counts: the logits where they have a name, or the first output."""

    @abstractmethod
    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Float32], Float32]
    ) -> Mapping[VariableKey, Float32 | None]:
        """Return gradients of variables, as a training step has them; None where none arrives.

        Parameters
        ----------
        batch : any
            The batch.
        variables : mapping
            As `variables` returns them.
        upstream : callable
            Returns the gradient with respect to the main output, given its values.

        Notes
        -----
        Quantizers are in training mode, everything else in evaluation mode.
        """

    # ---- what is the same in every backend --------------------------------------------------------------------------

    def tensors(self) -> Sequence[QuantizedTensor]:
        """Return the model's quantized tensors in the order of `describe`; one that layers share is at each of them."""
        return self._tensors

    def variables(self) -> dict[VariableKey, Any]:
        """Return the quantizers' variables that training is to change.

        Those with a value for each element of a tensor, as learned roundings are, are left out.
        """
        found: dict[VariableKey, Any] = {}
        for tensor in self.tensors():
            quantizer = tensor.quantizer
            if not isinstance(quantizer, BaseTrainableQuantizer) or not tensor.switched_on:
                continue
            trained = {id(each) for group in TRAINED_GROUPS for each in quantizer.get_trainable_variables(group)}
            for name in quantizer.variable_names:
                variable = quantizer.get_quantizer_variable(name)
                per_element = quantizer.tensor_shape is not None and tuple(variable.shape) == quantizer.values_shape
                if id(variable) in trained and not per_element:
                    found[id(quantizer), name] = variable
        return found

    def check_batches(self, batches: Any, subject: str) -> None:
        """Raise CalibrationError when `batches` are none, or one batch, or the user's own call is not callable."""
        check_batches(batches, self.forward, 0, subject=subject)

    def run(self, batch: Any) -> Any:
        """Return what the model gives for a batch."""
        if self.forward is not None:
            return self.forward(self.model, batch)
        return explained(batch, lambda: self.call(batch))

    def look(self, batches: Iterable[Any], seen: Mapping[QuantizedTensor, See], subject: str) -> None:
        """Call the model with the batches, and show what reaches the quantizers of some activations.

        Raises
        ------
        CalibrationError
            When there is no batch.
        """
        with self.undisturbed(), self.watching(seen):
            feed(batches, self.run, subject)


def scale_of_elements(grid: QParams, shape: tuple[int, ...], places: NDArray[np.int64]) -> QParams:
    """Return the grid of single elements of a tensor, one after the other, along axis 0.

    Parameters
    ----------
    grid : QParams
        Of the tensor, per tensor or per channel.
    shape : tuple of int
        The tensor's.
    places : int64 array, shape (K,)
        Positions in the flattened tensor.

    Examples
    --------
    >>> grid = QParams(np.float32([1.0, 2.0]), np.int32([0, 0]), -8, 7, channels_axis=0)
    >>> scale_of_elements(grid, (2, 3), np.array([0, 2, 3])).scale
    array([1., 1., 2.], dtype=float32)
    """
    if grid.channels_axis is None:
        return grid
    axis = grid.channels_axis % len(shape)
    channel = places // int(np.prod(shape[axis + 1 :], dtype=np.int64)) % shape[axis]
    return QParams(grid.scale[channel], grid.zero_point[channel], grid.quant_min, grid.quant_max, 0, grid.levels)
