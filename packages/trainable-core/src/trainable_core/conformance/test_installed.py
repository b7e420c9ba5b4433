"""Tests every law on every quantizer of every installed backend: ``pytest --pyargs trainable_core.conformance``."""

from __future__ import annotations

from typing import Any

from trainable_core.conformance.suite import Check, checks


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrize with what is installed when the tests are collected."""
    found = checks()
    metafunc.parametrize("check", found, ids=[f"{check.subject.key.backend}-{check}" for check in found])


def test_conformance(check: Check) -> None:
    """Require that the law holds."""
    check()
