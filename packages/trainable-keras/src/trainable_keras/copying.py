"""Copies a Keras model as it is: every object that belongs to it is made again, with what it holds.

Nothing is rebuilt from a config: a copy has the class of its original, the same paths and names, and whatever state the
original keeps, in variables, in attributes, in lookup tables or in functions that it made for itself. The given model
is left untouched, and shares nothing with the copy that either may change.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

import numpy as np

from trainable_core.errors import ModelError, TrainableError
from trainable_keras.framework import Framework
from trainable_keras.graph import direct_layers

_SHARED = (
    type(None), bool, int, float, complex, str, bytes, range, type, Enum, type(Ellipsis), type(NotImplemented),
    np.generic, np.dtype, inspect.Signature, types.ModuleType, types.BuiltinFunctionType, types.CodeType, property,
)  # fmt: skip
"""What can't be changed, so that a copy and its original share it."""

_LOCKS = (type(threading.Lock()), type(threading.RLock()))

_TRACKED = ("_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names")
"""Where TensorFlow keeps an account of an object's attributes."""

NOT_SPECIAL = object()
"""What `ModelCopier.special` returns for a value that is copied like any other."""


def join(prefix: str, name: str) -> str:
    """Return a layer's full name.

    Examples
    --------
    >>> join("", "stem"), join("stem", "conv")
    ('stem', 'stem.conv')
    """
    return f"{prefix}.{name}" if prefix else name


def attributes_without(value: Any, left_out: Collection[str]) -> dict[str, Any]:
    """Return an object's attributes without some, which TensorFlow's account of them has no longer either."""
    found = {name: each for name, each in vars(value).items() if name not in left_out}
    references, names = (found.get(name) for name in _TRACKED)
    if references is not None and any(each.name in left_out for each in references):
        found[_TRACKED[0]] = [each for each in references if each.name not in left_out]
        found[_TRACKED[1]] = {name: each for name, each in (names or {}).items() if name not in left_out}
    return found


def own_variables(layer: Any) -> list[Any]:
    """Return a layer's variables without those of the layers it holds itself."""
    inside = {id(variable) for each in direct_layers(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in inside]


@contextmanager
def made_again(layer: Any, name: str) -> Iterator[None]:
    """Raise ModelError, which names the layer, for whatever Keras raises while it makes a layer from its config."""
    try:
        yield
    except TrainableError:
        raise
    except Exception as error:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: {error}",
            "give its class a get_config that from_config can read.",
        ) from error


def copy_model(framework: Framework, model: Any) -> Any:
    """Return a copy of a model; see `ModelCopier`."""
    return framework.copier(framework).copy(model)


