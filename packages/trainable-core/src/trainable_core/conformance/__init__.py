"""The conformance kit: what scikit-learn's ``check_estimator`` is to estimators, for trainable quantizers.

A plugin author writes ``@conformance_checks(plugin="my_plugin")`` over a test; the command line is ``trainable check``.
The laws are in `trainable_core.conformance.laws`. Needs the extra ``conformance`` (hypothesis, pytest).
"""

from typing import TYPE_CHECKING

from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_core.conformance.adapter import Adapter, Run, adapter_of
    from trainable_core.conformance.case import Case, Counterexample, Subject, Violation
    from trainable_core.conformance.law import Law
    from trainable_core.conformance.suite import (
        LAWS,
        ConformanceError,
        Verdict,
        check_quantizer,
        conformance_checks,
        replay,
        subjects,
        try_law,
    )

__all__ = [
    "LAWS",
    "Adapter",
    "Case",
    "ConformanceError",
    "Counterexample",
    "Law",
    "Run",
    "Subject",
    "Verdict",
    "Violation",
    "adapter_of",
    "check_quantizer",
    "conformance_checks",
    "replay",
    "subjects",
    "try_law",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter": ["Adapter", "Run", "adapter_of"],
        "case": ["Case", "Counterexample", "Subject", "Violation"],
        "law": ["Law"],
        "suite": [
            "LAWS",
            "ConformanceError",
            "Verdict",
            "check_quantizer",
            "conformance_checks",
            "replay",
            "subjects",
            "try_law",
        ],
    },
)
