"""Classes that inherit from another library's, and yet are not among its ``__subclasses__()``.

mct-quantizers and what is built on it find their classes by walking ``__subclasses__()``, and expect exactly one for a
target and a grid, or one under a name. Our corrected classes must be instances of theirs, and must not be found so.
``__subclasses__()`` is kept from ``__bases__``, while `isinstance`, `issubclass`, `super` and the look-up of attributes
follow the method resolution order, which a metaclass may define. So the other library's class is in our order, and not
among our bases.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any


class UnlistedSubclass(ABCMeta):
    """Metaclass of a class that is a subclass of another one without being listed by it.

    The other class is named by the keyword `of`, and takes the place of a last base. Subclasses inherit both the order
    and the metaclass; they need no keyword.

    Notes
    -----
    It is an `ABCMeta`, so that a subclass may have `abc.ABC` among its bases as well.

    Examples
    --------
    >>> class Theirs:
    ...     def answer(self):
    ...         return 42
    >>> class Ours(metaclass=UnlistedSubclass, of=Theirs): ...
    >>> Ours().answer(), isinstance(Ours(), Theirs), Theirs.__subclasses__()
    (42, True, [])
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **keywords: Any) -> Any:
        """Create the class; `of` is the class to inherit from, and further keywords are ``__init_subclass__``'s."""
        of = keywords.pop("of", None)
        members = namespace if of is None else {**namespace, "_unlisted_base": of}
        return super().__new__(mcs, name, bases, members, **keywords)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **keywords: Any) -> None:
        keywords.pop("of", None)
        super().__init__(name, bases, namespace, **keywords)

    def mro(cls) -> list[type]:
        """Return the method resolution order: that of the bases, merged with that of the unlisted one."""
        of = cls.__dict__.get("_unlisted_base")
        if of is None:
            return super().mro()
        bases = [base for base in cls.__bases__ if base is not object]
        orders = [[*base.__mro__] for base in bases]
        return [cls, *_merged([*orders, [*of.__mro__], bases])]

    # `ABCMeta` would ask a Python function for every `isinstance`, which the layers of a model ask at each call
    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__


def _merged(orders: list[list[type]]) -> list[type]:
    """Return one order in which every given order is kept: the C3 merge."""
    merged: list[type] = []
    while orders := [order for order in orders if order]:
        for order in orders:
            head = order[0]
            if not any(head in other[1:] for other in orders):
                break
        else:
            heads = ", ".join(order[0].__name__ for order in orders)
            message = f"there is no consistent method resolution order for {heads}"
            raise TypeError(message)
        merged.append(head)
        orders = [order[1:] if order[0] is head else order for order in orders]
    return merged
