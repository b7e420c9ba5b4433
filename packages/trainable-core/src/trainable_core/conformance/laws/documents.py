"""Laws on configs, saved states and copies: each restores an equal quantizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject, Violation, move, moves_in_a_call, uncalibrated, variables
from trainable_core.conformance.law import law, require, same_bits, same_mode
from trainable_core.conformance.strategies import Kind
from trainable_core.errors import TrainableError
from trainable_core.reference.oracle import EPSILON
from trainable_core.registry.methods import options_of
from trainable_core.registry.process import get_backend, get_trainable_quantizer_class
from trainable_core.schedule import SCHEDULES, schedule_from_dict


def _bare(case: Case) -> Case:
    """Return the case without quantization params, as a model is before its state is loaded."""
    return Case(uncalibrated(case.config), case.x, case.upstream, (1.0,), 0, case.arguments)


Term = tuple[float, Mapping[str, NDArray[Any]]] | None


def _terms(subject: Subject, case: Case, quantizer: Any) -> dict[str, Term]:
    """Return the quantizer's terms for the loss, which may be random where its values are."""
    if subject.random:
        return {}
    adapter = subject.adapter
    return {
        "term for the loss": adapter.regularization(quantizer),
        "term for the loss that depends on the tensor": adapter.regularization_of(quantizer, case.x),
    }


def _same(subject: Subject, what: str, case: Case, got: Any, expected: Any) -> None:
    """Require that two quantizers hold the same numbers, and give the same values and the same terms for the loss."""
    own = variables(expected)
    found = variables(got)
    require(f"variables of {what}", list(found) == list(own), list(own), list(found))
    for name, value in own.items():
        same_bits(f"{name} of {what}", found[name], value)
    widths = got.selected_width, expected.selected_width
    require(f"selected width of {what}", widths[0] == widths[1], widths[1], widths[0])
    same_bits(f"values of {what}", subject.values(got, case.x), subject.values(expected, case.x))
    terms = _terms(subject, case, got)
    for name, term in _terms(subject, case, expected).items():
        _same_term(f"{name}, of {what}", terms[name], term)


def _same_term(what: str, got: Term, expected: Term) -> None:
    """Require that two terms have the same value and the same gradients, or that there is none."""
    if got is None or expected is None:
        require(what, got is expected, expected, got)
        return
    same_bits(what, np.asarray(got[0], np.float32), np.asarray(expected[0], np.float32))
    require(f"{what}: what has a gradient", sorted(got[1]) == sorted(expected[1]), sorted(expected[1]), sorted(got[1]))
    for name, gradient in expected[1].items():
        same_bits(f"gradient by {name or 'the tensor'} of the {what}", got[1][name], gradient)


def _midway(subject: Subject, case: Case) -> Any:
    """Return the case's quantizer in the middle of a training: called, asked for its terms, and changed since."""
    quantizer = subject.fresh(case)
    subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    _terms(subject, case, quantizer)
    move(quantizer, (1.5,))
    move(quantizer, case.factors)
    for _ in range(case.steps):
        quantizer.advance()
    return quantizer


def _select_another(quantizer: Any) -> bool:
    """Select a width that is not selected now, and return whether there is one."""
    others = [width for width in quantizer.widths if width != quantizer.selected_width]
    if others:
        quantizer.select_width(others[-1])
    return bool(others)


