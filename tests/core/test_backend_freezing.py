"""Thresholds that freeze one after another: which, when, and on which side of a power of two."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainable_core.backend.freezing import IncrementalFreezing, learning, places_of
from trainable_core.backend.routine import TrainingRoutine
from trainable_core.config import TrainableQuantizerActivationConfig
from trainable_core.errors import InvalidArgumentError


class Fake:
    """A quantizer with a threshold, or a range, that the test moves."""

    learns_grid, variable_names, calibrated, has_schedule = True, ("threshold",), True, False
    structure = SimpleNamespace(widths=(4,))

    def __init__(self, method: str = "POWER_OF_TWO", **numbers: Any) -> None:
        self.quantization_config = TrainableQuantizerActivationConfig(
            activation_quantization_method=method, activation_n_bits=4, activation_quantization_params={}
        )
        self.numbers, self.frozen, self.selected_width = numbers, False, 4

    def at(self, log2: Any) -> Fake:
        self.numbers = {"threshold": np.exp2(np.asarray(log2, np.float64)).astype(np.float32)}
        return self

    def grid_numbers(self, width: int) -> dict[str, np.ndarray]:
        assert width == 4
        return {key: np.asarray(value, np.float32) for key, value in self.numbers.items()}

    def get_trainable_variables(self, group: Any) -> list[Any]:
        return [] if self.frozen else [self.numbers]

    def report(self) -> dict[str, Any]:
        return {}


def run(at: int, every: int, tracks: dict[str, list[Any]], first: int = 1) -> dict[int, str]:
    """Return what freezes after which step, where the logarithm of each threshold goes through a list."""
    freezing, quantizers = IncrementalFreezing(at, every), {name: Fake() for name in tracks}
    return follow(freezing, quantizers, tracks, range(first, first + len(next(iter(tracks.values())))))


def follow(
    freezing: IncrementalFreezing, quantizers: dict[str, Fake], tracks: dict[str, list[Any]], steps: range
) -> dict[int, str]:
    found = {}
    for step in steps:
        for name, places in tracks.items():
            if not quantizers[name].frozen:
                quantizers[name].at(places[step - 1])
        chosen = freezing.after_step(step, quantizers)
        if chosen is not None:
            found[step] = chosen
            quantizers[chosen].frozen = True
    return found


def test_what_moves_least_freezes_first_and_one_at_a_time() -> None:
    steps = np.arange(20)
    tracks = {"slow": list(0.3 + 0.001 * steps), "fast": list(0.1 + 0.03 * steps), "still": [0.5] * 20}
    assert run(8, 3, tracks) == {8: "still", 11: "slow", 14: "fast"}
    assert run(8, 30, tracks) == {8: "still"}
    assert run(1, 1, tracks)[1] in tracks


def test_a_threshold_that_oscillates_freezes_on_the_side_where_it_is_most_of_the_time() -> None:
    # twice above the border at 3, once below it: on average above, so the step below is not the one that freezes
    places = [3.1, 3.1, 2.95] * 10
    for at in range(12, 18):
        (step,) = run(at, 12, {"q": places[:30]})
        assert step == (at if places[at - 1] > 3 else at + 1)  # the next step is above
        assert places[step - 1] > 3
    mirrored = [6 - place for place in places]
    for at in range(12, 18):
        (step,) = run(at, 12, {"q": mirrored})
        assert mirrored[step - 1] < 3


def test_one_that_waits_for_its_side_lets_others_go_first() -> None:
    restless, drifting = [3.1, 3.1, 2.95] * 8, list(1.0 + 0.2 * np.arange(24) / 24)
    tracks = {"restless": restless, "drifting": drifting}
    assert run(12, 5, tracks)[12] == "drifting"  # it moves less, too
    calm = [3.001, 3.001, 2.9995] * 8  # it moves least, and is below the border after step 12
    assert run(12, 5, {"calm": calm, "drifting": drifting}) == {12: "drifting", 17: "calm"}


def test_every_channel_has_to_be_on_its_side() -> None:
    places = [[0.5, 1.1], [0.5, 1.1], [0.5, 0.9]] * 8
    assert list(run(12, 12, {"q": places})) == [13]


def test_grids_without_powers_of_two_have_no_sides() -> None:
    quantizers = {"q": Fake("SYMMETRIC").at(2.9), "r": Fake("UNIFORM", range_min=-1.0, range_max=2.0)}
    freezing = IncrementalFreezing(4, 2)
    found = {}
    for step in range(1, 9):
        if not quantizers["q"].frozen:
            quantizers["q"].at(3.1 if step % 3 else 2.9)
        chosen = freezing.after_step(step, quantizers)
        if chosen:
            found[step], quantizers[chosen].frozen = chosen, True
    assert found == {4: "r", 6: "q"}
    np.testing.assert_array_equal(places_of(quantizers["r"]), [-1.0, 2.0])


def test_numbers_that_are_none_do_no_harm() -> None:
    quantizers = {
        "nan": Fake(threshold=np.nan),
        "inf": Fake(threshold=np.inf),
        "range": Fake("UNIFORM", range_min=np.nan, range_max=1.0),
        "empty": Fake(threshold=np.zeros(0)),
    }
    freezing = IncrementalFreezing(1, 1)
    found = []
    for step in range(1, 6):
        chosen = freezing.after_step(step, quantizers)
        if chosen:
            found.append(chosen)
            quantizers[chosen].frozen = True
    assert sorted(found) == sorted(quantizers)
    json.dumps(freezing.state_dict(), allow_nan=False)


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_state_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    random = np.random.default_rng(cut)
    tracks = {name: list(random.normal(3, 0.1, 24).cumsum() / 10) for name in "abcd"}
    whole = run(6, 4, tracks)
    quantizers = {name: Fake() for name in tracks}
    first = IncrementalFreezing(6, 4)
    found = follow(first, quantizers, tracks, range(1, cut + 1))
    second = IncrementalFreezing(6, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), "test")
    found |= follow(second, quantizers, tracks, range(cut + 1, 25))
    assert found == whole


def test_without_a_state_what_was_due_counts_as_done() -> None:
    freezing = IncrementalFreezing(6, 4)
    freezing.go_on(11)  # 6 and 10 are over
    quantizers = {name: Fake().at(0.5) for name in "abc"}
    assert [freezing.after_step(step, quantizers) is not None for step in range(12, 16)] == [False, False, True, False]


def test_what_learns_nothing_does_not_freeze() -> None:
    quantizer = Fake().at(1.0)
    assert learning(quantizer)
    for name, value in (("calibrated", False), ("variable_names", ()), ("frozen", True)):
        other = Fake().at(1.0)
        setattr(other, name, value)
        assert not learning(other)
        assert IncrementalFreezing(1, 1).after_step(3, {"q": other}) is None


class Routine(TrainingRoutine):
    """A routine of fakes."""

    def __init__(self, quantizers: dict[str, Fake], freeze_at: Any = 4, freeze_every: Any = 2) -> None:
        super().__init__(freeze_at, freeze_every, None, None, 100)
        self.fakes = quantizers

    def quantizers(self) -> Any:
        return self.fakes

    def freeze(self, names: Any = None) -> None:
        for name in self.fakes if names is None else names:
            self.fakes[name].frozen = True

    def freeze_statistics(self) -> None:
        raise NotImplementedError

    def advance(self) -> None:
        pass

    def reestimate(self, batches: Any) -> None:
        raise NotImplementedError


def test_a_routine_freezes_goes_on_in_a_second_run_and_begins_anew() -> None:
    routine = Routine({name: Fake().at(place) for name, place in zip("abc", (0.5, 1.5, 2.5), strict=True)})
    routine.start()
    for _ in range(5):
        routine.step_end()
    assert [fake.frozen for fake in routine.fakes.values()] == [True, False, False]
    state = json.loads(json.dumps(routine.state_dict()))
    other = Routine({name: Fake().at(place) for name, place in zip("abc", (0.5, 1.5, 2.5), strict=True)})
    other.load_state_dict(state)
    assert not any(fake.frozen for fake in other.fakes.values())  # optimizers may not have been made yet
    for each in (routine, other):
        each.start(5)
        assert [fake.frozen for fake in each.fakes.values()] == [True, False, False]
        each.step_end(6)
        assert sum(fake.frozen for fake in each.fakes.values()) == 2
        each.step_end(8)
        assert all(fake.frozen for fake in each.fakes.values())
    for fake in routine.fakes.values():
        fake.frozen = False
    routine.start(0)
    assert not any(fake.frozen for fake in routine.fakes.values())


@pytest.mark.parametrize(
    ("freeze_at", "freeze_every", "fact"),
    [(None, 5, "freeze_at"), (5, 0, "freeze_every"), (5, True, "freeze_every"), (5, 2.0, "freeze_every")],
)
def test_wrong_numbers_are_refused(freeze_at: Any, freeze_every: Any, fact: str) -> None:
    with pytest.raises(InvalidArgumentError, match=fact):
        Routine({}, freeze_at, freeze_every)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"step": -1, "freezing": {}},
        {"step": 1, "freezing": []},
        {"step": 1, "freezing": 7},
        {"step": 1, "freezing": {"frozen": ["a"], "before": 0}},
        {"step": 1, "freezing": {"frozen": ["stranger"], "before": 0, "averages": {}}},
        {"step": 1, "freezing": {"frozen": [], "before": "x", "averages": {}}},
        {"step": 1, "freezing": {"frozen": [], "before": 0, "averages": {"a": {"place": [1.0]}}}},
    ],
)
def test_what_is_no_state_is_refused_and_nothing_changes(state: Any) -> None:
    routine = Routine({"a": Fake().at(1.0)})
    before = routine.state_dict()
    if state == {"step": 1, "freezing": []}:
        routine.load_state_dict(state)  # of a callback that froze all at once
        return
    with pytest.raises(InvalidArgumentError):
        routine.load_state_dict(state)
    assert routine.state_dict() == before
