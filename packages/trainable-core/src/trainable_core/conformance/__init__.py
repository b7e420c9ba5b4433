"""The conformance kit: laws that every trainable quantizer is checked against, built-in or from a plugin.

It is to trainable quantizers what ``check_estimator`` is to scikit-learn's estimators. In a plugin's tests, decorate a
test with ``@conformance_checks(plugin="my_plugin")``; on the command line, run ``trainable check``. README.md in this
folder is a map of the modules. Needs the extra ``conformance`` (hypothesis, pytest).
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
