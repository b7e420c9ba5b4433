"""Everything whose training follows a schedule: recipes of all built-in methods and modifiers that have one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from trainable_core.modifier import Modifier
from trainable_core.registry.methods import built_in_methods

STEPS = 8
"""Training steps of a run; schedules begin and end within it."""
STOPS = st.integers(1, STEPS - 1)
TIMES = {
    "linear": {"kind": "linear", "t_start": 1, "t_end": 6},
    "cosine": {"kind": "cosine", "t_start": 0, "t_end": 7},
    "exponential": {"kind": "exponential", "t_start": 2, "t_end": 5},
    "step": {"kind": "step", "t_start": 0, "t_end": 6, "n_steps": 3},
}


def _section(training_method: str, schedule: dict[str, Any] | None = None, **modifiers: Any) -> dict[str, Any]:
    return {
        "training_method": training_method,
        "method": "SYMMETRIC",
        "n_bits": 3,
        "arguments": schedule or {},
        "modifiers": modifiers,
    }


def _recipes(times: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a recipe for each name of a method or modifier; values of a schedule suit what follows it."""
    plain = _section("LSQ")

    def going(initial: float, target: float) -> dict[str, Any]:
        return {**times, "initial_val": initial, "target_val": target}

    temperature = _section("DQA", {"temperature": going(1.0, 0.1)})
    gradual = _section("LSQ", gradual_quantization={"share": going(1.0, 0.01)})
    dampening = _section("LSQ", oscillation_dampening={"strength": going(0.01, 0.5)})
    freezing = _section("LSQ", oscillation_freezing={"threshold": going(0.3, 0.02), "momentum": 0.1})
    table = {**_section("DKM", {"temperature": going(0.3, 0.1)}), "method": "LUT_SYM_QUANTIZER"}
    return {
        "DKM": {"weights": table, "activations": {**table, "method": "LUT_POT_QUANTIZER"}},
        "DQA": {"weights": temperature, "activations": temperature},
        "ADAROUND": {"weights": _section("ADAROUND", {"beta": going(20.0, 2.0)}), "activations": plain},
        "oscillation_dampening": {"weights": dampening, "activations": plain},
        "oscillation_freezing": {"weights": freezing, "activations": plain},
        "gradual_quantization": {"weights": plain, "activations": gradual},
    }


CASES = (
    ("DKM", "linear"),  # its temperature knows no other kind, and neither does that of DQA
    ("DQA", "linear"),
    ("ADAROUND", "linear"),
    ("ADAROUND", "cosine"),
    ("oscillation_dampening", "cosine"),
    ("oscillation_dampening", "exponential"),
    ("oscillation_freezing", "exponential"),
    ("oscillation_freezing", "step"),
    ("gradual_quantization", "linear"),
    ("gradual_quantization", "step"),
)
SCHEDULED = {f"{name}-{kind}": _recipes(TIMES[kind])[name] for name, kind in CASES}


def with_schedules(modifiers: Iterable[type[Modifier]]) -> set[str]:
    """Return the names of all built-in methods that count steps, and of those of these modifiers that do."""
    methods = {name for name, method in built_in_methods().items() if method.counts_steps}
    return methods | {cls.name for cls in modifiers if cls.counts_steps}


def tried() -> set[str]:
    """Return the names of all methods and modifiers that there are recipes for."""
    return {name for name, _ in CASES}
