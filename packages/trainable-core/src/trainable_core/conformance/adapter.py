"""What the kit asks of a backend: NumPy arrays in and out, so that each law is written once for all frameworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

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


class Adapter(Protocol):
    """What a backend implements for the kit: ``ADAPTER`` in the module that `Backend.conformance` names."""

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

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
        """Return ``cls(config, **arguments)``, initialized for a tensor of this shape."""

    def run(
        self,
        quantizer: Any,
        x: NDArray[Any],
        *,
        training: bool,
        dtype: str,
        device: str,
        upstream: NDArray[Any] | None,
    ) -> Run:
        """Call the quantizer on `x` as a tensor of this dtype on this device; with `upstream`, also its gradients."""

    def deploy(self, quantizer: Any, x: NDArray[Any]) -> NDArray[Any]:
        """Return what ``quantizer.convert2inferable()`` gives for `x`."""

    def trained(self, quantizer: Any) -> Mapping[str, Any]:
        """Return, by name, the variables that the framework reports as trainable."""

    def descend(self, quantizer: Any, gradients: Mapping[str, NDArray[Any]]) -> None:
        """Take a step of gradient descent, learning rate 1, on those of `trained` that are in `gradients`."""

    def copy(self, quantizer: Any) -> Any:
        """Return a deep copy."""

    def save(self, quantizer: Any) -> bytes:
        """Return the quantizer's state as the framework saves it."""

    def restore(self, quantizer: Any, state: bytes) -> None:
        """Load a state into the quantizer."""

    def model(self) -> tuple[Any, Any, Callable[[Any], NDArray[Any]]]:
        """Return a small float model with one linear layer, a batch, and a function from a model to its output."""


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
