"""Laws on training: bounds of thresholds, freezing, optimizer groups, schedules."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from trainable_core.conformance.case import (
    Case,
    Subject,
    Violation,
    free_axes,
    grid,
    grid_names,
    hostile_step,
    moves_in_a_call,
    variables,
    with_fields,
)
from trainable_core.conformance.law import law, repeatable, require, same_bits, same_training
from trainable_core.conformance.strategies import Kind
from trainable_core.enums import VariableGroup

SMALL = Kind(moderate=True, finite=True, tensor=False)


@law(
    "One bad batch must not leave a threshold at zero, negative or NaN: the channel would be NaN from then on.",
    of_grid=True,
)
def bounded_thresholds(subject: Subject, case: Case) -> None:
    """After optimizer steps with huge, infinite and NaN gradients, scales are positive and values finite."""
    quantizer = subject.quantizer(case)
    for step in range(2):
        hostile_step(subject, quantizer, case, step)
        scale = grid(quantizer).scale
        require("the scale is positive and finite", np.isfinite(scale) & (scale > 0), "positive numbers", scale)
        values = subject.values(quantizer, case.x)
        require("values after steps with extreme gradients are finite", np.isfinite(values), "finite numbers", values)


@law(
    "Fine-tuning with frozen thresholds promises that the grids stay as the hardware expects them.",
    kind=Kind(moderate=True, finite=True),
)
def freeze(subject: Subject, case: Case) -> None:
    """Frozen by argument, by call or by the framework, no variable moves; unfrozen, the same ones learn as before."""
    thawed = subject.quantizer(case)
    learned = sorted(subject.adapter.trained(thawed))
    by_argument = subject.quantizer(
        Case(
            case.config,
            case.x,
            case.upstream,
            case.factors,
            case.steps,
            {**case.arguments, "freeze_quant_params": True},
        )
    )
    by_call = subject.quantizer(case)
    by_call.freeze()
    for how, quantizer in (("argument", by_argument), ("call", by_call)):
        before = variables(quantizer)
        listed = [v for group in VariableGroup for v in quantizer.get_trainable_variables(group)]
        require(f"trainable variables, frozen by {how}", not listed, 0, len(listed))
        subject.run(quantizer, case.x, training=True, upstream=case.upstream)
        subject.adapter.descend(quantizer, {name: np.ones_like(value) for name, value in before.items()})
        for name, value in variables(quantizer).items():
            same_bits(f"{name}, frozen by {how}, after a step", value, before[name])
        quantizer.freeze(frozen=False)
        again = sorted(subject.adapter.trained(quantizer))
        require(f"variables that learn after unfreezing, frozen by {how}", again == learned, learned, again)
    if subject.adapter.withhold(thawed):
        before = variables(thawed)
        subject.run(thawed, case.x, training=True, upstream=case.upstream)
        for name, value in variables(thawed).items():
            same_bits(f"{name}, frozen as the framework freezes any layer", value, before[name])


@law(
    "Grids are frozen late in a training: the weights must go on to learn as before.",
    kind=Kind(exact=True),
    about=repeatable,
)
def gradient_of_a_frozen_quantizer(subject: Subject, case: Case) -> None:
    """Frozen, a quantizer gives its input the gradient that it gives while it learns, beside an infinity too."""
    for beside in (False, True):
        x = subject.normal(case.x).copy()
        if beside and x.size > 1:
            x.reshape(-1)[-1] = np.inf
        if moves_in_a_call(subject, case, x):
            return  # what is frozen stays where it is
        learning, frozen = subject.quantizer(case), subject.quantizer(case)
        frozen.freeze()
        expected, got = (subject.run(each, x, training=True, upstream=case.upstream) for each in (learning, frozen))
        same_training(subject, case, "while frozen", got, expected)


@law("Layers that are sensitive are switched off in a recipe, and train as float layers do.", kind=SMALL, most=4)
def disabled(subject: Subject, case: Case) -> None:
    """Switched off, a quantizer returns what it is given, with its gradient, and adds nothing to the loss."""
    quantizer = subject.fresh(case, with_fields(case.config, **{f"enable_{case.config.prefix}_quantization": False}))
    same_bits("values, switched off", subject.values(quantizer, case.x), case.x)
    run = subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    same_bits("values in training, switched off", run.values, case.x)
    if run.x is None:
        raise Violation("gradient of the input, switched off", "an array", None)
    same_bits("gradient of the input, switched off", run.x, case.upstream)
    added = [each for each in subject.adapter.collected(quantizer, case.x) if each]
    require("terms that it adds to the loss, switched off", not added, [], added)


@law("One batch with an overflow, or an empty one, must not stay in a training for good.", kind=SMALL, most=4)
def bad_batches(subject: Subject, case: Case) -> None:
    """Training calls with infinities, with NaN and with no elements leave every number of the state finite."""
    batches = {
        "infinities": np.full_like(case.x, np.inf),
        "NaN": np.full_like(case.x, np.nan),
        "an infinity": np.where(np.arange(case.x.size).reshape(case.x.shape) == 0, np.float32(-np.inf), case.x),
    }
    axis = next(iter(free_axes(case)), None)
    if axis is not None:
        batches["no elements"] = case.x.take([], axis)
    for what, x in batches.items():
        quantizer = subject.quantizer(case, x.shape)
        subject.adapter.collected(quantizer, x)
        kept = [name for name, value in subject.adapter.entries(quantizer).items() if not np.isfinite(value).all()]
        require(f"numbers of the state that are not finite after a training call with {what}", not kept, [], kept)


@law("A number that is counted in Python is lost with a checkpoint, and a graph counts it once.", kind=SMALL, most=4)
def python_state(subject: Subject, case: Case) -> None:
    """Calls that are alike change no number or generator that an attribute holds in Python, and no container grows."""
    quantizer, seen = subject.quantizer(case), []
    for _ in range(CALLS):
        subject.values(quantizer, case.x, training=True)
        seen.append(_plain(quantizer))
    moving = [
        name for name in seen[0] if all(name in each for each in seen) and _differ([each[name] for each in seen[1:]])
    ]
    require("attributes that change with each call in training", not moving, [], moving)


CALLS = 5
"""The first may fill what is kept for later calls."""


def _plain(quantizer: Any) -> dict[str, Any]:
    """Return the quantizer's plain numbers, and the sizes of its containers, by the names of their attributes."""
    sizes = {
        name: len(value) for name, value in vars(quantizer).items() if isinstance(value, list | dict | set | tuple)
    }
    numbers = {name: value for name, value in vars(quantizer).items() if isinstance(value, bool | int | float)}
    generators = {name: state for name, value in vars(quantizer).items() if (state := _state_of(value)) is not None}
    return {**sizes, **numbers, **generators}


