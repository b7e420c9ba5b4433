"""One Keras as the shared code sees it: what it tells of models, and the classes that it makes.

`keras2.framework` and `keras3.framework` each fill in a `Framework`. Whatever is the same for both is written here, or
in the shared modules, which are given the one that a model belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from numpy.typing import NDArray

from trainable_core.recipe.layers import LayerInfo, LayerKind
from trainable_keras import layers, operations
from trainable_keras.configs import ConfigKit
from trainable_keras.functions import Functions
from trainable_keras.graph import Graph, direct_layers
from trainable_keras.layers import LayerTypes
from trainable_keras.operations import Clamp
from trainable_keras.parts import KerasHolder, KerasWrapper
from trainable_keras.two_classes import own_class


@contextmanager
def functions_run_eagerly(tensorflow: Any) -> Iterator[None]:
    """Let TensorFlow run its functions eagerly, so that a call that the user compiled shows its values too."""
    eager = tensorflow.config.functions_run_eagerly()
    try:
        tensorflow.config.run_functions_eagerly(run_eagerly=True)
        yield
    finally:
        tensorflow.config.run_functions_eagerly(eager)


def _is_of_keras(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] in {"keras", "tf_keras", "tensorflow"}


class Framework(ABC):
    """One Keras; there is one instance for each."""

    backend: ClassVar[str]
    """Name of the backend in the registry."""

    file_format: ClassVar[str]
    """What `save` writes into a file, and `load` asks for."""

    module: ClassVar[Any]
    """The module: ``keras``, or TensorFlow's."""

    functions: ClassVar[Functions]
    """What it does with tensors."""

    types: ClassVar[LayerTypes]
    """How its layer types are quantized."""

    quantizer: ClassVar[type]
    """Base class of its trainable quantizers."""

    wrapper: ClassVar[type[KerasWrapper]]
    holder: ClassVar[type[KerasHolder]]
    passing: ClassVar[type]
    """Class of the layer that stands in the place of a folded batch norm."""

    copier: ClassVar[Any]
    """Its `trainable_keras.copying.ModelCopier`, which is made of a framework."""

    stock_copy: ClassVar[Any] = None
    """What copies a deployed model with mct-quantizers' own layers; None where these can't be built."""

    kit: ClassVar[ConfigKit]
    """What layers of two classes ask of it."""

    can_freeze_in_fit: ClassVar[bool] = True
    """Whether `fit` can go on when fewer variables are trained."""

    applies: ClassVar[str] = ""
    """The method by which its optimizers are given gradients; empty where nobody can look in between."""

    restarts_random: ClassVar[bool] = False
    """Whether a training step that is traced anew draws the random numbers of its layers from the beginning."""

    # ---- what is in a model -----------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def graph(model: Any) -> Graph | None:
        """Return the calls of a functional or Sequential model, None of what has no graph."""

    @staticmethod
    @abstractmethod
    def is_layer(operation: Any) -> bool:
        """Return whether it is a layer with a purpose of its own, not a functional operation."""

    @staticmethod
    @abstractmethod
    def op(operation: Any) -> str | None:
        """Return the op kind of a layer or functional operation, None when it is unknown."""

    def kind(self, layer: Any) -> LayerKind | None:
        """Return how a layer is quantized, None when its type is unknown."""
        return self.types.kind_of(layer)

    def info(self, name: str, layer: Any, kind: LayerKind) -> LayerInfo:
        """Return what a recipe needs to know of a layer."""
        return layers.layer_info(name, layer, kind, self.types.find_weight)

    @staticmethod
    @abstractmethod
    def function(operation: Any) -> str:
        """Return the name of a functional operation, an empty string for a layer."""

    def clamp(self, operation: Any) -> Clamp | None:
        """Return what an activation clamps its input to; None where it does something else."""
        return operations.clamp_of(operation, self.types.stock(operation), self.function(operation))

    def passes(self, operation: Any) -> bool:
        """Return whether an operation's result holds values of its first input, and zeros."""
        return operations.passes(operation, self.types.stock(operation), self.function(operation))

    def model_graph(self, layer: Any) -> Graph | None:
        """Return the graph of a model that is looked into, None of a layer that is quantized as a whole."""
        return None if self.kind(layer) is not None else self.graph(layer)

    # ---- copies -----------------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def remade(layer: Any, name: str, **changes: Any) -> Any:
        """Give a layer other values for some of its config, and the variables that it then has more; return it."""

    @staticmethod
    @abstractmethod
    def rerun(model: Any, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Run through a model's graph anew, with ``call(operation, args, kwargs)`` at the place of each call."""

    def tells_its_layers(self, layer: Any) -> bool:
        """Return whether a layer's own config has those of all layers inside, by which they are made again."""
        graph, own = self.graph(layer), own_class(layer)
        if graph is None or any(
            not _is_of_keras(getattr(own, name)) for name in ("__init__", "get_config", "from_config")
        ):
            return False
        told = {id(each) for each in layer.layers}
        given = self.module.layers.InputLayer  # a Sequential model of Keras 2 does not list its own
        return all(id(each) in told or isinstance(each, given) for each in direct_layers(layer))

    @staticmethod
    @abstractmethod
    def dtype_policy(layer: Any) -> Any:
        """Return a layer's dtype policy, as a constructor takes it."""

    # ---- variables --------------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def created_variables(layer: Any) -> list[Any]:
        """Return the variables that a layer made itself, without those of the layers inside it."""

    @staticmethod
    @abstractmethod
    def variables(model: Any) -> list[Any]:
        """Return a model's variables in its order."""

    @staticmethod
    @abstractmethod
    def variable_name(variable: Any) -> str:
        """Return a variable's name without its layer's."""

    @staticmethod
    @abstractmethod
    def assign(variable: Any, value: NDArray[Any]) -> None:
        """Set a variable to values, which are copied and cast to its dtype."""

    @staticmethod
    @abstractmethod
    def note_of(size: int) -> Any:
        """Return a float32 variable for some numbers that a training step notes, which no model knows of."""

    @staticmethod
    @abstractmethod
    def pull_back(call: Callable[[], Any], variables: Mapping[str, Any], upstream: NDArray[Any]) -> list[Any | None]:
        """Return the gradients of ``sum(upstream * call())`` by variables; None where none arrives."""

    # ---- what only one of the two needs -----------------------------------------------------------------------------

    def check(self, model: Any, what: str) -> None:  # noqa: B027 - nothing to check is a fine answer
        """Raise ModelError for a model that is not of this process's Keras; `what` it is called."""

    def check_layers(self, model: Any) -> None:  # noqa: B027 - as above
        """Raise ModelError for a model with layers that can be neither wrapped nor left alone."""

    @staticmethod
    def keep(model: Any, name: str, value: Any) -> None:
        """Set an attribute of a model as it is."""
        setattr(model, name, value)

    @staticmethod  # noqa: B027 - only one engine needs it
    def track_parameters(model: Any) -> None:
        """Let PyTorch know the variables of a model that has new ones, where it is the engine."""

    @staticmethod  # noqa: B027 - as above
    def forget_gradients(model: Any) -> None:
        """Take the gradients from a model's variables, where the engine keeps them there."""

    @staticmethod
    def strategy_of(model: Any) -> AbstractContextManager[Any]:  # noqa: ARG004 - Keras 2 asks the model
        """Return the scope of the distribution strategy that a model was made under, if Keras remembers it."""
        return nullcontext()

    @staticmethod
    def eagerly() -> AbstractContextManager[None]:
        """Return a context in which calls run eagerly, so that values are seen."""
        return nullcontext()

    @staticmethod
    @abstractmethod
    def flat(values: Any) -> list[Any]:
        """Return nested values in a list."""

    @staticmethod
    @abstractmethod
    def map_symbolic(function: Callable[[Any], Any], values: Any) -> Any:
        """Return nested values with `function` of each symbolic tensor in its place."""
