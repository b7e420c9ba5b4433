"""A class made of two: a layer that gets quantizers keeps its identity, and becomes an instance of ours as well."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainable_core.errors import ModelError, QuantizerStateError

_made: MutableMapping[tuple[type, type, tuple[str, ...]], type] = weakref.WeakValueDictionary()
"""The classes made so far; one goes when no layer is of it any more."""


class WeightProperty(property):
    """A weight as an attribute of a class made of two: `read` is what a reader gets, `raw` what the layer has."""

    def __init__(self, read: Any, write: Any, delete: Any, raw: Callable[[Any], Any]) -> None:
        super().__init__(read, write, delete)
        self.raw = raw


class Reads:
    """Comes before a layer's own class and decides, weight by weight, what a reader of the attribute gets.

    Notes
    -----
    A weight is found where the layer has it: among the parameters, or as the tensor that a hook put in their place
    (weight norm, pruning), or where the layer's class computes it (parametrizations). It is set and deleted as it is
    without us.
    """

    own_class: type[nn.Module]
    read_names: tuple[str, ...]

    def float_weight(self, name: str) -> Any:
        """Return a weight as the layer has it.

        Raises
        ------
        AttributeError
            When the layer has none of that name.
        """
        fields: Any = self.__dict__
        weight = fields["_parameters"].get(name)
        return _property(type(self), name).raw(self) if weight is None else weight

    def read_weight(self, name: str, weight: Any) -> Any:
        """Return what a reader of a weight gets, who would find `weight` without us."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle or copy the layer as one of its own class, which becomes one of both again.

        A weight that a hook computed and left in the layer goes as its values: the graph it hangs in can't be copied.
        """
        reduced: Any = super().__reduce_ex__(protocol)
        made: Any = type(self)
        if "read_names" not in vars(made):  # a class made of this one by somebody else, who pickles it or does not
            return reduced
        rebuild, arguments, *rest = reduced
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: _without_graph(value) for name, value in rest[0].items()}
        arguments = tuple(made.own_class if each is made else each for each in arguments)
        return _remade, (rebuild, arguments, made.__bases__[0], made.read_names), *rest


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value


def _remade(rebuild: Callable[..., Any], arguments: tuple[Any, ...], kind: type, names: tuple[str, ...]) -> Any:
    """Return an unpickled layer, of both classes."""
    layer = rebuild(*arguments)
    object.__setattr__(layer, "__class__", class_of(type(layer), kind, names))
    return layer


def become(layer: nn.Module, kind: type[Reads], names: Iterable[str], needed: Iterable[str] = ()) -> None:
    """Make a layer an instance of one of our classes besides its own, in place.

    Parameters
    ----------
    layer : Module
        The layer.
    kind : type
        Our class.
    names : iterable of str
        Weights that are read through `Reads.read_weight`.
    needed : iterable of str
        Attributes that our class is going to set.

    Raises
    ------
    ModelError
        When Python can't make such a class, or the layer has attributes that ours needs.
    QuantizerStateError
        When the layer is of our classes already.
    """
    own = type(layer)
    if isinstance(layer, Reads):
        raise QuantizerStateError(own.__name__, "it is wrapped already", "wrap the float layer.")
    taken = sorted(_attributes(layer) & {*set(dir(kind)) - set(dir(nn.Module)) - {"layer"}, *needed})
    if taken:
        raise ModelError(f"{own.__name__} has an attribute {taken[0]!r}, which a quantized layer needs", "rename it.")
    try:
        made = _class_for(layer, kind, tuple(sorted(names)))
        if isinstance(layer, nn.RNNBase):
            layer.__dict__.pop("_flat_weights", None)  # from here on a property
        object.__setattr__(layer, "__class__", made)
    except TypeError as error:
        problem = f"{own.__module__}.{own.__qualname__} can't be combined with {kind.__name__}: {error}"
        raise ModelError(problem, "leave the layer out by a rule with skip: true.") from error


def _attributes(layer: nn.Module) -> set[str]:
    """Return the attributes of a layer that not every module has."""
    fields = layer.__dict__
    found = {*fields, *fields["_modules"], *fields["_parameters"], *fields["_buffers"]}
    for cls in type(layer).__mro__:
        if cls is nn.Module:
            break
        found.update(vars(cls))
    return found - set(dir(nn.Module))


def _class_for(layer: nn.Module, kind: type[Reads], names: tuple[str, ...]) -> type:
    if not parametrize.is_parametrized(layer):
        return class_of(type(layer), kind, names)
    # PyTorch made a class for this layer alone, and takes the first base when the last parametrization is removed
    injected = type(layer)
    below = class_of(injected.__bases__[0], kind, names)
    body = {name: value for name, value in vars(injected).items() if name not in ("__dict__", "__weakref__")}
    made = type(f"Parametrized{below.__name__}", (below,), body)
    stand_in_front(made)
    return made


def class_of(own: type, kind: type[Reads], names: tuple[str, ...]) -> type:
    """Return the class made of ours and a layer's own, always the same one."""
    found = _made.get((own, kind, names))
    if found is None:
        body: dict[str, Any] = {"own_class": own, "read_names": names, "__module__": kind.__module__}
        body |= {name: _stored(name, inspect.getattr_static(own, name, None)) for name in names}
        if issubclass(own, nn.RNNBase):
            body["_flat_weights"] = _flat_weights()
        forward, own_forward = vars(kind).get("forward"), getattr(own, "forward", None)
        if forward is not None and own_forward is not None:
            body["forward"] = _with_signature(forward, own_forward)
        found = _made[own, kind, names] = type(f"Quantized{own.__name__}", (kind, own), body)
    return found


