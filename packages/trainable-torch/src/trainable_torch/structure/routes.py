"""How the layers and operations of a PyTorch model are fed; see `trainable_core.recipe.routes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from trainable_core.recipe import routes as core
from trainable_core.recipe.layers import LayerKind
from trainable_core.recipe.plan import LayerPlan
from trainable_core.recipe.routes import OWN as OWN  # noqa: PLC0414 - they are known by this module's name
from trainable_core.recipe.routes import Origin
from trainable_core.recipe.routes import Routes as Routes  # noqa: PLC0414 - as above
from trainable_torch.structure.origins import NOT_SEEN


def routes(
    plans: Sequence[LayerPlan],
    kinds: Mapping[str, tuple[nn.Module, LayerKind]],
    operands: Mapping[str, int],
    calls: Mapping[str, Sequence[Sequence[Origin]]],
) -> Routes:
    """Return how the layers and operations of a model are fed.

    Parameters
    ----------
    plans : sequence of LayerPlan
        What becomes of each.
    kinds : mapping of str to (Module, LayerKind)
        The layers, by name.
    operands : mapping of str to int
        How many inputs each functional operation has, by name.
    calls : mapping of str to sequence
        Where the inputs come from at every call; see `origins.inputs_of_calls`.

    Raises
    ------
    UnsupportedConfigError
        When a bias is to be an int32 and the quantizer of the layer's input isn't known; names the layer.
    """
    inputs = {name: [str(index) for index in range(count)] for name, count in operands.items()}
    inputs |= {name: list(kind.inputs) for name, (_, kind) in kinds.items()}
    hooks = {name: hook for name, (module, _) in kinds.items() if (hook := _changing_hook(module))}
    changed = {name: f"it has a {hook}, which may change it" for name, hook in hooks.items()}
    return core.routes(plans, inputs, calls, unseen=NOT_SEEN, changed=changed)


def _changing_hook(module: nn.Module) -> str:
    """Return what kind of hook may change a layer's input; those that compute a weight do not."""
    hooks = module._forward_pre_hooks.values()  # noqa: SLF001 - there is no public way to find a hook
    weights = {"weight", "bias"}
    computes = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) in weights for hook in hooks]
    return "" if all(computes) else "forward pre hook"