def _others(default: Any) -> list[Any]:
    """Return values that an option may have in the place of its default, as far as the default's type tells."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [value for value in (default * 2, default + 1, default // 2, 0) if value != default]
    if isinstance(default, float):
        return [value for value in (default * 2, default + 1, default / 2, default / 7, 0.0) if value != default]
    if isinstance(default, str):
        return [f"{default} or other"]
    return [] if default is not None else [2, 0.5, 0, True]


def _writes_schedules(subject: Subject, case: Case) -> None:
    """Require that `get_arguments` has a schedule of each kind that the class takes."""
    for name, value in case.arguments.items():
        if not (isinstance(value, dict) and {"t_start", "t_end"} <= value.keys()):
            continue
        for kind in SCHEDULES:
            document = {**value, "kind": kind}
            try:
                wanted = schedule_from_dict(document).to_dict()
                quantizer = subject.cls(case.config, **{**case.arguments, name: document})
            except Exception:  # noqa: BLE001, S112 - a kind that has other fields, or that the class refuses
                continue
            written = quantizer.get_arguments().get(name)
            what = f"get_arguments() of a quantizer with {name}={document}"
            require(what, isinstance(written, dict), wanted, written)
            got = schedule_from_dict(written).to_dict()
            require(what, got == wanted, wanted, got)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _writes_options(subject: Subject, case: Case) -> None:
    """Require that `get_arguments` has every option that another value than its default was given for.

    What the class refuses is no value of the option; documents are tried where `conformance_arguments` have some.
    """
    for option in options_of(subject.cls):
        for value in _others(option.default):
            try:
                quantizer = subject.cls(case.config, **{**case.arguments, option.name: value})
            except Exception:  # noqa: BLE001, S112 - the class's own error
                continue
            arguments, what = quantizer.get_arguments(), f"get_arguments() of a quantizer with {option.name}={value}"
            require(what, option.name in arguments, f"{option.name}: {value}", arguments)
            written = arguments[option.name]  # it may be in another form, as a schedule is
            lost = type(written) is type(option.default) and written == option.default
            if _is_number(value) and _is_number(written):  # one that is kept in float32 has its bits
                lost = abs(written - value) > EPSILON * abs(value)
            require(what, not lost, f"{option.name}: {value}", arguments)


@law(
    "What the config leaves out is lost when a model is saved: candidates, trained numbers, arguments, the freeze.",
    kind=Kind(least=1),
)
def config_round_trip(subject: Subject, case: Case) -> None:
    """``get_config`` is plain JSON, and ``from_config`` rebuilds an equal quantizer from it."""
    quantizer = subject.quantizer(case)
    quantizer.freeze()
    document = quantizer.get_config()
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as error:
        raise Violation("get_config() is JSON", "a JSON document", f"{error!r}") from error
    again = subject.cls.from_config(json.loads(text))
    require("config", again.quantization_config == case.config, case.config, again.quantization_config)
    require("frozen", bool(again.freeze_quant_params), "true", again.freeze_quant_params)
    require(
        "get_config() of what it rebuilt", again.get_config() == json.loads(text), text, json.dumps(again.get_config())
    )
    if case.arguments:
        given = {name: again.get_arguments().get(name) for name in case.arguments}
        require("arguments of the constructor", given == case.arguments, case.arguments, given)
    _same(subject, "what from_config rebuilt", case, again, quantizer)
    if _select_another(quantizer):
        again = subject.cls.from_config(json.loads(json.dumps(quantizer.get_config())))
        _same(subject, "what from_config rebuilt, after another width was selected", case, again, quantizer)
    _writes_options(subject, case)
    _writes_schedules(subject, case)


@law("A checkpoint that is restored into a new model must give the model that was saved.")
def state_round_trip(subject: Subject, case: Case) -> None:
    """The framework's own saved state, loaded into an uncalibrated quantizer, gives an equal one, midway too."""
    quantizer = _midway(subject, case)
    again = subject.fresh(_bare(case))
    subject.adapter.restore(again, subject.adapter.save(quantizer))
    _same(subject, "what the state restored", case, again, quantizer)
    if _select_another(quantizer):
        again = subject.fresh(_bare(case))
        subject.adapter.restore(again, subject.adapter.save(quantizer))
        _same(subject, "what the state restored, after another width was selected", case, again, quantizer)


@law("A checkpoint of another model must not be half loaded; files are written in any order.", kind=Kind(tensor=False))
def incomplete_states(subject: Subject, case: Case) -> None:
    """A state is loaded in any order of its entries; one that lacks an entry, or has a foreign one, is refused."""
    quantizer = subject.quantizer(case)
    state = dict(subject.adapter.entries(quantizer))
    require("entries of the state", state or not quantizer.variable_names, quantizer.variable_names, list(state))
    again = subject.fresh(_bare(case))
    subject.adapter.restore_entries(again, dict(reversed(state.items())))
    _same(subject, "a state in another order", case, again, quantizer)
    broken = {f"a state without {name}": {k: v for k, v in state.items() if k != name} for name in state}
    broken["a state with a foreign entry"] = {**state, "foreign": np.zeros((), np.float32)}
    for what, entries in broken.items():
        other = subject.fresh(_bare(case))
        try:
            subject.adapter.restore_entries(other, entries)
        except Exception:  # noqa: BLE001, S112 - the framework's own error
            continue
        raise Violation(what, "an error", "nothing raised")