def stand_in_front(cls: type) -> None:
    """Read quantized what somebody computes in the place of our weights, in a class made of one of ours."""
    ours = next(each for each in cls.__mro__ if "read_names" in vars(each))
    for each in cls.__mro__[: cls.__mro__.index(ours)]:
        for name in vars(ours)["read_names"]:
            theirs = vars(each).get(name)
            if isinstance(theirs, property) and not isinstance(theirs, WeightProperty):
                setattr(each, name, _computed(name, theirs))


def _property(cls: type, name: str) -> WeightProperty:
    if "read_names" not in vars(cls):
        stand_in_front(cls)
    found: WeightProperty = inspect.getattr_static(cls, name)
    return found


def _stored(name: str, own: Any) -> WeightProperty:
    """Return the property of a weight that the layer holds; `own` is what its class has under that name."""
    if isinstance(own, property):
        return _computed(name, own)

    def raw(self: Any) -> Any:
        fields = self.__dict__
        weight = fields["_parameters"].get(name)
        if weight is not None:
            return weight
        for place in (fields["_buffers"], fields, fields["_parameters"]):
            if name in place:
                return place[name]
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message)

    def read(self: Any) -> Any:
        return self.read_weight(name, raw(self))

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return WeightProperty(read, write, delete, raw)


def _computed(name: str, theirs: property) -> WeightProperty:
    """Return the property of a weight that somebody's property computes."""
    raw: Any = theirs.fget

    def read(self: Any) -> Any:
        return self.read_weight(name, raw(self))

    return WeightProperty(read, theirs.fset, theirs.fdel, raw)


def _flat_weights() -> property:
    """Return the property in the place of the list that recurrent layers keep of their weights: what they are now."""

    def read(self: Any) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def write(_self: Any, _value: Any) -> None:
        """Keep nothing: each weight is read where it is."""

    return property(read, write)


def _with_signature(forward: Any, own: Any) -> Any:
    """Return a copy of our forward with the layer's own signature and docstring."""
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__, copied.__doc__ = forward.__kwdefaults__, own.__doc__
    copied.__wrapped__ = own  # type: ignore[attr-defined] # what `inspect.signature` follows
    return copied
