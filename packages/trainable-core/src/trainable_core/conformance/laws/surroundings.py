"""Laws on what is around a call: graphs, memory, random numbers, the gradient mode, threads, pickles, casts."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.adapter import nothing_random, settings
from trainable_core.conformance.case import Case, Subject, Violation, free_axes, move, rows, tensor, variables
from trainable_core.conformance.law import close, law, repeatable, require, same_bits, same_mode, same_sums
from trainable_core.conformance.oracles import by_oracle, decided, step_at_ties
from trainable_core.conformance.strategies import Kind
from trainable_core.qparams import Float32
from trainable_core.reference.oracle import EPSILON

MODERATE = Kind(moderate=True, finite=True)
SMALL = Kind(moderate=True, finite=True, tensor=False)
STATIC = Kind(moderate=True, finite=True, tensor=False, least=1)


@law("Nobody trains eagerly: `fit` makes a graph, and compilers rewrite it.", kind=STATIC, about=repeatable, most=3)
def graph_execution(subject: Subject, case: Case) -> None:
    """In a graph, with unknown sizes or compiled, values and gradients are those of the eager call.

    A compiler may move a value by its last bits, and a code by one where rounding errors decide a tie.
    """
    adapter, case = subject.adapter, replace(case, x=subject.normal(case.x))
    modes = {**adapter.modes, **(adapter.thorough_modes if subject.thorough else {})}
    for mode, exact in modes.items():
        if subject.weights and mode in adapter.of_activations:
            continue
        for training in (False, True) if subject.thorough else adapter.traced:
            eager, quantizer = subject.quantizer(case), subject.quantizer(case)
            upstream = case.upstream if exact else decided(subject, eager, case, ends=False)
            expected = subject.run(eager, case.x, training=training, upstream=upstream)
            got = adapter.execute(quantizer, case.x, mode, training=training, upstream=upstream)
            where = f"in {mode}, training={training}"
            left = adapter.left_by_graphs(quantizer)
            require(f"attributes that hold a tensor of a graph that is finished, {where}", not left, [], left)
            if exact:
                same_bits(f"values {where}", got.values, expected.values)
                if not training:  # `fit` and `evaluate` make graphs of their own of one layer
                    again = adapter.execute(quantizer, case.x, mode, training=False, upstream=None)
                    same_bits(f"values of a second graph {where}", again.values, expected.values)
            elif not training or subject.method.training_forward == "deployed":
                x = rows(case.config, case.x)
                moved = np.zeros(x.shape)
                for at in subject.grids(quantizer, case).values():
                    moved = moved + step_at_ties(x, at)
                if subject.method.oracle is not None:  # it knows of ties in what a method makes of the input
                    state = subject.state(quantizer, case)
                    moved = np.maximum(moved, subject.method.oracle.values(x, state, training).allowed)
                moved = tensor(case.config, moved, case.x.shape) + np.abs(expected.values) * 2 * EPSILON
                close(f"values {where}", got.values, expected.values, moved)
            else:
                continue  # a soft value has no code that a bound could be derived for
            if got.x is None or expected.x is None:
                raise Violation(f"gradient of the input {where}", "an array", got.x)
            allowed = 0.0 if exact else _of_a_compiler(subject, quantizer, case, upstream, expected.x)
            close(f"gradient of the input {where}", got.x, expected.x, allowed)
            same_sums(f"gradient {where}", got.variables, expected.variables, expected, upstream)


def _of_a_compiler(
    subject: Subject, quantizer: Any, case: Case, upstream: Float32, expected: NDArray[Any]
) -> NDArray[Any]:
    """Return how far apart gradients may be, of which a compiler rounds one otherwise than the other is rounded.

    Each is within the oracle's distance of the exact one. Where there is no oracle, a gradient may be what is left of
    a difference, or of a sum over the tensor, of numbers as large as the largest gradient: a sum of N terms, each with
    a few roundings, is within ``(N + 16) * EPSILON`` of the exact one, relative to the terms.
    """
    last_bits = np.asarray(np.abs(expected) * EPSILON)
    if subject.method.oracle is not None and subject.method.training_forward == "deployed":
        return np.asarray(np.maximum(last_bits, 2 * by_oracle(subject, quantizer, case, upstream).x_allowed))
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return last_bits + 2 * (expected.size + 16) * EPSILON * largest


@law("A quantizer that draws from the global random numbers changes every dropout and shuffle after it.", kind=SMALL)
def global_random_state(subject: Subject, case: Case) -> None:
    """No call draws global random numbers; a declared random method draws the framework's, in training alone."""
    quantizer = subject.quantizer(case)
    allowed = set(subject.adapter.random_states()) if subject.random else set()
    with nothing_random(subject.adapter) as changed:
        subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    drawn = [name for name in changed if name not in allowed]
    require("random states that a training call changes", not drawn, [], drawn)
    with nothing_random(subject.adapter) as changed:
        subject.values(quantizer, case.x)
        subject.deployed(quantizer, case.x)
    require("random states that evaluating and deploying change", not changed, [], changed)


