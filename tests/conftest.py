"""Hypothesis profiles for every test; HYPOTHESIS_PROFILE picks one, TRAINABLE_EXAMPLES the size of `ci` and `dev`."""

import os

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
