"""What the kit asks of a backend: NumPy arrays in and out, so that each law is written once for all frameworks."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainable_core.enums import TieRule
from trainable_core.errors import UnsupportedConfigError
from trainable_core.registry.process import get_backend


@dataclass(frozen=True)
class Run:
    """The result of one call of a quantizer.

    Parameters
    ----------
    values : array
        The output; in a dtype that NumPy lacks (bfloat16), its values as float32.
    dtype, device : str
        The output's own, named as the adapter names them.
    input_after : array
        The input tensor's values after the call.
    x : array or None
        Gradient of ``sum(upstream * output)`` with respect to the input; None without `upstream`.
    variables : dict of str to array
        The same with respect to each variable that an optimizer may change; zeros where none arrived.
    """

    values: NDArray[Any]
    dtype: str
    device: str
    input_after: NDArray[Any]
    x: NDArray[Any] | None = None
    variables: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How a tensor is given to a quantizer; the defaults are the plain way.

    Parameters
    ----------
    layout : str
        How the input lies in memory: one of `Adapter.layouts`.
    upstream : str
        How the upstream gradient does. ``expanded`` is one number for all elements, as ``sum().backward()`` gives it.
    input_gradient : bool
        Whether the input needs a gradient; the first layer's input and a frozen weight need none.
    explicit : bool
        Whether the call says if the model trains; otherwise the framework's own mode does.
    opposed : bool
        Whether the framework's own mode says the opposite of the call, where it has one.
    """

    layout: str = "contiguous"
    upstream: str = "contiguous"
    input_gradient: bool = True
    explicit: bool = True
    opposed: bool = False


PLAIN = Way()
INPUT = ""
"""Names the input, where variables are named too."""
FORWARD, VECTORIZED = "forward mode", "vectorized"
"""What a framework can do with a call, beside differentiating it backwards."""


@dataclass(frozen=True)
class Observed:
    """What a call left behind, as only the framework can tell; None where the framework has no such thing.

    Parameters
    ----------
    kept : tuple of str
        Which of input and output are still in memory after the backward pass, when nobody else holds them.
    shared : tuple of str
        What the output shares memory with: ``the input``, ``an earlier output``.
    upstream_changed : bool or None
        Whether the upstream gradient has other values after the backward pass.
    mode_changed : bool or None
        Whether the mode that decides if gradients are recorded is another one after the call.
    recorded : tuple of bool or None
        Whether the output is part of a graph: with gradients recorded, and while they are switched off.
    asked : bool
        Whether an input that needed no gradient needs one after the call.
    unhooked : bool
        Whether a call runs past what somebody has hooked onto the quantizer.
    """

    kept: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    upstream_changed: bool | None = None
    mode_changed: bool | None = None
    recorded: tuple[bool, bool] | None = None
    asked: bool = False
    unhooked: bool = False


class Layer(Protocol):
    """A linear layer without a bias, called on unit vectors, so that its output is its quantized weights."""

    counts_steps: bool
    """Whether a call with ``training=True`` counts a step of its quantizer's schedule which the quantizer does not."""

    def __call__(self, *, training: bool, upstream: NDArray[Any] | None) -> Run:
        """Return a run of the layer, as `Adapter.run` does of its quantizer on the weights."""

    def assign(self, weights: NDArray[Any]) -> None:
        """Give the layer other weights, in the variable that it has."""


Call = tuple[NDArray[Any], NDArray[Any]]
"""An input and its upstream gradient."""

State = Mapping[str, NDArray[Any]]
"""A saved state by the names of its entries."""


