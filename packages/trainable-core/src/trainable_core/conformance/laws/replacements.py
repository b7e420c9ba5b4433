"""Laws on methods that somebody puts in the place of a quantizer's own: in a subclass, or in the object itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject
from trainable_core.conformance.law import law, repeatable, require, same_bits, same_sums
from trainable_core.conformance.strategies import Kind

SMALL = Kind(moderate=True, finite=True, tensor=False)


@law(
    "Profilers, mocks and debuggers put a function of their own into an object, and expect it to be called.",
    kind=SMALL,
    about=repeatable,
    most=6,
)
def replaced_methods(subject: Subject, case: Case) -> None:
    """A method that is wrapped in the object is called where a subclass's would be, a hook too, and nothing changes."""
    adapter, cls, plain = subject.adapter, subject.cls, subject.quantizer(case)
    expected = subject.run(plain, case.x, training=True, upstream=case.upstream)
    evaluated, told = subject.values(plain, case.x), _told(subject, plain)
    observed = adapter.observe(subject.quantizer(case), case.x, case.upstream, training=True)
    require("a hook on the quantizer", not observed.unhooked, "called", "passed over")
    for name in adapter.replaceable:
        if not callable(getattr(cls, name, None)):
            continue
        calls: dict[str, int] = {"a subclass": 0, "the object": 0}
        made = _subclass(cls, name, calls)
        there = adapter.build(made, case.config, case.x.shape, case.arguments)
        subject.run(there, case.x, training=True, upstream=case.upstream)
        quantizer = subject.quantizer(case)
        _wrap(quantizer, name, calls)
        got = subject.run(quantizer, case.x, training=True, upstream=case.upstream)
        same_bits(f"values while `{name}` is wrapped", got.values, expected.values)
        if got.x is not None and expected.x is not None:
            same_bits(f"input's gradient while `{name}` is wrapped", got.x, expected.x)
        same_sums(f"gradient while `{name}` is wrapped,", got.variables, expected.variables, expected, case.upstream)
        called = {where: count > 0 for where, count in calls.items()}
        what = f"whether `{name}` is called where a subclass, or the object, has its own"
        require(what, called["a subclass"] == called["the object"], "both or none", called)
        same_bits(f"values in eval mode while `{name}` is wrapped", subject.values(quantizer, case.x), evaluated)
        scale = _told(subject, quantizer)
        if scale is not None and told is not None:
            same_bits(f"the scale that is told while `{name}` is wrapped", scale, told)


def _told(subject: Subject, quantizer: Any) -> NDArray[Any] | None:
    """Return the scale that a quantizer tells; one that computes its grid has none to tell."""
    return None if subject.method.computes_grid else subject.adapter.deployed_scale(quantizer)


def _subclass(cls: type[Any], name: str, calls: dict[str, int]) -> type[Any]:
    """Return a subclass whose method counts its calls, and does what the class's does."""
    inherited: Callable[..., Any] = getattr(cls, name)

    def counting(self: Any, *args: Any, **keywords: Any) -> Any:
        returned = inherited(self, *args, **keywords)
        calls["a subclass"] += returned is not None  # None: nothing that is used
        return returned

    space = {name: counting, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    metaclass: Any = type(cls)
    made: type[Any] = metaclass(cls.__name__, (cls,), space)
    return made


def _wrap(quantizer: Any, name: str, calls: dict[str, int]) -> None:
    """Put a function into an object that counts its calls, and does what the object's method does."""
    own: Callable[..., Any] = getattr(quantizer, name)

    def counting(*args: Any, **keywords: Any) -> Any:
        returned = own(*args, **keywords)
        calls["the object"] += returned is not None
        return returned

    setattr(quantizer, name, counting)
