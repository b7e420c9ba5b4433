"""Classes that are subclasses of another without being listed by it."""

from __future__ import annotations

import abc
import copy
import pickle
from typing import Any

import pytest

from trainable_core.backend.unlisted import UnlistedSubclass


class Root:
    """What both libraries build on."""

    def __init__(self) -> None:
        self.told = ["root"]

    def answer(self) -> str:
        return "root"


class Theirs(Root):
    """Another library's class."""

    def __init__(self) -> None:
        super().__init__()
        self.told.append("theirs")

    def answer(self) -> str:
        return "theirs, " + super().answer()


class Plain:
    """A base of ours that knows nothing of theirs."""

    def answer(self) -> str:
        return "plain, " + super().answer()  # type: ignore[misc] # whatever comes next in the order


class Ours(Plain, Root, metaclass=UnlistedSubclass, of=Theirs):
    """Ours, corrected."""

    def answer(self) -> str:
        return "ours, " + super().answer()


class Derived(Ours):
    """A user's class."""


class Listed(Plain, Theirs):
    """The same by ordinary inheritance."""

    def answer(self) -> str:
        return "ours, " + super().answer()


both = pytest.mark.parametrize("cls", [Ours, Derived])


@both
def test_it_is_a_subclass_that_the_other_does_not_list(cls: Any):
    assert isinstance(cls(), Theirs)
    assert issubclass(cls, Theirs)
    assert Theirs.__subclasses__() == [Listed]
    assert Theirs not in cls.__bases__


@both
def test_methods_are_found_in_the_order_of_ordinary_inheritance(cls: Any):
    assert cls().answer() == Listed().answer() == "ours, plain, theirs, root"
    assert cls().told == ["root", "theirs"]
    assert Ours.__mro__[1:] == Listed.__mro__[1:]


@both
def test_objects_are_copied_and_pickled(cls: Any):
    made = cls()
    made.told.append("more")
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301 - made one line above
        assert type(copied) is cls
        assert copied.told == made.told


def test_a_class_may_be_joined_with_one_of_the_other_library():
    class Joined(Ours, Listed):
        pass

    assert Joined.__mro__.index(Ours) < Joined.__mro__.index(Listed) < Joined.__mro__.index(Theirs)


def test_a_class_may_be_abstract_as_well():
    class Abstract(Ours, abc.ABC):
        @abc.abstractmethod
        def missing(self) -> None: ...

    class Concrete(Abstract):
        def missing(self) -> None: ...

    with pytest.raises(TypeError, match="missing"):
        Abstract()
    assert isinstance(Concrete(), Theirs)


def test_a_class_is_made_by_type_too():
    made = type("Made", (Ours, Root), {})
    assert issubclass(made, Theirs)
    assert made not in Theirs.__subclasses__()


def test_the_order_survives_new_bases():
    class Other(Plain):
        pass

    class Moved(Plain, metaclass=UnlistedSubclass, of=Theirs):
        pass

    Moved.__bases__ = (Other,)  # Keras 2 assigns bases when it chooses between its graph modes
    assert Moved.__mro__ == (Moved, Other, Plain, Theirs, Root, object)
    assert Moved not in Theirs.__subclasses__()


def test_an_object_may_take_such_a_class():
    made = Root()
    made.__class__ = type("Taken", (Ours, Root), {})
    assert isinstance(made, Theirs)
    assert made.answer().startswith("ours")


def test_keywords_of_other_classes_are_passed_on():
    class Asks:
        given: dict[str, Any]

        def __init_subclass__(cls, **keywords: Any) -> None:
            cls.given = keywords

    class Told(Asks, metaclass=UnlistedSubclass, of=Theirs, package="x"):
        pass

    assert Told.given == {"package": "x"}


def test_an_impossible_order_is_refused():
    with pytest.raises(TypeError, match="method resolution order"):

        class Impossible(Root, Plain, metaclass=UnlistedSubclass, of=type("Third", (Plain, Root), {})):
            pass
