"""The choice of widths against all choices."""

import itertools
import math

import numpy as np
import pytest

from trainable_core.diagnosis.solver import choose
from trainable_core.errors import InvalidArgumentError, MissingLibraryError

pytest.importorskip("scipy")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("magnitude", [1e-7, 1.0, 1e4])
def test_it_is_the_best_of_all_choices(seed, magnitude):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, size=6)
    losses = [magnitude * random.exponential(10.0 ** random.integers(-3, 3), count) for count in counts]
    sizes = [random.integers(1, 50, count).astype(float) for count in counts]
    limit = float(sum(map(min, sizes)) + random.integers(0, 60))
    best = min(
        sum(loss[i] for loss, i in zip(losses, picked, strict=True))
        for picked in itertools.product(*map(range, counts))
        if sum(size[i] for size, i in zip(sizes, picked, strict=True)) <= limit
    )
    picked = choose(losses, sizes, limit)
    assert sum(size[i] for size, i in zip(sizes, picked, strict=True)) <= limit
    found = sum(loss[i] for loss, i in zip(losses, picked, strict=True))
    # the solver's gap is 1e-6 where the largest loss is 1e6
    assert found == pytest.approx(best, abs=1e-12 * max(map(max, losses)) * 10)


def test_an_infinite_loss_is_taken_only_where_there_is_no_other():
    assert choose([[math.inf, 1.0], [math.inf]], [[0.0, 1.0], [0.0]], 1.0) == [1, 0]
    assert choose([[math.inf, 1.0]], [[0.0, 2.0]], 1.0) == [0]


def test_what_fits_exactly_fits():
    assert choose([[2.0, 1.0]] * 10, [[0.1, 0.3]] * 10, 0.3 * 10) == [1] * 10


def test_a_budget_below_the_smallest_choice_is_refused():
    with pytest.raises(InvalidArgumentError, match="the smallest widths take 3"):
        choose([[1.0], [1.0]], [[1.0], [2.0]], 2.5)


def test_a_missing_scipy_is_named_with_what_brings_it(monkeypatch):
    def missing(name):
        message = f"No module named {name!r}"
        raise ImportError(message)

    monkeypatch.setattr("trainable_core.export.libraries.import_module", missing)
    with pytest.raises(MissingLibraryError, match=r"trainable-core\[suggest\]"):
        choose([[1.0]], [[1.0]], 2.0)
