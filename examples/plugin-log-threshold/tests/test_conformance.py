# ruff: noqa: ANN001, ANN201, D103 - a test's name says what it checks
"""Every law of the conformance kit on every class of the plugin, for each backend that is installed."""

from trainable_core.conformance import conformance_checks


@conformance_checks(plugin="log_threshold", examples=20)
def test_conformance(check):
    check()