@law(
    "A setting of the process that a quantizer changes counts for every other layer and for the user's own code.",
    kind=SMALL,
    most=3,
)
def process_settings(subject: Subject, case: Case) -> None:
    """Building, calling and deploying a quantizer leave the process's settings and its random numbers as they were."""
    before = settings(subject.adapter)
    with nothing_random(subject.adapter) as changed:
        quantizer = subject.quantizer(case)
    drawn = [] if subject.random else changed  # a generator of its own takes its seed from Python's
    require("random states that building a quantizer changes", not drawn, [], drawn)
    subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    subject.values(quantizer, case.x)
    subject.deployed(quantizer, case.x)
    moved = {name: value for name, value in settings(subject.adapter).items() if value != before[name]}
    require("settings of the process", not moved, {name: before[name] for name in moved}, moved)


@law("A sweep over settings builds hundreds of models; those that are done must go.", kind=SMALL, most=1)
def freed(subject: Subject, case: Case) -> None:
    """Nobody holds a quantizer that was trained and deployed, after its model is gone."""
    quantizer = subject.quantizer(case)
    subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    subject.deployed(quantizer, case.x)
    held = weakref.ref(quantizer)
    del quantizer
    if held() is not None:
        gc.collect()
    require("a quantizer that was deleted", held() is None, "gone", "in memory")


@law("What a call keeps is kept for every layer of a model and every batch: memory runs out.", kind=SMALL)
def kept_memory(subject: Subject, case: Case) -> None:
    """After the backward pass, nobody holds the input or the output."""
    quantizer = subject.quantizer(case)
    for training in (False, True):
        kept = subject.adapter.observe(quantizer, case.x, case.upstream, training=training).kept
        require(f"tensors in memory after a call, training={training}", not kept, [], list(kept))


@law("An in-place ReLU on an output must not change the input, nor what an earlier call returned.", kind=SMALL)
def fresh_output(subject: Subject, case: Case) -> None:
    """The output shares memory with neither the input nor an earlier output."""
    quantizer = subject.quantizer(case)
    for training in (False, True):
        shared = subject.adapter.observe(quantizer, case.x, case.upstream, training=training).shared
        require(f"what the output shares memory with, training={training}", not shared, [], list(shared))


@law("The same gradient goes to other layers too, as where a residual connection splits.", kind=SMALL)
def upstream_unchanged(subject: Subject, case: Case) -> None:
    """A backward pass leaves the upstream gradient as it is."""
    quantizer = subject.quantizer(case)
    for training in (False, True):
        changed = subject.adapter.observe(quantizer, case.x, case.upstream, training=training).upstream_changed
        require(
            f"the upstream gradient after a backward pass, training={training}", not changed, "unchanged", "changed"
        )


