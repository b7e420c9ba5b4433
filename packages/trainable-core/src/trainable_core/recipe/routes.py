"""What a recipe needs to know of the way between quantizers: which inputs get one, and whose scale a bias follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainable_core.enums import LUT_METHODS
from trainable_core.errors import ModelError, UnsupportedConfigError
from trainable_core.recipe.document import BIAS_HINT
from trainable_core.recipe.layers import INTEGER_OPS
from trainable_core.recipe.plan import LayerPlan

OWN = ""
"""In the place of a producer: the layer's own quantizer of its input."""

_ISLANDS = {
    "normalization": "integer kernels have no normalization",
    "activation": "integer kernels have no such activation function",
    "attention": "its softmax is computed in float",
    "recurrent": "its steps are computed in float",
}
"""Why layers of some kinds are computed in float between quantizers."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Parameters
    ----------
    producer : str
        The layer or operation whose output's quantizer made its values; empty where none did.
    tensor : str
        What tells a tensor without quantizer from others.
    reason : str
        Why no quantizer made its values.
    empty : bool
        Whether it holds no values, as a cache before its first use.
    """

    producer: str
    tensor: str = ""
    reason: str = ""
    empty: bool = False


@dataclass
class Routes:
    """How the layers and operations of a model are fed.

    Parameters
    ----------
    inputs : dict of str to dict
        By layer or operation: each of its inputs that gets a quantizer, as the name of a layer's argument or the place
        of an operation's operand, with what tells its tensor; inputs with the same tensor share a quantizer.
    biases : dict of str to str
        By the name of each layer with an int32 bias: the layer or operation whose output's quantizer makes its input,
        or `OWN`.
    islands : dict of str to str
        Why, by the name of each layer or operation that is computed in float between quantizers.
    """

    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    islands: dict[str, str] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """Return the routes JSON-clean."""
        return {"inputs": self.inputs, "biases": self.biases, "islands": self.islands}

    @classmethod
    def from_document(cls, document: Any) -> Routes:
        """Return the routes of a document; ModelError when it is not one."""
        try:
            inputs = {
                str(name): {str(key): str(tensor) for key, tensor in each.items()}
                for name, each in document["inputs"].items()
            }
            biases, islands = (
                {str(name): str(value) for name, value in document[part].items()} for part in ("biases", "islands")
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"its routes between quantizers are damaged: {error!r}") from error
        return cls(inputs, biases, islands)


def routes(
    plans: Sequence[LayerPlan],
    inputs: Mapping[str, Sequence[str]],
    calls: Mapping[str, Sequence[Sequence[Origin]]],
    *,
    unseen: str,
    changed: Mapping[str, str] | None = None,
) -> Routes:
    """Return how the layers and operations of a model are fed.

    Parameters
    ----------
    plans : sequence of LayerPlan
        What becomes of each.
    inputs : mapping of str to sequence of str
        By layer or operation: the names of a layer's tensor arguments, or the places of an operation's operands.
    calls : mapping of str to sequence
        Where the inputs come from, in this order, at every call.
    unseen : str
        Why the input of a layer has no known quantizer, where no call of the layer is known.
    changed : mapping of str to str, optional
        Why, by the name of each layer whose input is changed before the layer gets it.

    Raises
    ------
    UnsupportedConfigError
        When a bias is to be an int32 and the quantizer of the layer's input isn't known; names the layer.
    """
    found, by_name = Routes(), {plan.layer.name: plan for plan in plans}
    for plan in plans:
        name = plan.layer.name
        names = list(inputs.get(name, ()))
        reason = (changed or {}).get(name, "")
        fed = {
            key: {Origin("", reason=reason)} if reason else _origins(index, len(names), calls.get(name, ()), unseen)
            for index, key in enumerate(names)
        }
        if plan.float_inputs is not None:
            needed = {key: _tensor(name, origins) for key, origins in fed.items() if _needs_own(origins, plan)}
            if needed:
                found.inputs[name] = needed
        if plan.bias == "int32":
            first = names[0] if names else ""
            not_told = {Origin("", reason="register_layer(..., inputs=...) does not say what it is given")}
            producer = _producer(plan, first, fed.get(first, not_told), found.inputs.get(name, {}))
            _require_scale(plan, plan if producer == OWN else by_name.get(producer, plan))
            found.biases[name] = producer
        if plan.integer and plan.layer.op not in INTEGER_OPS and not plan.layer.clamps and plan.layer.op in _ISLANDS:
            found.islands[name] = _ISLANDS[plan.layer.op]
        elif plan.integer and plan.layer.weights and not plan.weights:
            found.islands[name] = "its weights are float"
    return found


def _origins(index: int, count: int, calls: Sequence[Sequence[Origin]], unseen: str) -> set[Origin]:
    """Return where one input comes from, over all calls."""
    if not calls:
        return {Origin("", reason=unseen)}
    return {call[index] if len(call) == count else Origin("", reason=unseen) for call in calls}


def _needs_own(origins: set[Origin], plan: LayerPlan) -> bool:
    if any(not each.producer and not each.empty for each in origins):
        return True
    return plan.bias == "int32" and len(origins) > 1  # a bias is on one grid


def _tensor(name: str, origins: set[Origin]) -> str:
    """Return what tells a tensor: the same for all layers and operations that are always given the same one."""
    tensors = sorted(each.tensor for each in origins)
    if "" in tensors or any(each.producer for each in origins):
        return f"input of {name}"
    return " ".join(tensors)


def _require_scale(plan: LayerPlan, producer: LayerPlan) -> None:
    """Refuse an int32 bias where what makes the layer's input is a table; names the layer."""
    if producer.activation is not None and producer.activation.config.quantization_method in LUT_METHODS:
        problem = "bias: int32 is not possible: the layer's input has values of a table, without a scale"
        raise UnsupportedConfigError(f"{plan.layer.name}.{plan.layer.bias}", problem, BIAS_HINT)


def _producer(plan: LayerPlan, first: str, origins: set[Origin], own: Mapping[str, str]) -> str:
    if first in own or (plan.activation is not None and plan.placement == "inputs"):
        return OWN
    producers = {each.producer for each in origins}
    if len(producers) == 1 and OWN not in producers:
        return producers.pop()
    reasons = [each.reason for each in origins if not each.producer]
    reason = reasons[0] if reasons else f"it is called behind several quantizers: {', '.join(sorted(producers))}"
    problem = f"bias: int32 needs the scale of the layer's input, and no quantizer makes that input: {reason}"
    hint = "activations with placement: integer, or inputs, give the layer's input a quantizer; "
    raise UnsupportedConfigError(f"{plan.layer.name}.{plan.layer.bias}", problem, hint + BIAS_HINT)
