"""The hooks of the PyTorch backend; imports nothing heavy until its own name is asked for."""

from __future__ import annotations

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl


@hookimpl
def trainable_register_backend() -> Backend:
    """Describe the PyTorch backend."""
    return Backend(
        name="torch",
        distribution="trainable-torch",
        framework=("torch", "mct-quantizers"),
        tie_rule=TieRule.HALF_EVEN,
        verbs="trainable_torch",
        remarks="trainable_torch.kernels.eligible:remarks",
        quantizer_base="trainable_torch.quantizers:BasePytorchTrainableQuantizer",
    )


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type]:
    """Return the built-in PyTorch quantizers."""
    if backend != "torch":
        return []
    from trainable_torch.quantizers import BUILTIN  # noqa: PLC0415 - imports torch, only when torch is asked for

    return list(BUILTIN)


@hookimpl
def trainable_register_modifiers(backend: str) -> list[type]:
    """Return the built-in modifiers for PyTorch."""
    if backend != "torch":
        return []
    from trainable_torch.modifiers import BUILTIN  # noqa: PLC0415 - as above

    return list(BUILTIN)
