"""The hooks of the Keras 3 backend; imports nothing heavy until its own name is asked for."""

from __future__ import annotations

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl
from trainable_keras.which import is_installed, looking_up


@hookimpl
def trainable_register_backend() -> Backend | None:
    """Describe the Keras 3 backend; None where Keras 3 is not installed."""
    if not is_installed(3):
        return None
    return Backend(
        name="keras",
        distribution="trainable-keras",
        framework=("keras", "mct-quantizers"),
        tie_rule=TieRule.HALF_UP,
        verbs="trainable_keras",
        conformance="trainable_keras.keras3.conformance",
        quantizer_base="trainable_keras.keras3:BaseKerasTrainableQuantizer",
    )


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type]:
    """Return the built-in Keras quantizers."""
    if backend != "keras":
        return []
    with looking_up():
        from trainable_keras.keras3.quantizers import BUILTIN  # noqa: PLC0415 - imports keras, only when keras is asked for

    return list(BUILTIN)


@hookimpl
def trainable_register_modifiers(backend: str) -> list[type]:
    """Return the built-in modifiers for Keras."""
    if backend != "keras":
        return []
    from trainable_keras.modifiers import BUILTIN  # noqa: PLC0415 - loads NumPy, only when it is needed

    return list(BUILTIN)