class Adapter(Protocol):
    """What a backend implements for the kit: ``ADAPTER`` in the module that `Backend.conformance` names.

    `BaseAdapter` has answers for what a framework does not have.
    """

    backend: str
    """Name of the backend."""
    tie_rule: TieRule
    """Where its kernels send a value half way between two codes."""
    counts_calls: bool
    """Whether a call with ``training=True`` counts a step of the quantizer's schedule itself, before it computes."""
    subnormals: bool
    """Whether its kernels compute with subnormal numbers; where False, they may treat them as zero."""
    dtypes: Sequence[str]
    """Names of the input dtypes it takes, ``float32`` first."""
    devices: Sequence[str]
    """Names of the available devices, the CPU first."""
    modules: Sequence[str]
    """Names of the modules that every class of the backend imports: the framework and its dependencies."""
    layouts: Sequence[str]
    """Ways in which its tensors lie in memory, ``contiguous`` first."""
    sizes: Sequence[int]
    """Numbers of elements at which its quantizers change to another path, ascending."""
    modes: Mapping[str, bool]
    """Ways to run a call other than eagerly, and whether each gives the bits of the eager call."""
    thorough_modes: Mapping[str, bool]
    """Further ones, which take seconds each."""
    of_activations: Collection[str]
    """Modes that are about activations alone: a layer knows the sizes of its weights."""
    casts: Sequence[str]
    """Names of the dtypes that a whole model can be cast to."""
    blocks: bool
    """Whether its quantizers take weights with a scale for each group, or each expert."""
    copies_modifiers: bool
    """Whether a copy has modifiers that no recipe knows: one that is built from a document has not."""
    modifiers: bool
    """Whether modifiers of a recipe can stand on its quantizers."""
    compiles_shapes: bool
    """Whether every operation is compiled anew for each shape: then shapes are few."""
    rounds_alike: bool
    """Whether values have the same bits whichever derivatives are asked for: a compiler joins a function with them."""
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]]
    """What a call may be in the context of, without a change of its values: no gradients, mixed precision."""
    cases: int
    """Cases per law that the quantizers share out, so that ``trainable check`` of all takes less than five minutes."""
    default_training: Sequence[bool]
    """Which modes a call that does not say `training` can be in."""
    traced: Sequence[bool]
    """Whether a call in each of `modes` trains, where nobody asked to be thorough."""
    replaceable: Sequence[str]
    """Methods that are called by their names, so that a subclass, or the object itself, may have others."""

    def build(
        self,
        cls: type[Any],
        config: Any,
        shape: tuple[int, ...],
        arguments: Mapping[str, Any],
        name: str = "tensor",
    ) -> Any:
        """Return ``cls(config, **arguments)``, initialized for a tensor of this shape that has this name."""

    def run(
        self,
        quantizer: Any,
        x: NDArray[Any],
        *,
        training: bool,
        dtype: str,
        device: str,
        upstream: NDArray[Any] | None,
        way: Way = PLAIN,
    ) -> Run:
        """Call the quantizer on `x` as a tensor of this dtype on this device; with `upstream`, also its gradients."""

    def unsaid(self, quantizer: Any, x: NDArray[Any]) -> NDArray[Any]:
        """Return the values of a call that does not say whether the model trains, in the mode the quantizer is in."""

    def deployed(self, quantizer: Any) -> Callable[[NDArray[Any], str, Way], Run]:
        """Return ``quantizer.convert2inferable()`` as a function of an input, its dtype's name, and its way."""

    def interleave(self, quantizer: Any, calls: Sequence[Call], order: Sequence[int]) -> list[Run]:
        """Call the quantizer in training on each input, then take the gradients of each call in this order."""

    def accumulate(self, quantizer: Any, calls: Sequence[Call]) -> Mapping[str, NDArray[Any]]:
        """Return the variables' gradients after forward and backward passes that nobody clears them between."""

    def execute(
        self, quantizer: Any, x: NDArray[Any], mode: str, *, training: bool, upstream: NDArray[Any] | None
    ) -> Run:
        """Call the quantizer as `run` does, in one of `modes`; what it assigns to variables may be lost."""

    def observe(self, quantizer: Any, x: NDArray[Any], upstream: NDArray[Any], *, training: bool) -> Observed:
        """Call the quantizer forward and backward, and say what that left behind."""

    def second_derivative(
        self, quantizer: Any, x: NDArray[Any], upstream: NDArray[Any], directions: Mapping[str, NDArray[Any]]
    ) -> tuple[Run, NDArray[Any]] | None:
        """Return gradients that are taken to be differentiated, and the derivative of some by the upstream gradient.

        Of ``sum(direction * gradient)``, that is, over `directions`: by the name of a variable, or `INPUT`. None where
        the framework or the quantizer refuses to differentiate twice.
        """

    def forward_derivative(
        self, quantizer: Any, x: NDArray[Any], directions: Mapping[str, NDArray[Any]]
    ) -> NDArray[Any] | None:
        """Return the derivative of a training call along `directions`, in forward mode; None where that is refused.

        A direction is that of one of `trained`, by its name, or of the input by `INPUT`; what has none stays as it is.
        """

    def vectorized(self, quantizer: Any, calls: Sequence[Call]) -> list[Run] | None:
        """Return the training calls' gradients where one call is mapped over all inputs; None where that is refused."""

    def vectorized_variables(
        self, quantizer: Any, x: NDArray[Any], numbers: Sequence[Mapping[str, NDArray[Any]]]
    ) -> list[NDArray[Any]] | None:
        """Return the values of calls in eval mode, mapped over values of `trained`; None where that is refused."""

    def batched_gradients(
        self, quantizer: Any, x: NDArray[Any], upstreams: Sequence[NDArray[Any]]
    ) -> tuple[list[Run], list[NDArray[Any]]] | None:
        """Return the gradients of one training call for many upstream gradients at once; None where that is refused.

        With them come the derivatives of ``sum(upstream * d_x)`` by the call's own upstream gradient of ones.
        """

    def promised(self, quantizer: Any) -> Sequence[str]:
        """Return which of `FORWARD` and `VECTORIZED` the backend promises for a quantizer; others it may refuse."""

    def deployed_scale(self, quantizer: Any) -> NDArray[Any] | None:
        """Return the scale that quantizers tell to others who quantize on it; None where they tell none."""

    def in_a_layer(self, quantizer: Any, weights: NDArray[Any]) -> Layer | None:
        """Put the quantizer into a linear layer with these weights, shape (rows, columns); None where there is none.

        The layer initializes the quantizer. `Layer` says how it is called.
        """

    def before_a_layer(
        self,
        quantizer: Any,
        x: NDArray[Any],
        *,
        training: bool,
        upstream: NDArray[Any] | None,
        way: Way = PLAIN,
    ) -> Run | None:
        """Call the quantizer as `run` does, before a layer that gives its input; None where there is no such layer."""

    def regularization(self, quantizer: Any) -> tuple[float, Mapping[str, NDArray[Any]]] | None:
        """Return the quantizer's term for the loss, and its gradients by what learns; None when it has none."""

    def regularization_of(self, quantizer: Any, x: NDArray[Any]) -> tuple[float, Mapping[str, NDArray[Any]]] | None:
        """Return the term for the loss that depends on a tensor too, and its gradients; `INPUT` names the tensor."""

    def collected(self, quantizer: Any, x: NDArray[Any], *, training: bool = True) -> list[float]:
        """Return the terms that a loss gets from one call."""

    def shown(self, quantizer: Any, x: NDArray[Any]) -> None:
        """Let the quantizer observe a weight, as a training step begins."""

    def misplaced(self, quantizer: Any, x: NDArray[Any], *, training: bool) -> str:
        """Call a copy on another device, which need not compute; return what it says of a tensor on the wrong one."""

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the whole process that a quantizer could change, by name."""

    def random_states(self) -> Mapping[str, bytes]:
        """Return a digest of each global random state of the framework."""

    def other_random_state(self, seed: int | None = None) -> AbstractContextManager[None]:
        """Give a context in which the framework's global random state is another one, or that of a seed.

        After it, the state is as before.
        """

    def left_by_graphs(self, quantizer: Any) -> list[str]:
        """Return the attributes that hold a tensor of a graph, which is none outside of it."""

    def withhold(self, quantizer: Any) -> bool:
        """Switch learning off as the framework does it for any layer, statistics included; False where it does not."""

    def cast(self, quantizer: Any, dtype: str) -> Any:
        """Return the quantizer as it is after a model that holds it is cast to one of `casts`."""

    def entries(self, quantizer: Any) -> State:
        """Return the quantizer's state as the framework saves it, by the names of its entries."""

    def restore_entries(self, quantizer: Any, state: State) -> None:
        """Load entries into the quantizer, as the framework does with a file that holds them."""

    def trained(self, quantizer: Any) -> Mapping[str, Any]:
        """Return, by name, the variables that the framework reports as trainable."""

    def descend(self, quantizer: Any, gradients: Mapping[str, NDArray[Any]]) -> None:
        """Take a step of gradient descent, learning rate 1, on those of `trained` that are in `gradients`."""

    def optimizer(self, quantizer: Any) -> Callable[[], None]:
        """Return the step of an optimizer, made now, that holds what learns now and takes the gradients there are."""

    def copy(self, quantizer: Any) -> Any:
        """Return a deep copy."""

    def save(self, quantizer: Any) -> bytes:
        """Return the quantizer's state as the framework saves it."""

    def restore(self, quantizer: Any, state: bytes) -> None:
        """Load a state into the quantizer."""

    def model(self) -> tuple[Any, Any, Callable[[Any], NDArray[Any]]]:
        """Return a small float model with one linear layer, a batch, and a function from a model to its output."""


