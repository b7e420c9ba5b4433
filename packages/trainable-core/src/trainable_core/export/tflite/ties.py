"""Where the kernels of a file put a value half way between two codes."""

from __future__ import annotations

from trainable_core.enums import TieRule
from trainable_core.export.tflite.lowering import Lowered
from trainable_core.export.tflite.program import Program
from trainable_core.targets.known import TFLITE


def tie_rule_of(program: Program, name: str) -> TieRule:
    """Return the rule of the operator that makes a tensor's codes; of an input, the rule for whoever makes them."""
    maker = program.makers().get(program.source(name))
    rule = TFLITE.tie_rule_of("" if maker is None else maker.code.lower())
    assert rule is not None  # noqa: S101 - the record says so
    return rule


def tie_rules(lowered: Lowered) -> dict[str, TieRule]:
    """Return the rule that each activation quantizer must follow to give the file's codes, by its name.

    A quantizer whose calls become operators of different rules is given that of most operators.
    """
    found = {}
    for name, tensors in lowered.activations.items():
        rules = {tie_rule_of(lowered.program, tensor) for tensor in tensors}
        found[name] = TieRule.HALF_EVEN if TieRule.HALF_EVEN in rules else TieRule.HALF_UP
    return found
