"""Layers that stay themselves while they are quantized: each gets a class made of one of ours and its own.

The object stays at its place, with its name, its variables and everything that its own class does. What its own code
reads as a weight is the quantized value while the model runs (`value_of`), and the float variable at any other time.

Such a class can't be looked up in another process, so a layer tells its own class in its config, and what else is
needed to make it what it is (`OfTwoClasses.get_config`). A layer that keeps others inside tells of them by the places
that they have in it: its own `from_config` makes them without quantization. Reading it back goes the other way: the
layer is made, and once it is built it becomes what the config says (`Pending`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from trainable_core.errors import ModelError
from trainable_keras.functions import Functions
from trainable_keras.graph import direct_layers

KEY = "trainable_keras"
"""Key of a layer's config under which it tells what comes to its own class."""

READINGS = "_trainable_readings"
"""Attribute of a layer with quantized weights: who quantizes each, by the attributes that lead to it."""

TOLD = "_trainable_told"
"""Attribute of a quantized layer, or of a holder: what is known of it."""

PENDING = "_trainable_pending"
"""Attribute of a layer that is not built yet: what it becomes then."""


class Readings:
    """Who quantizes which weight of a layer: the layer and its name of the weight, by attribute.

    It is no dictionary on the layer, because Keras looks into those as it saves a layer.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, tuple[Any, str]] = {}


class _Threads(threading.local):
    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        """Quantized values by the ``id`` of their variable, while the layer that quantizes them is called."""
        self.plainly = False
        """Whether layers tell their own config only."""


_NOW = _Threads()


class Kit(ABC):
    """What layers of two classes ask of their Keras."""

    package: ClassVar[str]
    """Under which our classes are registered."""

    saving: ClassVar[Any]
    """Keras's module of that name."""

    goes_by_registration: ClassVar[bool]
    """Whether a class is looked up by the name that it is registered under before that which it has."""

    pending: ClassVar[type[Any]]
    """Its class of layers that are not built yet."""

    functions: ClassVar[Functions]
    """What it does with tensors."""

    @abstractmethod
    def infers_shapes(self) -> bool:
        """Return whether a layer is called only to know the shape of its output."""

    @abstractmethod
    def update(self, variable: Any, value: Any) -> None:
        """Set a variable to a tensor, as a layer does in its call."""

    @abstractmethod
    def running(self) -> bool:
        """Return whether a layer is being called in this thread."""

    @abstractmethod
    def training(self) -> Any:
        """Return what the layer that is being called was told of training; None when nothing is known."""

    @abstractmethod
    def cast_like(self, value: Any, variable: Any) -> Any:
        """Return a tensor in the dtype in which a layer reads a variable."""

    @abstractmethod
    def graph(self, layer: Any) -> Any:
        """Return the calls of a functional or Sequential model, None of what has no graph."""

    @abstractmethod
    def document(self, layer: Any) -> dict[str, Any]:
        """Return what Keras writes of a layer."""

    @abstractmethod
    def of_document(self, document: Mapping[str, Any]) -> Any:
        """Return the layer that `document` was called on, not built."""

    @abstractmethod
    def build_config(self, layer: Any) -> Any:
        """Return how a layer was built; JSON-clean, None when that is not known."""

    @abstractmethod
    def build(self, layer: Any, config: Any) -> None:
        """Build a layer as `build_config` says."""

    @abstractmethod
    def inside_of(self, layer: Any) -> dict[str, Any]:
        """Return what became of the layers inside a layer, by their places in it; JSON-clean."""

    @abstractmethod
    def pass_on(self, layer: Any) -> None:
        """Let a batch norm pass on what it gets: its work is done by the layer before it."""

    @abstractmethod
    def simulate(self, layer: Any) -> None:
        """Let a batch norm pass on what it gets, with its variables: the layer before it simulates it."""

    @abstractmethod
    def attach(self, layer: Any, told: Mapping[str, Any]) -> None:
        """Let the layer before a simulated batch norm know it, as its config tells."""

    @abstractmethod
    def become(self, layer: Any) -> None:
        """Make a layer what its config said, if it is built."""


# ---- classes --------------------------------------------------------------------------------------------------------


