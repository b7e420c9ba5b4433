"""Hypothesis profiles for every test, and what share of the cases of each test is run.

HYPOTHESIS_PROFILE picks a profile, TRAINABLE_EXAMPLES the size of `ci` and `dev`. With TRAINABLE_SHARE=3, about a third
of each test's parametrized cases are run, at least one, and the same ones every time; without it all of them. Tests
that are marked `all_cases` keep theirs.
"""

import os
import zlib
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("TRAINABLE_EXAMPLES", "50"))

# No deadlines: a first call pays for torch's lazy imports, and two test processes share the cores.
settings.register_profile("dev", deadline=None, max_examples=EXAMPLES, print_blob=True)
# The same examples on every run, so that a failure is one of the change under test.
settings.register_profile("ci", deadline=None, max_examples=EXAMPLES, derandomize=True, print_blob=True)
# Slow data generation is expected of a long search.
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

SHARE = int(os.environ.get("TRAINABLE_SHARE", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a share of the cases of each test, chosen by their names: neighbours differ in one parameter alone."""
    if SHARE < 2:
        return
    cases = defaultdict(list)
    kept = set()
    for item in items:
        if item.get_closest_marker("all_cases"):
            kept.add(item)
        else:
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one in cases.values():
        by_chance = {item for item in of_one if not zlib.crc32(item.nodeid.encode()) % SHARE}
        kept |= by_chance or {min(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
