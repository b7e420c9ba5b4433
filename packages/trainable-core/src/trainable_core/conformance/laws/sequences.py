"""Laws on sequences of calls, as trainings make them: several forwards, steps without a forward, new numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.conformance.case import BESIDE, Case, Config, Subject, Violation, move, variables, with_fields
from trainable_core.conformance.law import close, law, repeatable, require, same_bits, same_mode, same_sums
from trainable_core.conformance.strategies import Kind
from trainable_core.enums import VariableGroup
from trainable_core.errors import TrainableError
from trainable_core.reference.oracle import EPSILON

MODERATE = Kind(moderate=True, finite=True)
SMALL = Kind(moderate=True, finite=True, tensor=False)
STEP = np.float32(2.0**-6)
TERM = 2.0**-12
"""Relative distance of two terms whose averages were rounded at other times."""


def train(subject: Subject, quantizer: Any, case: Case) -> None:
    """Take one step of gradient descent: a forward, a backward, and a small step."""
    run = subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    subject.adapter.descend(quantizer, {name: STEP * np.sign(value) for name, value in run.variables.items()})


def rebuilt(subject: Subject, case: Case, quantizer: Any) -> Any:
    """Return a new quantizer with the numbers that one has, which was never called."""
    again = subject.fresh(case)
    for name, value in variables(quantizer).items():
        again.assign(again.get_quantizer_variable(name), value)
    return again


@law(
    "Shared layers are called twice before they go backward; two losses go backward through one call.",
    kind=MODERATE,
    about=repeatable,
)
def interleaved_calls(subject: Subject, case: Case) -> None:
    """Two forwards before a backward, in either order, give what each gives alone, and so does a second backward."""
    calls = [(case.x, case.upstream), (np.flip(case.x) * np.float32(0.75), -np.flip(case.upstream))]
    calls = [(np.ascontiguousarray(x), np.ascontiguousarray(upstream)) for x, upstream in calls]
    alone = subject.quantizer(case)
    expected = [subject.run(alone, x, training=True, upstream=upstream) for x, upstream in calls]
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        got = subject.adapter.interleave(subject.quantizer(case), calls, order)
        for index in order:
            what = f"call {index + 1} of 2, backward in the order {[each + 1 for each in order]}"
            same_bits(f"values of {what}", got[index].values, expected[index].values)
            found, wanted = got[index].x, expected[index].x
            if found is None or wanted is None:
                raise Violation(f"gradient of the input of {what}", "an array", found)
            same_bits(f"gradient of the input of {what}", found, wanted)
            upstream = calls[index][1]
            same_sums(f"gradient, {what},", got[index].variables, expected[index].variables, got[index], upstream)


@law("Large batches are accumulated: several backward passes, then one step.", kind=MODERATE, about=repeatable)
def accumulation(subject: Subject, case: Case) -> None:
    """Gradients of several backward passes add up."""
    calls = [(case.x, case.upstream), (case.x * np.float32(0.5), case.upstream)]
    alone = subject.quantizer(case)
    runs = [subject.run(alone, x, training=True, upstream=upstream) for x, upstream in calls]
    got = subject.adapter.accumulate(subject.quantizer(case), calls)
    require(
        "variables with gradients", sorted(got) == sorted(runs[0].variables), sorted(runs[0].variables), sorted(got)
    )
    for name, gradient in got.items():
        parts = [run.variables[name].astype(np.float64) for run in runs]
        # each part is a sum in an order of its own; see `law.same_sums`
        terms = np.abs(case.upstream).sum(dtype=np.float64) * 4 * (case.x.size + 16) * EPSILON
        near = np.abs(gradient - sum(parts)) <= sum(np.abs(part) for part in parts) * EPSILON + terms
        require(f"accumulated gradient of {name}", near, sum(parts), gradient)


@law("The last thing that a training does before it deploys is a step; nobody evaluates in between.", kind=MODERATE)
def deploy_after_step(subject: Subject, case: Case) -> None:
    """After an optimizer step, what is deployed without a forward between has the new numbers."""
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x)  # whatever is kept from one evaluation to the next is kept now
    train(subject, quantizer, case)
    deployed = subject.deployed(quantizer, case.x)
    same_bits("values after a step, evaluated", subject.values(quantizer, case.x), deployed)
    expected = subject.values(rebuilt(subject, case, quantizer), case.x)
    same_bits("values deployed after a step, and those of a new quantizer with its numbers", deployed, expected)


@law("A snapshot of a training is deployed, and the training goes on.", kind=MODERATE, about=repeatable)
def convert_midway(subject: Subject, case: Case) -> None:
    """Converting changes nothing about the training that goes on, and training nothing about what was converted."""
    straight, quantizer = subject.quantizer(case), subject.quantizer(case)
    for each in (straight, quantizer):
        train(subject, each, case)
    deployed = subject.adapter.deployed(quantizer)
    same_mode(subject, case, "a quantizer that was converted", quantizer, straight)
    given = subject.values(quantizer, case.x) if subject.deploys_values else case.x
    first = deployed(given, "float32", subject.way).values
    for _ in range(2):
        expected, got = (
            subject.run(each, case.x, training=True, upstream=case.upstream) for each in (straight, quantizer)
        )
        same_bits("values in training after converting", got.values, expected.values)
        require("what learns after converting", sorted(got.variables) == sorted(expected.variables),
                sorted(expected.variables), sorted(got.variables))  # fmt: skip
        for name, gradient in expected.variables.items():
            same_bits(f"gradient of {name} after converting", got.variables[name], gradient)
        for each in (straight, quantizer):
            train(subject, each, case)
    move(quantizer, (3.0,))
    again = deployed(given, "float32", subject.way).values
    same_bits("what was deployed before the training went on", again, first)


def doubled(params: Any) -> dict[str, Any]:
    """Return quantization params whose numbers are twice as large."""
    return {
        key: value if key in BESIDE else (np.asarray(value, np.float64) * 2).tolist() for key, value in params.items()
    }


@law(
    "A model is calibrated again on better data; the optimizer that was made before holds its variables.",
    kind=SMALL,
    of_grid=True,
)
def recalibration(subject: Subject, case: Case) -> None:
    """A second calibration gives what a first one with its numbers gives, in the same variables."""
    params = doubled(case.config.quantization_params)
    other = with_fields(case.config, **{f"{case.config.prefix}_quantization_params": params})
    quantizer, expected = subject.fresh(case), subject.fresh(case, other)
    subject.values(quantizer, case.x)
    own = {name: quantizer.get_quantizer_variable(name) for name in quantizer.variable_names}
    learned = sorted(subject.adapter.trained(quantizer))
    quantizer.set_quantization_params(dict.fromkeys(quantizer.widths, params))
    same_bits("deployed values after a second calibration", subject.deployed(quantizer, case.x),
              subject.deployed(expected, case.x))  # fmt: skip
    same_bits("values after a second calibration", subject.values(quantizer, case.x), subject.values(expected, case.x))
    for name, variable in own.items():
        same = quantizer.get_quantizer_variable(name) is variable
        require(f"{name} after a second calibration", same, "the same variable", "another one")
    again = sorted(subject.adapter.trained(quantizer))
    require("what learns after a second calibration", again == learned, learned, again)
    if not subject.random:
        _draws_anew(subject, case, other)


def _draws_anew(subject: Subject, case: Case, other: Config) -> None:
    """Require that a term draws to what a second calibration found, and not to what the first one did.

    A training call comes before the second calibration in one quantizer, and after it in the other: averages of what
    both have seen are the same.
    """
    late, early = subject.fresh(case), subject.fresh(case, other)
    for quantizer in (late, early):
        subject.values(quantizer, case.x, training=True)
        quantizer.set_quantization_params(dict.fromkeys(quantizer.widths, other.quantization_params))
        subject.values(quantizer, case.x, training=True)
    found, wanted = (subject.adapter.regularization(each) for each in (late, early))
    if found is not None and wanted is not None:
        got, expected = np.asarray(found[0]), np.asarray(wanted[0])
        close("term for the loss after a second calibration", got, expected, TERM * np.abs(expected))


@law("A checkpoint is loaded into the model that is already there, and deployed.", kind=SMALL)
def load_then_deploy(subject: Subject, case: Case) -> None:
    """A state that is loaded into a calibrated quantizer, called before, is what is deployed at once."""
    source, quantizer = subject.quantizer(case), subject.quantizer(case)
    move(quantizer, (2.0,))
    subject.values(quantizer, case.x)
    subject.values(quantizer, case.x, training=True)
    subject.deployed(quantizer, case.x)
    subject.adapter.restore(quantizer, subject.adapter.save(source))
    expected = subject.values(source, case.x)
    same_bits("values deployed after loading", subject.deployed(quantizer, case.x), expected)
    same_bits("values after loading", subject.values(quantizer, case.x), expected)


@law("Grids are frozen late in a training, when there are gradients already, and thawed to go on.", kind=SMALL)
def freeze_midway(subject: Subject, case: Case) -> None:
    """Frozen after a backward pass, nothing moves; thawed and frozen again, it is as if the step had not been."""
    quantizer, straight = subject.quantizer(case), subject.quantizer(case)
    step = subject.adapter.optimizer(quantizer)
    learned = sorted(subject.adapter.trained(quantizer))
    for turn in ("first", "second"):
        subject.run(quantizer, case.x, training=True, upstream=case.upstream)
        before = variables(quantizer)
        quantizer.freeze()
        step()
        for name, value in variables(quantizer).items():
            same_bits(f"{name}, frozen after a backward pass for the {turn} time", value, before[name])
        listed = [each for group in VariableGroup for each in quantizer.get_trainable_variables(group)]
        require(f"trainable variables, frozen for the {turn} time", not listed, 0, len(listed))
        quantizer.freeze(frozen=False)
        again = sorted(subject.adapter.trained(quantizer))
        require(f"what learns after thawing for the {turn} time", again == learned, learned, again)
    if subject.random or subject.method.training_forward != "deployed":
        return
    expected, got = (subject.run(each, case.x, training=True, upstream=case.upstream) for each in (straight, quantizer))
    for name, gradient in expected.variables.items():
        same_bits(f"gradient of {name} after thawing", got.variables[name], gradient)


@law("PyTorch's modules and Keras's layers know whether the model trains, and most code says nothing.", kind=SMALL)
def training_by_default(subject: Subject, case: Case) -> None:
    """A call that does not say whether the model trains does what the framework's own mode says."""
    if subject.random:
        return
    silent = replace(subject, way=replace(subject.way, explicit=False))
    for training in subject.adapter.default_training:
        expected = subject.values(subject.quantizer(case), case.x, training=training)
        got = silent.values(silent.quantizer(case), case.x, training=training)
        same_bits(f"values of a call that does not say training={training}", got, expected)