@law("An output that is cut from the graph trains nothing; one that is in it under `no_grad` keeps memory.", kind=SMALL)
def gradient_mode(subject: Subject, case: Case) -> None:
    """The output is in the graph exactly while gradients are recorded, and a call leaves that mode as it was."""
    quantizer = subject.quantizer(case)
    for training in (False, True):
        observed = subject.adapter.observe(quantizer, case.x, case.upstream, training=training)
        require(
            f"the gradient mode after a call, training={training}", not observed.mode_changed, "as before", "changed"
        )
        what = f"an input without a gradient, after a call, training={training}"
        require(what, not observed.asked, "as before", "it needs a gradient")
        if observed.recorded is not None:
            what = f"the output needs a gradient: recorded, and while nothing is, training={training}"
            require(what, observed.recorded == (True, False), (True, False), observed.recorded)


@law("Data loaders, process pools and `torch.save` of a model pickle it.", kind=SMALL)
def pickling(subject: Subject, case: Case) -> None:
    """A pickled quantizer comes back equal, in the middle of its schedule too, and in the mode that it was in."""
    if "<locals>" in subject.cls.__qualname__:
        return  # pickle finds classes by their names in a module
    quantizer = subject.quantizer(case)
    for training in subject.adapter.default_training:
        if training and subject.random:
            continue
        subject.values(quantizer, case.x, training=training)
        again = pickle.loads(pickle.dumps(quantizer))  # noqa: S301 - as below
        same_mode(subject, case, f"what was pickled after a call with training={training}", again, quantizer)
    again = pickle.loads(pickle.dumps(quantizer))  # noqa: S301 - our own, of a moment ago
    own = variables(quantizer)
    for name, value in variables(again).items():
        same_bits(f"{name} of what was pickled", value, own[name])
    same_bits("values of what was pickled", subject.values(again, case.x), subject.values(quantizer, case.x))
    if repeatable(subject):
        expected, got = (
            subject.run(each, case.x, training=True, upstream=case.upstream) for each in (quantizer, again)
        )
        same_bits("values in training of what was pickled", got.values, expected.values)
        what = sorted(expected.variables), sorted(got.variables)
        require("what learns of what was pickled", what[0] == what[1], *what)


THREADS, CALLS = 3, 3
OFTEN = 1e-6
"""Seconds after which another thread may go on, so that calls are cut in two where they can be."""


