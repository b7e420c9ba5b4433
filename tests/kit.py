"""Which part of the conformance kit the tests of a backend run; `trainable check` runs all of it."""

from __future__ import annotations

from trainable_core.conformance.suite import Check
from trainable_core.registry.methods import built_in_methods

WHOLE = ("STE", "LSQ", "DQA")
"""Built-in methods with code of their own from kernels to schedules; the others give slopes to one function."""

SHORT = (
    "on_grid",
    "tie_rule",
    "deployment",
    "training_equals_evaluation",
    "reference_values",
    "input_gradient",
    "gradient_at_ends",
    "variable_gradients",
    "nonfinite_inputs",
    "regularization_of_tensor",
    "config_round_trip",
)
"""Laws on what the others write themselves: their values, their gradients, and what stands for their grid."""


def is_whole(training_method: str) -> bool:
    """Return whether the tests run everything on a method's quantizers; a plugin's are never cut."""
    return training_method in WHOLE or training_method not in built_in_methods()


def affordable(checks: list[Check]) -> list[Check]:
    """Return the checks of whole methods, and of the others those of a few laws."""
    return [check for check in checks if is_whole(check.subject.key.quantizer_id) or check.law.name in SHORT]