class ModelCopier(ABC):
    """Copies one model, and tells afterwards what came of each object in it.

    Parameters
    ----------
    framework : Framework
        The model's Keras.

    Notes
    -----
    Objects are made first and filled later, from a list of what is still to be filled: a network's layers lead to each
    other through its graph, and Python's stack is shorter than many networks are deep.
    """

    def __init__(self, framework: Framework) -> None:
        self.framework = framework
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []
        """Keeps temporary originals alive, so that no ``id`` is given away twice."""
        self._unfilled: deque[Callable[[], None]] = deque()
        self._last: list[Callable[[], None]] = []

    # ---- what each Keras writes -------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, model: Any) -> None:
        """Note which nodes of the model's graphs are copied; others belong to other models with the same layers."""

    @abstractmethod
    def special(self, value: Any) -> Any:
        """Return the copy of an object that is copied in a way of its own, else `NOT_SPECIAL`."""

    @abstractmethod
    def attributes(self, value: Any) -> dict[str, Any]:
        """Return the attributes of an object that its copy gets too."""

    @abstractmethod
    def is_known(self, value: Any) -> bool:
        """Return whether an object is one of Keras's, which is copied attribute by attribute."""

    @abstractmethod
    def belongs(self, value: Any) -> bool:
        """Return whether an object is a layer, a variable or the like, so that a function that holds it is copied."""

    @abstractmethod
    def finish(self) -> None:
        """Put right what a copy attribute by attribute leaves wrong."""

    # ---- copying ----------------------------------------------------------------------------------------------------

    def copy(self, model: Any) -> Any:
        """Return the copy of a model.

        Raises
        ------
        ModelError
            When something in it can't be copied; names the layer.
        """
        self.start(model)
        with made_again(model, ""):
            made = self.copied(model)
            self._drain()
            self.finish()
        return made

    def copy_of(self, original: Any) -> Any:
        """Return what came of an object of the model."""
        return self._copies[id(original)]

    def copy_with_id(self, key: int) -> Any:
        """Return what came of the object with this ``id``."""
        return self._copies[key]

    def later(self, function: Callable[[], None]) -> None:
        """Have a function called once everything is filled."""
        self._last.append(function)

    def _drain(self) -> None:
        while self._unfilled:
            self._unfilled.popleft()()
        for function in self._last:
            function()
        self._last = []

    def copied(self, value: Any) -> Any:
        """Return the copy of a value; the same one each time it is met."""
        if isinstance(value, _SHARED):
            return value
        key = id(value)
        if key not in self._copies:
            self._originals.append(value)
            made = self._make(value)
            self._copies.setdefault(key, made)
        return self._copies[key]

    def _make(self, value: Any) -> Any:
        made = self.special(value)
        if made is not NOT_SPECIAL:
            return made
        if hasattr(value, "python_function") and hasattr(value, "_clone"):  # made by tf.function
            python = value.python_function
            return value._clone(self.copied(python)) if self._holds(python, set()) else value  # noqa: SLF001 - there is no public way
        for kinds, make in _MAKERS:
            if isinstance(value, kinds):
                return make(self, value)
        if hasattr(value, "__dict__") and (self.is_known(value) or _is_plain(type(value))):
            with suppress(TypeError):  # made by C, such as a protocol buffer
                return self._object(value)
        try:
            if hasattr(value, "__deepcopy__"):
                return copy.deepcopy(value, dict(self._copies))
            return self._reduced(value)
        except Exception:  # noqa: BLE001 - a handle of the operating system, a tokenizer in Rust: what can't be copied
            return value

    def _reduced(self, value: Any) -> Any:
        """Return the copy of an object by what it tells pickle."""
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return value
        function, arguments, *rest = reduced
        state, items, pairs = (*rest, None, None, None)[:3]
        made = function(*map(self.copied, arguments))
        self._copies[id(value)] = made
        for item in items or ():
            made.append(self.copied(item))
        for key, item in pairs or ():
            made[self.copied(key)] = self.copied(item)
        if state is not None:
            state = self.copied(state)
            self.later(lambda: _set_state(made, state))
        return made

    def _object(self, value: Any) -> Any:
        made = object.__new__(type(value))
        self._copies[id(value)] = made
        self._unfilled.append(lambda: self.fill(value, made))
        return made

    def fill(self, value: Any, made: Any) -> None:
        """Give an object's copy its attributes."""
        vars(made).update({name: self.copied(each) for name, each in self.attributes(value).items()})
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in {"__dict__", "__weakref__"} and hasattr(value, name):
                    object.__setattr__(made, name, self.copied(getattr(value, name)))

    def copied_array(self, value: np.ndarray[Any, Any]) -> Any:
        """Return a copy of an array."""
        return copy.deepcopy(value)

    def copied_tuple(self, value: tuple[Any, ...]) -> Any:
        """Return a tuple with copies of its items; itself where nothing in it is copied."""
        items = [self.copied(each) for each in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if id(value) in self._copies:  # it leads back to itself
            return self._copies[id(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple.__new__(type(value), items)

    def copied_list(self, value: list[Any]) -> Any:
        """Return a list that will have copies of the items."""
        made = type(value).__new__(type(value))
        self._copies[id(value)] = made

        def fill() -> None:
            list.extend(made, [self.copied(each) for each in value])
            self._extras(value, made)

        self._unfilled.append(fill)
        return made

    def copied_dict(self, value: dict[Any, Any]) -> Any:
        """Return a dictionary that will have copies of the items."""
        made = type(value).__new__(type(value))
        self._copies[id(value)] = made
        put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__

        def fill() -> None:
            if isinstance(value, defaultdict) and isinstance(made, defaultdict):
                made.default_factory = self.copied(value.default_factory)
            for key, each in list(dict.items(value)):
                put(made, self.copied(key), self.copied(each))
            self._extras(value, made)

        self._unfilled.append(fill)
        return made

    def copied_set(self, value: Collection[Any]) -> Any:
        """Return a set with copies of the items."""
        if isinstance(value, frozenset):
            return type(value)(self.copied(each) for each in value)
        made: Any = type(value).__new__(type(value))
        self._copies[id(value)] = made
        items = [self.copied(each) for each in value]

        def fill() -> None:
            set.update(made, items)
            self._extras(value, made)

        self.later(fill)  # an item's hash may ask for what is not filled yet
        return made

    def copied_deque(self, value: deque[Any]) -> Any:
        """Return a queue that will have copies of the items."""
        made: deque[Any] = type(value)(maxlen=value.maxlen)
        self._copies[id(value)] = made
        self._unfilled.append(lambda: made.extend(self.copied(each) for each in value))
        return made

    def _extras(self, value: Any, made: Any) -> None:
        if hasattr(value, "__dict__"):
            vars(made).update({name: self.copied(each) for name, each in vars(value).items()})

    def copied_partial(self, value: functools.partial[Any]) -> Any:
        """Return a partial function of copies."""
        arguments = {name: self.copied(each) for name, each in value.keywords.items()}
        return type(value)(self.copied(value.func), *map(self.copied, value.args), **arguments)

    def copied_method(self, value: types.MethodType) -> Any:
        """Return the method of the copy of its object."""
        return types.MethodType(self.copied(value.__func__), self.copied(value.__self__))

    def copied_function(self, value: types.FunctionType) -> Any:
        """Return the function, or one of its own for the copy where it closes over what belongs to the model."""
        if not self._holds(value, set()):
            return value
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        made.__doc__, made.__kwdefaults__ = value.__doc__, value.__kwdefaults__
        self._copies[id(value)] = made

        def fill() -> None:
            for old, new in zip(value.__closure__ or (), cells, strict=True):
                if _is_filled(old):
                    new.cell_contents = self.copied(old.cell_contents)
            if value.__defaults__:
                made.__defaults__ = tuple(map(self.copied, value.__defaults__))
            vars(made).update({name: self.copied(each) for name, each in vars(value).items()})

        self._unfilled.append(fill)
        return made

    def _holds(self, value: Any, done: set[int]) -> bool:
        """Return whether a value is, or holds, something that belongs to the model."""
        if id(value) in done or isinstance(value, _SHARED):
            return False
        done.add(id(value))
        if self.belongs(value):
            return True
        inside: list[Any] = []
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            inside = [*cells, *(value.__defaults__ or ())]
        elif isinstance(value, types.MethodType):
            inside = [value.__self__]
        elif isinstance(value, functools.partial):
            inside = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            inside = list(value)
        elif isinstance(value, dict):
            inside = list(value.values())
        return any(self._holds(each, done) for each in inside)

    def copied_weak(self, value: weakref.ref[Any]) -> Any:
        """Return a weak reference to the copy of what it leads to."""
        referent = value()
        return value if referent is None else weakref.ref(self.copied(referent))


_MAKERS: list[tuple[Any, Callable[[Any, Any], Any]]] = [
    (np.ndarray, ModelCopier.copied_array),
    (tuple, ModelCopier.copied_tuple),
    (list, ModelCopier.copied_list),
    (dict, ModelCopier.copied_dict),
    ((set, frozenset), ModelCopier.copied_set),
    (deque, ModelCopier.copied_deque),
    (functools.partial, ModelCopier.copied_partial),
    (types.MethodType, ModelCopier.copied_method),
    (types.FunctionType, ModelCopier.copied_function),
    (_LOCKS, lambda _, value: type(value)() if isinstance(value, _LOCKS[1]) else threading.Lock()),
    (threading.local, lambda _, value: type(value)()),
    (weakref.ref, ModelCopier.copied_weak),
]
"""How values of Python's own types are copied."""


def _set_state(made: Any, state: Any) -> None:
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    vars(made).update(attributes or {})
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def _is_plain(cls: type) -> bool:
    """Return whether a class leaves copying to Python."""
    names = ("__reduce_ex__", "__reduce__")
    return not hasattr(cls, "__deepcopy__") and all(getattr(cls, name) is getattr(object, name) for name in names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