class BaseAdapter:
    """Answers for what a framework does not have; an adapter overrides those that its framework has."""

    layouts: Sequence[str] = ("contiguous",)
    sizes: Sequence[int] = (2**16,)
    modes: Mapping[str, bool] = {}
    thorough_modes: Mapping[str, bool] = {}
    of_activations: Collection[str] = ()
    casts: Sequence[str] = ()
    blocks: bool = False
    modifiers: bool = False
    copies_modifiers: bool = False
    default_training: Sequence[bool] = (False,)
    traced: Sequence[bool] = (False, True)
    replaceable: Sequence[str] = ()
    cases: int = 300
    compiles_shapes: bool = False
    rounds_alike: bool = True
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {}

    def build(
        self,
        cls: type[Any],
        config: Any,
        shape: tuple[int, ...],
        arguments: Mapping[str, Any],
        name: str = "tensor",
    ) -> Any:
        """Return a quantizer as `wrap` makes one, but for no layer."""
        quantizer = cls(config, **arguments)
        quantizer.initialize_quantization(shape, name, None)
        return quantizer

    def misplaced(self, quantizer: Any, x: NDArray[Any], *, training: bool) -> str:
        """Return an empty text: the framework places tensors itself."""
        del quantizer, x, training
        return ""

    def unsaid(self, quantizer: Any, x: NDArray[Any]) -> NDArray[Any]:
        """Return the values of such a call: quantizers are in no mode here."""
        adapter: Any = self
        plain = {"training": False, "dtype": "float32", "device": adapter.devices[0], "upstream": None}
        run: Run = adapter.run(quantizer, x, way=Way(explicit=False), **plain)
        return run.values

    def interleave(self, quantizer: Any, calls: Sequence[Call], order: Sequence[int]) -> list[Run]:
        """Return the calls' gradients one by one: without a graph there is nothing between forward and backward."""
        del order
        adapter: Any = self
        plain = {"training": True, "dtype": "float32", "device": adapter.devices[0]}
        return [adapter.run(quantizer, x, upstream=upstream, **plain) for x, upstream in calls]

    def accumulate(self, quantizer: Any, calls: Sequence[Call]) -> Mapping[str, NDArray[Any]]:
        """Return the sums of the calls' gradients: nothing is accumulated where gradients are values."""
        runs = self.interleave(quantizer, calls, range(len(calls)))
        return {name: np.asarray(sum(run.variables[name] for run in runs)) for name in runs[0].variables}

    def observe(self, quantizer: Any, x: NDArray[Any], upstream: NDArray[Any], *, training: bool) -> Observed:
        """Return that a call leaves nothing behind: tensors are values here."""
        del quantizer, x, upstream, training
        return Observed()

    def optimizer(self, quantizer: Any) -> Callable[[], None]:
        """Return a step on what learns when it is taken: variables hold no gradients here."""
        adapter: Any = self

        def step() -> None:
            adapter.descend(
                quantizer, {name: np.ones(tuple(each.shape)) for name, each in adapter.trained(quantizer).items()}
            )

        return step

    def second_derivative(
        self, quantizer: Any, x: NDArray[Any], upstream: NDArray[Any], directions: Mapping[str, NDArray[Any]]
    ) -> tuple[Run, NDArray[Any]] | None:
        """Return None: nothing is differentiated twice here."""
        del quantizer, x, upstream, directions
        return None

    def forward_derivative(
        self, quantizer: Any, x: NDArray[Any], directions: Mapping[str, NDArray[Any]]
    ) -> NDArray[Any] | None:
        """Return None: nothing is differentiated forward here."""
        del quantizer, x, directions
        return None

    def vectorized(self, quantizer: Any, calls: Sequence[Call]) -> list[Run] | None:
        """Return None: nothing is mapped here."""
        del quantizer, calls
        return None

    def vectorized_variables(
        self, quantizer: Any, x: NDArray[Any], numbers: Sequence[Mapping[str, NDArray[Any]]]
    ) -> list[NDArray[Any]] | None:
        """Return None: nothing is mapped here."""
        del quantizer, x, numbers
        return None

    def batched_gradients(
        self, quantizer: Any, x: NDArray[Any], upstreams: Sequence[NDArray[Any]]
    ) -> tuple[list[Run], list[NDArray[Any]]] | None:
        """Return None: nothing is mapped here."""
        del quantizer, x, upstreams
        return None

    def promised(self, quantizer: Any) -> Sequence[str]:
        """Return nothing: whatever is there may be refused."""
        del quantizer
        return ()

    def deployed_scale(self, quantizer: Any) -> NDArray[Any] | None:
        """Return None: no quantizer tells its scale."""
        del quantizer
        return None

    def in_a_layer(self, quantizer: Any, weights: NDArray[Any]) -> Layer | None:
        """Return None: there are no layers here."""
        del quantizer, weights
        return None

    def before_a_layer(
        self,
        quantizer: Any,
        x: NDArray[Any],
        *,
        training: bool,
        upstream: NDArray[Any] | None,
        way: Way = PLAIN,
    ) -> Run | None:
        """Return None: there are no layers here."""
        del quantizer, x, training, upstream, way
        return None

    def regularization(self, quantizer: Any) -> tuple[float, Mapping[str, NDArray[Any]]] | None:
        """Return None: methods have no terms here."""
        del quantizer
        return None

    def regularization_of(self, quantizer: Any, x: NDArray[Any]) -> tuple[float, Mapping[str, NDArray[Any]]] | None:
        """Return None: methods have no terms here."""
        del quantizer, x
        return None

    def collected(self, quantizer: Any, x: NDArray[Any], *, training: bool = True) -> list[float]:
        """Return what `regularization` and `regularization_of` return: the training loop asks for them once."""
        terms = (self.regularization(quantizer), self.regularization_of(quantizer, x)) if training else ()
        return [term[0] for term in terms if term is not None]

    def shown(self, quantizer: Any, x: NDArray[Any]) -> None:
        """Give it the array."""
        quantizer.observe(x)

    def settings(self) -> Mapping[str, Any]:
        """Return nothing: `settings` adds NumPy's own."""
        return {}

    def random_states(self) -> Mapping[str, bytes]:
        """Return nothing: there is no random state beside Python's and NumPy's."""
        return {}

    def other_random_state(self, seed: int | None = None) -> AbstractContextManager[None]:
        """Change nothing."""
        del seed
        return nullcontext()

    def left_by_graphs(self, quantizer: Any) -> list[str]:
        """Return none: there are no graphs."""
        del quantizer
        return []

    def withhold(self, quantizer: Any) -> bool:
        """Return False: there is no such switch."""
        del quantizer
        return False

    def cast(self, quantizer: Any, dtype: str) -> Any:
        """Return the quantizer as it is."""
        del dtype
        return quantizer


