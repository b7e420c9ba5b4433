"""Laws on deployment: training, evaluation and the deployed quantizer give the same values."""

from __future__ import annotations

from trainable_core.conformance.case import Case, Subject, hostile_step, move
from trainable_core.conformance.declared import deployed_input
from trainable_core.conformance.law import law, same_bits


@law("The model that was evaluated must be the model that is deployed.")
def deployment(subject: Subject, case: Case) -> None:
    """In eval mode, values are those of ``convert2inferable()``, bit for bit, also after the variables have changed."""
    quantizer = subject.quantizer(case)
    values = subject.values(quantizer, case.x)
    same_bits("deployed values", subject.adapter.deploy(quantizer, deployed_input(subject, quantizer, case)), values)
    move(quantizer, (1.3, 0.7))
    moved = subject.values(quantizer, case.x)
    given = deployed_input(subject, quantizer, case)
    same_bits("deployed values after the variables changed", subject.adapter.deploy(quantizer, given), moved)
    hostile_step(subject, quantizer, case, 0)
    hostile = subject.values(quantizer, case.x)
    same_bits(
        "deployed values after an optimizer step with extreme gradients",
        subject.adapter.deploy(quantizer, deployed_input(subject, quantizer, case)),
        hostile,
    )


@law("A loss that is computed from other values than the deployed ones optimizes another model.")
def training_equals_evaluation(subject: Subject, case: Case) -> None:
    """In training mode, values are those of eval mode; for a soft or random forward, once the schedule has ended."""
    quantizer = subject.quantizer(case)
    if subject.method.training_forward != "deployed":
        end = subject.schedule_end(quantizer)
        if end is None:
            return  # training values never become the deployed ones; eval mode is covered by the law `deployment`
        for _ in range(max(end - case.steps, 0)):
            quantizer.advance()
    values = subject.values(quantizer, case.x, training=True)
    same_bits("values in training", values, subject.values(quantizer, case.x))
