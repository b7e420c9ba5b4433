"""Laws on deployment: what is trained, what is evaluated and what ships are one thing."""

from __future__ import annotations

from trainable_core.conformance.case import Case, Subject, hostile_step, move
from trainable_core.conformance.law import law, same_bits


@law("what was evaluated is what ships")
def deployment(subject: Subject, case: Case) -> None:
    """In eval mode, values are those of ``convert2inferable()``, bit for bit, also after the variables moved."""
    quantizer = subject.quantizer(case)
    values = subject.values(quantizer, case.x)
    same_bits("deployed values", subject.adapter.deploy(quantizer, case.x), values)
    move(quantizer, (1.3, 0.7))
    moved = subject.values(quantizer, case.x)
    same_bits("deployed values after the variables moved", subject.adapter.deploy(quantizer, case.x), moved)
    hostile_step(subject, quantizer, case, 0)
    hostile = subject.values(quantizer, case.x)
    same_bits("deployed values after a hostile step", subject.adapter.deploy(quantizer, case.x), hostile)


@law("what was trained is what ships: a loss measured on other values is another model's")
def training_equals_evaluation(subject: Subject, case: Case) -> None:
    """In train mode, values are those of eval mode; for a soft or random forward, once the schedule has ended."""
    quantizer = subject.quantizer(case)
    if subject.method.training_forward != "deployed":
        end = subject.schedule_end(quantizer)
        if end is None:
            return  # never; the law `deployment` holds in eval mode
        for _ in range(max(end - case.steps, 0)):
            quantizer.advance()
    values = subject.values(quantizer, case.x, training=True)
    same_bits("values in training", values, subject.values(quantizer, case.x))
