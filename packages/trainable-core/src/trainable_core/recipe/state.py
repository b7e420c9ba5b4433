"""What a wrapped model knows about itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainable_core.recipe.document import SKIPPED, QuantizationRecipe
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
    biases : dict of str to str
        By the name of each bias that is an integer: the tensor whose scale times that of the weight is its scale.
    islands : dict of str to str
        Why, by the name of each layer or operation that is computed in float between quantizers.
    structure : dict
        What a backend learned of the model's structure from an example, JSON-clean: `load` has no example.
    origins : dict of str to str
        For layers that have moved since the model was wrapped: their names then, by those now.
    foldable : dict of str to str
        Layer by the batch norm that `finalize` is to fold into it.
    """

    recipe: QuantizationRecipe
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    finalized: bool = False
    biases: dict[str, str] = field(default_factory=dict)
    islands: dict[str, str] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    foldable: dict[str, str] = field(default_factory=dict)

    def note_foldable(self, kept: Collection[str] = ()) -> None:
        """Tell of the batch norms that `finalize` is to fold; those `kept` are as in the float model until then."""
        for norm, into in self.foldable.items():
            simulated = ", as training simulates" if self.simulates and norm not in kept else ""
            self.left_out[norm] = f"batch norm that finalize folds into {into}{simulated}"

    @property
    def simulates(self) -> bool:
        """Whether batch norms are simulated as folded while the model trains."""
        return self.recipe.folds == "training"

    def note_folded(self, reasons: Mapping[str, str]) -> None:
        """Tell of the batch norms that `finalize` has folded, all but those that there are reasons for."""
        for norm, layer in self.foldable.items():
            if norm in reasons:
                self.left_out[norm] = f"batch norm not folded: {reasons[norm]}"
            else:
                self.folded[norm] = layer
                self.left_out.pop(norm, None)
        self.foldable = {}

    def note(self, plans: Iterable[LayerPlan]) -> list[LayerPlan]:
        """Take in what becomes of the layers, and return the plans of those that get quantizers.

        Of layers that can't be quantized no plan is kept; whether their reason is worth telling, the backend decides,
        which notes it in `left_out`. That a rule skips them is always told.
        """
        quantized = []
        for plan in plans:
            name = plan.layer.name
            if plan.reason == SKIPPED:
                self.left_out[name] = SKIPPED
            elif plan.reason and not plan.layer.obstacle:
                self.left_out.setdefault(name, plan.reason)
            if not plan.layer.obstacle:
                self.plans[name] = plan
            if plan.weights or plan.activation is not None or plan.float_inputs is not None:
                quantized.append(plan)
        return quantized
