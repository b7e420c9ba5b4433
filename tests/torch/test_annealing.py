"""Annealing on tensors: the very numbers of core's schedule."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainable_core.schedule import LinearAnnealingScheduler
from trainable_torch.annealing import PytorchLinearAnnealingScheduler

STEPS = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6), st.integers(2**53, 10**30))
VALUES = st.one_of(st.floats(-1e300, 1e300), st.integers(-(10**30), 10**30), st.sampled_from([1.0, 0.02, 0.0, -0.0]))


@st.composite
def schedules(draw: Any) -> tuple[PytorchLinearAnnealingScheduler, LinearAnnealingScheduler]:
    start, end = sorted([draw(STEPS), draw(STEPS)])
    end = end if float(start) < float(end) else 2 * end + 1
    arguments = (start, end, draw(VALUES), draw(VALUES))
    return PytorchLinearAnnealingScheduler(*arguments), LinearAnnealingScheduler(*arguments)


def steps_around(schedule: LinearAnnealingScheduler, fractions: list[float]) -> np.ndarray:
    start, end = float(schedule.t_start), float(schedule.t_end)
    inside = start + (end - start) * np.array(fractions)
    return np.concatenate([[-np.inf, -1.0, 0.0, start, np.nextafter(start, np.inf)], inside, [end, 2 * end, np.inf]])


@given(schedules(), st.lists(st.floats(0, 1), max_size=8))
def test_tensors_get_the_numbers_of_core_bit_for_bit(schedules: Any, fractions: list[float]) -> None:
    on_tensors, core = schedules
    steps = steps_around(core, fractions)
    expected = core(steps)
    values = on_tensors(torch.from_numpy(steps))
    assert values.dtype is torch.float64
    assert values.numpy().tobytes() == expected.tobytes()
    assert [float(on_tensors(torch.tensor(step, dtype=torch.float64))) for step in steps.tolist()] == expected.tolist()


@given(schedules(), st.lists(st.floats(0, 1), max_size=4))
def test_plain_numbers_get_plain_numbers(schedules: Any, fractions: list[float]) -> None:
    on_tensors, core = schedules
    for step in steps_around(core, fractions).tolist():
        value = on_tensors(step)
        assert type(value) is float
        assert value == core(step)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16], ids=str)
def test_counters_of_any_dtype(dtype: torch.dtype) -> None:
    schedule = PytorchLinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    values = schedule(torch.tensor([0, 10, 11, 15, 20, 200], dtype=dtype))
    assert values.dtype is torch.float64
    assert values.tolist() == [1.0, 1.0, 0.9, 0.5, 0.0, 0.0]


def test_it_is_core_s_schedule() -> None:
    schedule = PytorchLinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    assert isinstance(schedule, LinearAnnealingScheduler)
    assert PytorchLinearAnnealingScheduler.from_dict(schedule.to_dict()) == schedule
    assert copy.deepcopy(schedule) == schedule
    assert [schedule.finished(step) for step in (19, 20)] == [False, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # by torch's compiler
def test_one_graph_serves_every_step() -> None:
    schedule = PytorchLinearAnnealingScheduler(t_start=0, t_end=1000, initial_val=1.0, target_val=0.02)
    torch.compiler.reset()  # what other tests of this process compiled would count as well
    compiled = torch.compile(schedule, fullgraph=True, backend="eager")
    torch._dynamo.config.error_on_recompile = True  # noqa: SLF001 - there is no public name for it
    try:
        values = [float(compiled(torch.tensor(step))) for step in (0, 1, 500, 1000, 5000)]
    finally:
        torch._dynamo.config.error_on_recompile = False  # noqa: SLF001 - as above
    assert values == [schedule(step) for step in (0, 1, 500, 1000, 5000)]