@law("Code that builds a model may initialize a quantizer twice; what it has learned must stay.", kind=SMALL)
def second_initialization(subject: Subject, case: Case) -> None:
    """Initialized again, a quantizer keeps its variables and their values; for another shape it refuses."""
    quantizer = subject.quantizer(case)
    own = {name: quantizer.get_quantizer_variable(name) for name in quantizer.variable_names}
    before, expected = variables(quantizer), subject.values(quantizer, case.x)
    given = quantizer.initialize_quantization(case.x.shape, "again", None)
    for name, variable in own.items():
        same = given.get(name) is variable and quantizer.get_quantizer_variable(name) is variable
        require(f"{name} after a second initialization", same, "the same variable", "another one")
        same_bits(f"{name} after a second initialization", variables(quantizer)[name], before[name])
    require("what a second initialization returns", set(given) == set(own), sorted(own), sorted(given))
    same_bits("values after a second initialization", subject.values(quantizer, case.x), expected)
    blocks = case.config.blocks
    axis = case.config.channels_axis if blocks is None else blocks.axes[-1]
    if axis is None:
        return
    wrong = list(case.x.shape)
    wrong[axis] += 1
    try:
        quantizer.initialize_quantization(tuple(wrong), "again", None)
    except TrainableError:
        same_bits("values after a refused initialization", subject.values(quantizer, case.x), expected)
    else:
        raise Violation("a second initialization for another shape", "a TrainableError", "nothing raised")
