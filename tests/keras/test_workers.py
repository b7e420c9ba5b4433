"""Two worker processes, one model: they learn the same, and what one process learns from the whole batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.keras.framework import only_keras
from tests.keras.workers import run_workers

WORKERS = 2
pytestmark = [
    only_keras(2, "Keras 3 itself does not fit on several workers; see test_lifecycle.py"),
    pytest.mark.xdist_group("workers"),  # one run for all tests of it
]

# What a gradient sums at most: the elements of a batch at the input of the first layer. Two workers sum halves of them
# first, another order of as many float32 terms.
ORDER = 16 * 6 * 6 * 2.0**-24
# A variable is rounded when the step is added to it: in either process, and in the start that the step is measured
# from, half a unit in the last place each, times at most sqrt(2).
ROUNDED = 4 * 2.0**-24


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return what the workers and a lone process started and ended with."""
    folder: Path = tmp_path_factory.mktemp("workers")
    results = {}
    for kind, count in (("workers", WORKERS), ("alone", 0)):
        for status, messages in run_workers(["-m", "tests.keras.worker"], folder, count):
            assert status == 0, messages
        results[kind] = [dict(np.load(folder / f"{count}-{index}.npz")) for index in range(max(count, 1))]
    return results


def test_every_worker_has_the_same_weights_and_thresholds(found) -> None:
    one, other = found["workers"]
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []
    moved = [f"end {i}" for i in range(len(one["names"])) if not np.array_equal(one[f"end {i}"], one[f"later {i}"])]
    assert len(moved) >= len(one["names"]) - 2  # a range that nothing reaches stays


def test_workers_deploy_what_they_trained(found) -> None:
    assert all(each["same"] for each in found["workers"])


def test_workers_learn_what_one_process_learns_from_the_same_batch(found) -> None:
    (alone,), (worker, _) = found["alone"], found["workers"]
    for index, name in enumerate(alone["names"]):
        start, end, theirs = (
            each.astype(np.float64) for each in (alone[f"start {index}"], alone[f"end {index}"], worker[f"end {index}"])
        )
        assert np.array_equal(worker[f"start {index}"], alone[f"start {index}"]), name
        step = end - start
        allowed = ORDER * np.abs(step).max() + ROUNDED * np.abs(start)
        assert (np.abs(theirs - start - step) <= allowed).all(), name
    assert any("activation" in name for name in alone["names"])
