"""What a wrapped model knows about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.plan import LayerPlan


@dataclass
class WrappedState:
    """What a wrapped model knows about itself.

    Parameters
    ----------
    recipe : QuantizationRecipe
        What it was wrapped with.
    plans : dict of str to LayerPlan
        What became of each layer, by name.
    left_out : dict of str to str
        Why, by the name of each thing that is not quantized.
    folded : dict of str to str
        Layer by the batch norm folded into it.
    finalized : bool
        Whether its quantizers are inferable.
    structure : dict
        What a backend learned of the model's structure from an example, JSON-clean: `load` has no example.
    """

    recipe: QuantizationRecipe
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    finalized: bool = False
    structure: dict[str, Any] = field(default_factory=dict)