def random_states(adapter: Adapter) -> dict[str, bytes]:
    """Return a digest of each global random state: Python's, NumPy's, and the framework's."""
    own = {"random": random.getstate(), "numpy.random": np.random.get_state()}  # noqa: NPY002 - the global one is meant
    digests = {name: hashlib.sha256(pickle.dumps(state)).digest() for name, state in own.items()}
    return {**digests, **adapter.random_states()}


def settings(adapter: Adapter) -> dict[str, Any]:
    """Return the settings of the whole process by name: NumPy's, and the framework's."""
    return {"NumPy's treatment of errors": np.geterr(), **adapter.settings()}


@contextmanager
def nothing_random(adapter: Adapter, seed: int | None = None) -> Iterator[list[str]]:
    """Give the names of the global random states that what runs inside has changed.

    It begins with states that nobody has seen before, so that setting a seed changes them, or with those of a seed.
    They are put back.
    """
    changed: list[str] = []
    own, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    try:
        random.seed(os.urandom(8) if seed is None else seed)
        np.random.seed(int.from_bytes(os.urandom(4), "little") if seed is None else seed)  # noqa: NPY002 - as above
        with adapter.other_random_state(seed):
            before = random_states(adapter)
            yield changed
            after = random_states(adapter)
            changed += [name for name, digest in before.items() if after[name] != digest]
    finally:
        random.setstate(own)
        np.random.set_state(numpy)  # noqa: NPY002 - as above


def adapter_of(backend: str) -> Adapter:
    """Return the adapter of an installed backend.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides the backend.
    UnsupportedConfigError
        When the backend has no adapter.
    """
    described = get_backend(backend)
    name = described.conformance or f"{described.verbs}.conformance"
    try:
        adapter: Adapter = import_module(name).ADAPTER
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != name:
            raise
        problem = f"it has no adapter for the conformance kit: {error}"
        raise UnsupportedConfigError(f"backend {backend!r}", problem, f"give {name} an `ADAPTER`.") from error
    return adapter