def _state_of(value: Any) -> str | None:
    """Return the state of a generator of random numbers, of Python's or NumPy's or one that is like them."""
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    read = next((read for name in ("getstate", "get_state") if callable(read := getattr(value, name, None))), None)
    return None if read is None else repr(read())


def _differ(values: list[Any]) -> bool:
    return all(one != other for one, other in pairwise(values))


@law("An optimizer trains what the groups list: no variable may be missing or listed twice.", kind=Kind(moderate=True))
def variable_groups(subject: Subject, case: Case) -> None:
    """Each variable that learns is in exactly one group, and those learn that the method declares."""
    quantizer = subject.quantizer(case)
    groups = {group: quantizer.get_trainable_variables(group) for group in VariableGroup}
    listed = [id(variable) for group in groups.values() for variable in group]
    own = {id(quantizer.get_quantizer_variable(name)): name for name in quantizer.variable_names}
    names = sorted(own.get(each, "a variable without a name") for each in listed)
    learned = sorted(subject.adapter.trained(quantizer))
    require("variables in the groups, compared with those that the framework trains", names == learned, learned, names)
    grids = grid_names(quantizer)
    of_qparams = {own.get(id(variable), "") for variable in groups[VariableGroup.QPARAMS]}
    expected = grids if subject.method.learns_grid else set()
    require(
        "grid variables in group QPARAMS", of_qparams & grids == expected, sorted(expected), sorted(of_qparams & grids)
    )
    declared, others = sorted(subject.method.own_names), sorted(set(learned) - grids)
    require(
        "variables that learn beside the grid's, compared with the declared `own_variables`",
        others == declared,
        declared,
        others,
    )


@law(
    "A training that was interrupted must go on as if it had not been.",
    kind=Kind(moderate=True, finite=True),
    about=repeatable,
)
def schedule_resume(subject: Subject, case: Case) -> None:
    """A quantizer that is restored from a saved state continues its schedule where it was."""
    calibrated = replace(case, factors=(1.0,))  # the law `state_round_trip` covers the variables
    straight = subject.quantizer(calibrated)
    subject.run(straight, case.x, training=True, upstream=case.upstream)  # what it keeps of that must be saved
    resumed = subject.fresh(calibrated)
    subject.adapter.restore(resumed, subject.adapter.save(straight))
    for _ in range(2):
        expected = subject.run(straight, case.x, training=True, upstream=case.upstream)
        got = subject.run(resumed, case.x, training=True, upstream=case.upstream)
        same_bits("training values after resuming", got.values, expected.values)
        for name, gradient in expected.variables.items():
            same_bits(f"gradient of {name} after resuming", got.variables[name], gradient)
        straight.advance()
        resumed.advance()