class OfTwoClasses:
    """What is common to our classes that come before a layer's own."""

    _own: ClassVar[type[Any]]
    _names: ClassVar[frozenset[str]]
    _kit: ClassVar[Kit]

    _wraps_call: ClassVar[bool] = False
    """Whether our class has a `call` that comes before the layer's own."""

    _behind: ClassVar[tuple[type[Any], ...]] = ()
    """Classes that ours inherits and that come after the layer's own: what they define, the layer's own class does."""

    def get_config(self) -> dict[str, Any]:
        """Return the layer's own config, its own class, and what else it is."""
        document = own_document(self)
        identity = {name: document.get(name) for name in ("module", "class_name", "registered_name")}
        told = {} if _NOW.plainly else self._told_now()
        if told:
            told["build"] = self._kit.build_config(self)
        return {**document["config"], KEY: {"class": identity, **told}}

    def get_build_config(self) -> Any:
        """Return how the layer was built, or nothing where `get_config` tells it: Keras 2 would build it twice."""
        return own_class(self).get_build_config(self) if _NOW.plainly else None

    def _told_now(self) -> dict[str, Any]:
        """Return what the layer is beside one of its own class; JSON-clean."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Return the layer that `get_config` was called on; one that can't be built yet is quantized when it is."""
        config = dict(config)
        told = config.pop(KEY)
        layer = cls._kit.of_document({**told["class"], "config": config})
        if told.get("passing"):
            cls._kit.pass_on(layer)
            layer.built = True
        elif told.get("simulated"):
            cls._kit.simulate(layer)
            if told["build"]:
                cls._kit.build(layer, told["build"])
            cls._kit.attach(layer, told["simulated"])
        elif told.keys() - {"class", "build"}:
            add_class(layer, cls._kit.pending)
            vars(layer)[PENDING] = told
            if told["build"]:
                cls._kit.build(layer, told["build"])
                cls._kit.become(layer)
        return layer