def registered(subject: Subject) -> bool:
    """Return whether a recipe can choose the class."""
    key = subject.key
    try:
        return get_trainable_quantizer_class(key.target, key.quantizer_id, key.method, key.backend) is subject.cls
    except TrainableError:
        return False


@law(
    "Users save models, not quantizers; a class may save itself correctly and still be lost inside a model.",
    about=registered,
    once=True,
)
def model_round_trip(subject: Subject, case: Case) -> None:  # noqa: ARG001 - a law about the class
    """A model quantized by a recipe gives the same values after it was saved and loaded, finalized or not."""
    verbs = import_module(get_backend(subject.key.backend).verbs)
    fields = {"method": subject.key.method.name, "n_bits": subject.width, "training_method": subject.key.quantizer_id}
    recipe: dict[str, Any] = (
        {"weights": {**fields, "per_channel": True}} if subject.weights else {"activations": fields}
    )
    if subject.method.computes_grid:
        recipe["target"] = "native"
    model, batch, values = subject.adapter.model()
    qmodel = verbs.wrap(model, recipe)
    verbs.calibrate(qmodel, [batch])
    with TemporaryDirectory() as folder:
        for what, saved in (("the wrapped model", qmodel), ("the finalized model", verbs.finalize(qmodel))):
            same_bits(f"values of {what} and of the calibrated model", values(saved), values(qmodel))
            path = Path(folder) / what
            verbs.save(saved, path)
            same_bits(
                f"values of {what} after loading", values(verbs.load(path, subject.adapter.model()[0])), values(saved)
            )


@law("Logs and notebooks print a model at any time, also before it is calibrated.", kind=Kind(tensor=False), most=2)
def representation(subject: Subject, case: Case) -> None:
    """``repr`` gives a text before a quantizer is initialized, before it is calibrated, and while it is frozen."""
    bare = _bare(case)
    frozen = subject.quantizer(case)
    frozen.freeze()
    stages = {
        "that is not initialized": subject.cls(bare.config, **bare.arguments),
        "that is not calibrated": subject.fresh(bare),
        "that is frozen": frozen,
    }
    for what, quantizer in stages.items():
        text = repr(quantizer)
        require(f"repr() of a quantizer {what}", text, "a text", text)


@law("Averaged weights (EMA) and teacher models are copies, which must not share variables with the original.")
def deepcopy(subject: Subject, case: Case) -> None:
    """A copy is equal and independent, after a training step too, and in the mode that the original is in."""
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x)
    same_mode(subject, case, "a copy made after an evaluation", subject.adapter.copy(quantizer), quantizer)
    subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    copied = subject.adapter.copy(quantizer)
    if not subject.random:
        same_mode(subject, case, "a copy made after a training step", copied, quantizer)
    _same(subject, "a copy", case, copied, quantizer)
    if len(quantizer.widths) > 1:
        other = subject.quantizer(case)
        _select_another(other)
        copied_other = subject.adapter.copy(other)
        _same(subject, "a copy made after another width was selected", case, copied_other, other)
    values, before, entries = subject.values(quantizer, case.x), variables(quantizer), subject.adapter.entries(copied)
    move(copied, (3.0,))
    for name, value in variables(quantizer).items():
        same_bits(f"{name} after the copy changed", value, before[name])
    same_bits("values after the copy changed", subject.values(quantizer, case.x), values)
    moved = subject.quantizer(case)
    subject.run(moved, case.x, training=True, upstream=case.upstream)
    if moves_in_a_call(subject, case, case.x):
        subject.adapter.restore_entries(moved, entries)
    move(moved, (3.0,))
    same_bits("values of the changed copy", subject.values(copied, case.x), subject.values(moved, case.x))