@law("Servers evaluate one model in several threads.", kind=SMALL, most=10)
def threads(subject: Subject, case: Case) -> None:
    """Threads that evaluate one quantizer, and train one each, get what they get alone."""
    shared = subject.quantizer(case)
    axes = [] if subject.weights else free_axes(case)
    inputs = [
        (case.repeated(axes[0], 1 + place).x if axes else case.x) * np.float32(1 + place) for place in range(THREADS)
    ]
    expected = [subject.values(shared, x) for x in inputs]
    trained = None if subject.random else subject.run(subject.quantizer(case), case.x, training=True).values
    found: list[list[tuple[str, Any, Any]]] = [[] for _ in inputs]
    problems: list[BaseException] = []
    begin = threading.Barrier(THREADS)
    own = [subject.quantizer(case) for _ in inputs]

    def work(place: int) -> None:
        try:
            begin.wait()
            for _ in range(CALLS):
                got = subject.values(shared, inputs[place])
                found[place].append(("values in a thread", got, expected[place]))
            if trained is not None:
                got = subject.run(own[place], case.x, training=True).values
                found[place].append(("values in training in a thread", got, trained))
        except BaseException as problem:  # noqa: BLE001 - told by the thread that checks
            problems.append(problem)

    workers = [threading.Thread(target=work, args=(place,)) for place in range(THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(OFTEN)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    if problems:
        raise problems[0]
    for each in found:
        for what, got, wanted in each:
            same_bits(what, got, wanted)


@law("`model.half()` and `model.to(dtype)` reach every variable; thresholds need all their bits.", kind=SMALL)
def cast_models(subject: Subject, case: Case) -> None:
    """In a model that is cast to another dtype, variables keep their values in float32, and values stay."""
    for dtype in subject.adapter.casts:
        quantizer = subject.quantizer(case)
        before, expected = variables(quantizer), subject.values(quantizer, case.x)
        cast = subject.adapter.cast(quantizer, dtype)
        for name, value in before.items():
            found = np.asarray(cast.to_numpy(cast.get_quantizer_variable(name)))
            require(f"dtype of {name} in a {dtype} model", found.dtype == np.float32, "float32", found.dtype)
            same_bits(f"{name} in a {dtype} model", found, value)
        same_bits(f"values in a {dtype} model", subject.values(cast, case.x), expected)
        same_bits(f"deployed values in a {dtype} model", subject.deployed(cast, case.x), expected)


@law(
    "Models call layers, and a layer keeps, fuses and recomputes what it can of its weights.",
    kind=Kind(moderate=True, finite=True, tensor=False, rank=2, least=2),
    about=lambda subject: subject.weights and repeatable(subject),
    most=6,
)
def inside_a_layer(subject: Subject, case: Case) -> None:
    """Inside a layer, a quantizer gives what it gives by itself, forward and backward, also after a step."""
    adapter, case = subject.adapter, replace(case, x=subject.normal(case.x))
    if not case.x.size:
        return
    alone, inside = subject.quantizer(case), subject.fresh(case)
    layer = adapter.in_a_layer(inside, case.x)
    if layer is None:
        return
    move(inside, case.factors)
    for _ in range(case.steps):
        inside.advance()
    x = case.x
    for when in ("", ", after a step"):
        for training, upstream in ((False, None), (True, case.upstream), (False, case.upstream), (False, None)):
            if training and layer.counts_steps:
                alone.advance()
            expected = subject.run(alone, x, training=training, upstream=upstream)
            got = layer(training=training, upstream=upstream)
            where = f"in a layer, training={training}{when}"
            same = np.array_equal(got.values, expected.values)  # a sum with products of zero: zeros have no sign
            require(f"values {where}", same, expected.values, got.values)
            if upstream is None:
                continue
            if got.x is None or expected.x is None:
                raise Violation(f"gradient of the weights {where}", "an array", got.x)
            close(f"gradient of the weights {where}", got.x, expected.x, np.abs(expected.x) * EPSILON)
            same_sums(f"gradient {where}", got.variables, expected.variables, expected, upstream)
        gradients = {name: np.sign(value) * np.float32(2.0**-6) for name, value in variables(alone).items()}
        for quantizer in (alone, inside):
            adapter.descend(quantizer, gradients)
        x = np.asarray(x * np.float32(0.75) + np.float32(2.0**-7), np.float32)
        layer.assign(x)


@law(
    "Behind an activation's quantizer stands a layer, which may compute both at once.",
    kind=Kind(moderate=True, finite=True, least=2),
    about=lambda subject: not subject.weights and repeatable(subject),
    most=10,
)
def before_a_layer(subject: Subject, case: Case) -> None:
    """Before a layer, a quantizer gives what it gives by itself, for inputs in any layout, with a gradient or none."""
    adapter, case = subject.adapter, replace(case, x=subject.normal(case.x))
    if not case.x.size:
        return
    for training, upstream, needed in ((True, case.upstream, True), (True, case.upstream, False), (False, None, False)):
        way = replace(subject.way, input_gradient=needed)
        got = adapter.before_a_layer(subject.quantizer(case), case.x, training=training, upstream=upstream, way=way)
        if got is None:
            return
        expected = subject.run(subject.quantizer(case), case.x, training=training, upstream=upstream)
        where = f"before a layer, training={training}, input_gradient={needed}"
        same = np.array_equal(got.values, expected.values)  # a sum with products of zero: zeros have no sign
        require(f"values {where}", same, expected.values, got.values)
        if got.x is not None and expected.x is not None:
            close(f"gradient of the input {where}", got.x, expected.x, np.abs(expected.x) * EPSILON)
        if upstream is not None:
            same_sums(f"gradient {where}", got.variables, expected.variables, expected, upstream)
