"""Laws on deployment: training, evaluation and the deployed quantizer give the same values."""

from __future__ import annotations

from trainable_core.conformance.case import Case, Subject, grid, hostile_step, move
from trainable_core.conformance.law import law, require, same_bits


@law("The model that was evaluated must be the model that is deployed.")
def deployment(subject: Subject, case: Case) -> None:
    """In eval mode, values are those of ``convert2inferable()``, bit for bit, also after the variables have changed."""
    quantizer = subject.quantizer(case)
    values = subject.values(quantizer, case.x)
    same_bits("deployed values", subject.deployed(quantizer, case.x), values)
    move(quantizer, (1.3, 0.7))
    moved = subject.values(quantizer, case.x)
    same_bits("deployed values after the variables changed", subject.deployed(quantizer, case.x), moved)
    hostile_step(subject, quantizer, case, 0)
    hostile = subject.values(quantizer, case.x)
    deployed = subject.deployed(quantizer, case.x)
    same_bits("deployed values after an optimizer step with extreme gradients", deployed, hostile)


@law(
    "An integer bias is stored on the grid of weights times inputs: with another scale every sum is shifted.",
    of_grid=True,
)
def told_scale(subject: Subject, case: Case) -> None:
    """The scale that a quantizer tells to others is that of its grid, as it is now."""
    quantizer = subject.quantizer(case)
    for factors in ((1.0,), (1.3, 0.7)):
        move(quantizer, factors)
        told = subject.adapter.deployed_scale(quantizer)
        if told is None:
            return
        same_bits("the scale that is told", told, grid(quantizer).scale)


@law("A finalized model that is loaded selects the width that was deployed; another one is another model.")
def width_selection(subject: Subject, case: Case) -> None:
    """Each width of a quantizer can be selected, and is what is deployed then."""
    quantizer = subject.quantizer(case)
    for width in quantizer.widths if len(quantizer.widths) > 1 else ():
        quantizer.select_width(width)
        require("the width after it was selected", quantizer.selected_width == width, width, quantizer.selected_width)
        values = subject.values(quantizer, case.x)
        same_bits(f"deployed values with {width} bits selected", subject.deployed(quantizer, case.x), values)


@law("A model that runs in half precision must give the same codes after it is deployed.")
def deployed_dtypes(subject: Subject, case: Case) -> None:
    """In every dtype, the deployed quantizer gives the values of eval mode, in the input's dtype."""
    if subject.deploys_values:
        return  # a grid's values, rounded to a narrower dtype, are values of no grid
    quantizer = subject.quantizer(case)
    deployed = subject.adapter.deployed(quantizer)
    for dtype in subject.adapter.dtypes[1:]:
        x = subject.normal(case.x)
        expected = subject.run(quantizer, x, dtype=dtype)
        got = deployed(x, dtype, subject.way)
        require(f"dtype of a deployed {dtype} tensor", got.dtype == dtype, dtype, got.dtype)
        same_bits(f"deployed values of a {dtype} tensor", got.values, expected.values)


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
    for further in (0, 1, 7):
        for _ in range(further):
            quantizer.advance()
        values = subject.values(quantizer, case.x, training=True)
        same_bits("values in training", values, subject.values(quantizer, case.x))
        if subject.method.training_forward == "deployed":
            return