class Pending(OfTwoClasses):
    """A layer that was made from a config, and is quantized as soon as it is built."""

    def _told_now(self) -> dict[str, Any]:
        told: dict[str, Any] = vars(self)[PENDING]
        return {name: value for name, value in told.items() if name not in {"class", "build"}}

    def build_from_config(self, config: Any) -> None:
        """Build the layer, and make it what it was."""
        own_class(self).build_from_config(self, config)
        inside = direct_layers(self)
        if inside and all(each.built for each in inside):
            self.built = True  # Keras 3 does not note that it has built a model by running its `call`
        self._kit.become(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; make it what it was when that has built it."""
        own = own_class(self)
        outputs = own.__call__(self, *args, **kwargs)
        self._kit.become(self)
        return outputs

    def load_own_variables(self, _: Any) -> None:
        """Refuse to read variables before the layer is what it was.

        Raises
        ------
        ModelError
            Always: Keras could not build the layer.
        """
        problem = f"layer {self.name!r} was saved quantized, and can't be read: Keras did not build it"  # type: ignore[attr-defined] # a layer's
        raise ModelError(problem, "give its class a build method, or call the model once before loading its variables.")


class Within(OfTwoClasses):
    """A layer whose weights are quantized by the layer around it, such as the cell of a recurrent layer."""


class Composite(OfTwoClasses):
    """A layer, or a model without a graph, with quantized layers inside that its own config does not tell of."""

    def _told_now(self) -> dict[str, Any]:
        return {"inside": self._kit.inside_of(self)}


class Passing(OfTwoClasses):
    """A batch norm whose work is done by the layer before it."""

    def build(self, _: Any = None) -> None:
        """Make no variables: the SavedModel format of Keras 2 builds what it reads."""
        self.built = True

    def _told_now(self) -> dict[str, Any]:
        return {"passing": True}


@functools.cache
def class_of_two(base: Any, own: Any, names: frozenset[str]) -> Any:
    """Return a class made of one of ours and a layer's own, in which some attributes are quantized weights."""
    body: dict[str, Any] = {
        "__doc__": own.__doc__,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "_own": own,
        "_names": names,
        **{name: _reading(name) for name in names},
    }
    ours = base.__mro__[: min((base.__mro__.index(cls) for cls in base._behind), default=0)]  # noqa: SLF001 - ours
    for name in {name: None for cls in base._behind for name in vars(cls)}:  # noqa: SLF001 - ours
        does = inspect.getattr_static(own, name, None)
        if isinstance(does, types.FunctionType | property | classmethod) and not any(name in vars(cls) for cls in ours):
            body[name] = does
    if base._wraps_call:  # noqa: SLF001 - ours
        body["call"] = _call_of(base, own)
    registered = f"{base._kit.package}>{base.__name__}"  # noqa: SLF001 - ours
    called = own.__name__ if base._kit.goes_by_registration else registered  # noqa: SLF001 - ours
    made = _metaclass_of(base, own)(called, (base, own), body)
    saving, package, name = base._kit.saving, base._kit.package, base.__name__  # noqa: SLF001 - ours
    saving.register_keras_serializable(package, name)(made)
    saving.get_custom_objects()[f"{package}>{name}"] = base  # any class made of it reads what another one wrote
    return made


def _metaclass_of(base: Any, own: Any) -> Any:
    """Return a metaclass for a class that inherits from both."""
    ours, theirs = type(base), type(own)
    if issubclass(ours, theirs) or issubclass(theirs, ours):
        return ours if issubclass(ours, theirs) else theirs
    return type(theirs.__name__, (ours, theirs), {})


def _call_of(base: Any, own: Any) -> Any:
    @functools.wraps(own.call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.call(self, *args, **kwargs)

    return call


def own_class(layer: Any) -> type[Any]:
    """Return the class that a layer was written with."""
    cls = type(layer)
    return cls._own if issubclass(cls, OfTwoClasses) else cls


def base_class(layer: Any) -> type[Any]:
    """Return our class that a layer has beside its own."""
    base: type[Any] = type(layer).__bases__[0]
    return base


def add_class(layer: Any, base: type[Any], names: frozenset[str] = frozenset()) -> None:
    """Give a layer a class made of one of ours and its own, in the place of the one it has."""
    cls = type(layer)
    names |= cls._names if issubclass(cls, OfTwoClasses) else frozenset()
    made: Any = class_of_two
    layer.__class__ = made(base, own_class(layer), names)


@contextmanager
def as_its_own_class(layer: Any) -> Iterator[None]:
    """Let a layer have only the class that it was written with."""
    cls = type(layer)
    layer.__class__ = own_class(layer)
    try:
        yield
    finally:
        layer.__class__ = cls


# ---- reading --------------------------------------------------------------------------------------------------------


def _reading(name: str) -> property:
    def get(self: Any) -> Any:
        if name not in vars(self):
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)
        return value_of(self, name, vars(self)[name])

    def put(self: Any, value: Any) -> None:
        vars(self)[name] = value

    return property(get, put)


def value_of(layer: Any, name: str, variable: Any) -> Any:
    """Return what an attribute that leads to a quantized weight gives: its quantized value while a model runs."""
    kit: Kit = type(layer)._kit  # noqa: SLF001 - ours
    value = _NOW.values.get(id(variable))
    if value is None and not kit.running():
        return variable
    host, attribute = vars(layer)[READINGS].by_name[name]
    told = vars(host)[TOLD]
    told.read.add(attribute)
    for sight in told.sights:
        sight.read(_reader_of(layer))
    if value is None:
        if not told.quantizes_weights:
            return variable
        value = host.quantized_for_call(told.trains_weights or kit.training(), [attribute]).get(id(variable))
        if value is None:  # the bias of a layer that has taken over its batch norm
            return variable
    return kit.cast_like(value, variable)


def _reader_of(layer: Any) -> str:
    """Return the name of the method, or of the function, that reads an attribute of a layer."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001 - who reads is known to the stack alone
    while frame is not None and (frame.f_globals is globals() or frame.f_locals.get("self") is layer):
        frame = frame.f_back  # Keras 3 has a property that reads the attribute with the variable
    assert frame is not None  # noqa: S101 - something reads
    name, owner = frame.f_code.co_name, frame.f_locals.get("self")
    return name if owner is None else f"{own_class(owner).__name__}.{name}"


@contextmanager
def held(values: Mapping[int, Any]) -> Iterator[None]:
    """Let reads of weights give these values, by the ``id`` of their variables: each is quantized once for a call."""
    before = _NOW.values
    _NOW.values = {**before, **values}
    try:
        yield
    finally:
        _NOW.values = before


def let_read(owner: Any, base: type[Any], variable: Any, host: Any, attribute: str) -> str:
    """Let every attribute of a layer that leads to a weight give what the layer that quantizes it makes of it.

    Parameters
    ----------
    owner : layer
        The layer that has the weight.
    base : type
        Our class that it gets beside its own.
    variable : variable
        The weight.
    host : layer
        The layer that quantizes it.
    attribute : str
        What the host calls the weight.

    Returns
    -------
    str
        An attribute in which the owner keeps the weight.
    """
    names = frozenset(name for name, value in vars(owner).items() if value is variable)
    add_class(owner, base, names)
    readings = vars(owner).setdefault(READINGS, Readings())
    readings.by_name.update(dict.fromkeys(names, (host, attribute)))
    return min(map(str, names))


# ---- configs --------------------------------------------------------------------------------------------------------


@contextmanager
def plainly() -> Iterator[None]:
    """Let layers tell their own config only: the one around them tells the rest."""
    before = _NOW.plainly
    _NOW.plainly = True
    try:
        yield
    finally:
        _NOW.plainly = before


def own_document(layer: Any) -> dict[str, Any]:
    """Return what Keras writes of a layer as if it had only its own class."""
    kit: Kit = type(layer)._kit  # noqa: SLF001 - ours
    with plainly(), as_its_own_class(layer):
        return kit.document(layer)
