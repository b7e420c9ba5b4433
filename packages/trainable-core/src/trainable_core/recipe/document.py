"""One document for every framework: which tensors of a model are quantized, on which grid, trained how.

A backend lists the model's layers as `LayerInfo`, in its own order and under framework-neutral op names;
`QuantizationRecipe.resolve` answers with a `LayerPlan` for each. Nothing here knows a framework, so the same recipe
gives the same configs everywhere.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from trainable_core.config import (
    Document,
    StrictBool,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.constants import SIGNED
from trainable_core.enums import LUT_METHODS, QuantizationTarget, TrainingMethod
from trainable_core.errors import DocumentError, RuleError, UnsupportedConfigError
from trainable_core.qparams import variable_shape
from trainable_core.recipe.layers import INTEGER_INPUT_OPS, INTEGER_OPS, OPS, LayerInfo, WeightInfo
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.sections import (
    ActivationsSection,
    BiasField,
    CalibrationSection,
    FoldingField,
    Section,
    TensorSection,
    WeightsSection,
    one_of,
    with_changes,
)
from trainable_core.targets.known import TARGETS
from trainable_core.targets.target import Bias, Target
from trainable_core.validation import check_text, plain

S = TypeVar("S", bound=TensorSection)

BIAS_HINT = 'a rule {"match": {"name": ...}, "bias": "float"} leaves the bias in float.'
"""What to do about a bias that can't be an integer."""

GROUPS_HINT = (
    'a rule {"match": {"name": ...}, "weights": {"granularity": "channel"}} gives it one threshold per channel.'
)
"""What to do about a weight that can't have groups."""

SKIPPED = "skipped by a rule"
"""Reason of a layer that a rule leaves alone."""


class Match(Section):
    """Which layers a rule is for; every criterion given must hold.

    Parameters
    ----------
    name : str, optional
        Pattern of the layer's full name, shell style (``*`` also matches dots), case-sensitive. The plain name of a
        module that holds layers means all of them.
    op : str, optional
        Framework-neutral op kind, one of `OPS`.
    """

    name: Annotated[str, BeforeValidator(check_text)] | None = None
    op: str | None = None

    @field_validator("op")
    @classmethod
    def _known_op(cls, op: str | None) -> str | None:
        if op is not None and op not in OPS:
            message = f"{op!r} is not one of {', '.join(OPS)}"
            raise ValueError(message)
        return op

    @model_validator(mode="after")
    def _not_empty(self) -> "Match":
        if self.name is None and self.op is None:
            message = "a rule matches by name, by op, or by both"
            raise ValueError(message)
        return self

    @property
    def explicit(self) -> bool:
        """Whether the rule names an op kind or one layer, rather than a group of whatever is there."""
        return self.op is not None or self.plain

    @property
    def plain(self) -> bool:
        """Whether the name is one without wildcards."""
        return self.name is not None and not set("*?[") & set(self.name)

    def __call__(self, layer: LayerInfo) -> bool:
        """Return whether the layer is meant by its own name and op."""
        named = self.name is None or fnmatchcase(layer.name, self.name)
        return named and (self.op is None or self.op == layer.op)

    def holds(self, layer: LayerInfo) -> bool:
        """Return whether the layer is inside of the module that is named."""
        inside = self.plain and layer.name.startswith(f"{self.name}.")
        return inside and (self.op is None or self.op == layer.op)


class Rule(Section):
    """What is different for some layers.

    Parameters
    ----------
    match : Match
        Which layers.
    weights, activations : dict
        Fields of `WeightsSection` / `ActivationsSection` to change. Layers and operations without weights get an
        activation quantizer from a rule only when it names their op or their full name: ``name: "stem.*"`` changes the
        layers that are quantized anyway.
    skip : bool, optional
        True leaves the layers alone, False takes an earlier skip back.
    bias : {"float", "int32"}, optional
        How the layers' biases are represented.
    """

    match: Match
    weights: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)
    skip: StrictBool | None = None
    bias: BiasField | None = None

    @field_validator("weights", "activations")
    @classmethod
    def _known_fields(cls, changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        section = WeightsSection if info.field_name == "weights" else ActivationsSection
        base = {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"}
        checked = section.model_validate({**base, **changes})  # errors are raised here, not when a layer is met
        return checked.model_dump(mode="json", include=set(changes))

    @model_validator(mode="after")
    def _changes_something(self) -> "Rule":
        if not self.weights and not self.activations and self.skip is None and self.bias is None:
            message = "a rule changes weights, activations, bias or skip; this one changes nothing"
            raise ValueError(message)
        return self


class QuantizationRecipe(Document):
    """The whole document.

    Parameters
    ----------
    weights, activations : WeightsSection, ActivationsSection, optional
        What holds for every layer; left out, only rules quantize.
    calibration : CalibrationSection
        How thresholds are found.
    bias : {"float", "int32"}
        How the biases of layers with quantized weights are represented, in training and after: as they are, or as
        int32 codes on the grid of the layer's sums of products, which integer kernels compute with.
    target : {"mctq", "onnx", "tflite", "qonnx", "native"}
        What the result is deployed with; what it can't express is refused when wrapping.
    fold_batch_norm : {"before", "training", "after"} or bool
        Whether batch normalization is folded into the convolution or linear layer before it: before the model trains
        (true means the same); by `finalize`, while training simulates it, so that folded weights are quantized; or
        after training, by `finalize`, with the codes that were trained. False leaves it where it is.
    rules : list of Rule
        In order; later ones win.

    Examples
    --------
    >>> recipe = QuantizationRecipe.model_validate(
    ...     {
    ...         "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    ...         "rules": [{"match": {"name": "stem.*"}, "weights": {"n_bits": 8}}],
    ...     }
    ... )
    >>> layers = [LayerInfo(f"{n}.conv", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)}) for n in ("stem", "body")]
    >>> [plan.weights["weight"].config.n_bits for plan in recipe.resolve(layers)]
    [8, 4]
    """

    weights: WeightsSection | None = None
    activations: ActivationsSection | None = None
    calibration: CalibrationSection = CalibrationSection()
    bias: BiasField = "float"
    target: Annotated[Literal["mctq", "onnx", "tflite", "qonnx", "native"], BeforeValidator(one_of(*TARGETS))] = "mctq"
    fold_batch_norm: FoldingField = True
    rules: list[Rule] = Field(default_factory=list)

    @classmethod
    def of(cls, source: "RecipeSource") -> "QuantizationRecipe":
        """Return a recipe from a recipe, a mapping, or the path of a YAML or JSON file.

        Raises
        ------
        DocumentError
            When the file can't be read or isn't YAML or JSON.
        pydantic.ValidationError
            When the document breaks a rule; names the field.
        """
        if isinstance(source, QuantizationRecipe):
            return source
        if isinstance(source, Mapping):
            return cls.model_validate(dict(source))
        if not isinstance(source, str | PathLike):
            raise DocumentError(
                type(source).__name__, "a recipe is a QuantizationRecipe, a mapping, or the path of a YAML or JSON file"
            )
        return cls.model_validate(_read(Path(fspath(source))))

    def resolve(self, layers: Sequence[LayerInfo], *, unseen: str = "", complete: bool = True) -> list[LayerPlan]:
        """Return what becomes of each layer.

        Parameters
        ----------
        layers : sequence of LayerInfo
            The model's layers, those included that can't be quantized, and functional operations where they are
            visible.
        unseen : str
            Why functional operations are not among them; part of the error when a rule matches nothing.
        complete : bool
            Whether these are all layers that the recipe was written for; of a part, a rule may match none.

        Raises
        ------
        RuleError
            When a rule matches no layer, asks matched layers for weights or a bias none of them has, or asks only
            layers that can't be quantized.
        UnsupportedConfigError
            When a layer's grid or bias can't be expressed by the target, or its bias can't be an integer.
        pydantic.ValidationError
            When rules add up to an incomplete or wrong config.
        """
        matched = self.matched(layers)
        for index, rule in enumerate(self.rules if complete else ()):
            _check_rule(index, rule, [layers[each] for each in matched[index]], layers, unseen)
        rules = _by_layer(matched, len(layers))
        return [
            self.plan_of(layer, [self.rules[index] for index in each])
            for layer, each in zip(layers, rules, strict=True)
        ]

    def matched(self, layers: Sequence[LayerInfo]) -> list[list[int]]:
        """Return the indices of the layers that each rule is for, in the order of the rules.

        The plain name of a module means it and everything inside of it; that of a layer which is quantized as a whole
        means that layer alone.
        """
        whole = {layer.name for layer in layers if not layer.obstacle}
        return [
            [
                index
                for index, layer in enumerate(layers)
                if rule.match(layer) or (rule.match.name not in whole and rule.match.holds(layer))
            ]
            for rule in self.rules
        ]

    def matches_functional(self, layers: Sequence[LayerInfo]) -> bool:
        """Return whether some rule matches none of the layers: it may mean an operation that only tracing shows."""
        return not all(self.matched(layers))

    @property
    def folds(self) -> Literal["before", "training", "after"] | None:
        """When batch norm is folded; None where it is not.

        Raises
        ------
        UnsupportedConfigError
            When it is to be folded after training where quantizers or integer biases have to stand behind it.
        """
        subject = f"fold_batch_norm: {self.fold_batch_norm}"
        if self.fold_batch_norm == "training":
            return "training"
        if self.fold_batch_norm != "after":
            return "before" if self.fold_batch_norm else None
        if self.quantizes_outputs:
            problem = "an activation quantizer at a layer's output stands between it and its batch norm"
            raise UnsupportedConfigError(subject, problem, "use placement: inputs, or fold_batch_norm: training.")
        if self.quantizes_biases:
            problem = "an int32 bias has to hold what the batch norm adds while it trains"
            raise UnsupportedConfigError(subject, problem, "use bias: float, or fold_batch_norm: training.")
        return "after"

    @property
    def quantizes_outputs(self) -> bool:
        """Whether any activation quantizer may stand at an output."""
        return not self._placements <= {"inputs"}

    @property
    def quantizes_float_inputs(self) -> bool:
        """Whether any layer is to have quantizers of the inputs that no other quantizer reaches."""
        return "integer" in self._placements

    @property
    def quantizes_biases(self) -> bool:
        """Whether any bias may be an integer."""
        return "int32" in (self.bias, *(rule.bias for rule in self.rules))

    @property
    def _placements(self) -> set[str]:
        placements = {self.activations.placement} if self.activations else set()
        return placements | {rule.activations.get("placement", "inputs") for rule in self.rules}

    def plan_of(self, layer: LayerInfo, rules: Sequence[Rule]) -> LayerPlan:
        """Return what becomes of a layer by the defaults and some rules, whatever they match.

        Raises
        ------
        UnsupportedConfigError, pydantic.ValidationError
            As `resolve` does.
        """
        weights: dict[str, Any] | None = self.weights.model_dump(exclude_unset=True) if self.weights else None
        activations: dict[str, Any] | None = (
            self.activations.model_dump(exclude_unset=True) if self.activations else None
        )
        asked = bool(layer.weights) or bool(self.activations and self.activations.placement != "inputs")
        skip, bias = False, self.bias
        for rule in rules:
            skip = skip if rule.skip is None else rule.skip
            bias = rule.bias or bias
            if rule.weights and layer.weights:
                weights = with_changes(weights or {}, rule.weights)
            if rule.activations:
                activations = with_changes(activations or {}, rule.activations)
                asked = asked or rule.match.op is not None or (rule.match.plain and rule.match(layer))
        if skip:
            return LayerPlan(layer, {}, None, "inputs", SKIPPED)
        if layer.obstacle:
            return LayerPlan(layer, {}, None, "inputs", layer.obstacle)
        weights_section = _section(WeightsSection, weights, layer) if layer.weights else None
        activations_section = _section(ActivationsSection, activations, layer) if asked else None
        plans = {
            attribute: self._weights_plan(layer, attribute, info, weights_section)
            for attribute, info in layer.weights.items()
            if weights_section is not None and weights_section.enabled
        }
        asked_place = activations_section.placement if activations_section else "inputs"
        placement: Literal["inputs", "outputs"] = "inputs" if asked_place == "inputs" else "outputs"
        activation = None
        reason = ""
        if activations_section is not None and activations_section.enabled:
            if placement == "inputs" and layer.op in INTEGER_INPUT_OPS:
                reason = "" if plans else "its inputs are indices"
            else:
                activation = self._activation_plan(layer, activations_section)
        if not plans and activation is None and layer.weights:
            reason = reason or "the recipe quantizes neither its weights nor its activations"
        integer = asked_place == "integer" and activation is not None
        return LayerPlan(
            layer,
            plans,
            activation,
            placement,
            reason,
            bias=self._bias_of(layer, plans, bias),
            integer=integer,
            float_inputs=activation if integer and layer.op in INTEGER_OPS else None,
        )

    @property
    def _target(self) -> Target:
        return TARGETS[self.target]

    def _bias_of(self, layer: LayerInfo, weights: Mapping[str, QuantizerPlan], asked: Bias) -> Bias:
        """Return how a layer's bias is represented: as asked where its weights are quantized, else in float."""
        if not weights or not layer.bias:
            return "float"
        subject = f"{layer.name}.{layer.bias}"
        if asked == "int32":
            problem = layer.bias_obstacle
            if any(plan.config.quantization_method in LUT_METHODS for plan in weights.values()):
                problem = "its weights are values of a table, without a scale"
            elif any(plan.config.blocks is not None for plan in weights.values()):
                problem = "its sums of products have no scale of their own, as the weights of one sum have several"
            problem = problem or ("it has several quantized weights" if len(weights) > 1 else "")
            if problem:
                raise UnsupportedConfigError(subject, f"bias: int32 is not possible: {problem}", BIAS_HINT)
        self._target.check_bias(subject, asked)
        return asked

    def _weights_plan(
        self, layer: LayerInfo, attribute: str, info: WeightInfo, section: WeightsSection
    ) -> QuantizerPlan:
        subject = f"{layer.name}.{attribute}"
        per_channel, group_size = section.grouping != "tensor", section.inputs_of_a_group
        if section.method in LUT_METHODS and (group_size is not None or info.experts_axis is not None):
            problem = f"{section.method} has one threshold per tensor or channel, and none for groups or experts"
            raise UnsupportedConfigError(subject, problem, GROUPS_HINT)
        if group_size is not None and info.inputs_axis is None:
            if layer.op != "depthwise_conv":  # whose outputs have one input each
                problem = "it is not known along which axis its inputs lie, so it has no groups"
                raise UnsupportedConfigError(subject, problem, GROUPS_HINT)
            group_size = None
        self._target.check_grid(
            subject,
            QuantizationTarget.Weights,
            section.method,
            (section.n_bits, *(section.candidates or ())),
            op=layer.op,
            per_channel=per_channel,
        )
        # a recipe that names no target deploys by `finalize`, which has quantizers of its own for experts
        has_experts = info.experts_axis is not None and "target" in self.model_fields_set
        self._target.check_blocks(subject, groups=group_size is not None, experts=has_experts)
        config = TrainableQuantizerWeightsConfig(
            weights_quantization_method=section.method,
            weights_n_bits=section.n_bits,
            weights_quantization_params={},
            enable_weights_quantization=True,
            weights_channels_axis=info.channels_axis,
            weights_per_channel_threshold=per_channel,
            min_threshold=section.min_threshold,
            weights_quantization_candidates=section.candidate_configs(),
            weights_group_size=group_size,
            weights_group_axis=None if group_size is None else info.inputs_axis,
            weights_expert_axis=info.experts_axis,
        )
        variable_shape(config, info.shape, subject)  # raises where the groups don't fit the layer
        return QuantizerPlan(config, section.training_method, section.arguments, section.modifiers)

    def _activation_plan(self, layer: LayerInfo, section: ActivationsSection) -> QuantizerPlan:
        if section.training_method == TrainingMethod.DYNAMIC:
            self._target.check_dynamic(layer.name)
            if section.placement == "integer":
                problem = "placement: integer needs scales that are known before the model runs"
                raise UnsupportedConfigError(layer.name, problem, "use placement: inputs or outputs.")
        self._target.check_grid(
            layer.name, QuantizationTarget.Activation, section.method, (section.n_bits, *(section.candidates or ()))
        )
        config = TrainableQuantizerActivationConfig(
            activation_quantization_method=section.method,
            activation_n_bits=section.n_bits,
            activation_quantization_params={} if section.signed is None else {SIGNED: section.signed},
            enable_activation_quantization=True,
            min_threshold=section.min_threshold,
            activation_quantization_candidates=section.candidate_configs(),
        )
        return QuantizerPlan(config, section.training_method, section.arguments, section.modifiers)


RecipeSource = QuantizationRecipe | Mapping[str, Any] | str | PathLike[str]
"""What `wrap` takes for a recipe; see `QuantizationRecipe.of`."""


def _by_layer(matched: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return the indices of the rules for each layer, from those of the layers for each rule.

    Examples
    --------
    >>> _by_layer([[0, 1], [1]], 3)
    [[0], [0, 1], []]
    """
    rules: list[list[int]] = [[] for _ in range(count)]
    for index, layers in enumerate(matched):
        for layer in layers:
            rules[layer].append(index)
    return rules


def _check_rule(index: int, rule: Rule, matched: Sequence[LayerInfo], layers: Sequence[LayerInfo], unseen: str) -> None:
    """Refuse a rule that would change nothing.

    Raises
    ------
    RuleError
        When it matches no layer, or none that has what the rule asks for.
    """
    text = f"rules.{index} ({rule.match.model_dump_json(exclude_none=True)})"
    quantizable = [layer for layer in matched if not layer.obstacle]
    names = [layer.name for layer in layers if not layer.obstacle]
    if quantizable:
        problem = ""
        if rule.weights and not any(layer.weights for layer in quantizable):
            problem = "none of its layers has weights to quantize"
        elif rule.bias and not any(layer.bias for layer in quantizable):
            problem = "none of its layers has a bias beside quantized weights"
        if problem:
            raise RuleError(text, problem, [layer.name for layer in quantizable])
        return
    holding = [each.name for each in matched if any(name.startswith(f"{each.name}.") for name in names)]
    owner = next((name for name in names if (rule.match.name or "").startswith(f"{name}.")), None)
    problem = ""
    if not matched:
        problem = "it matches no layer" + (f" (functional operations are not visible: {unseen})" if unseen else "")
        if owner is not None:
            problem += f"; {owner!r} is quantized as a whole, name that one"
    elif holding and not rule.match.plain:
        problem = f"it matches no layer, but modules that hold layers ({', '.join(holding)}): name one of them in full,"
        problem += f" or the layers inside, as in {holding[0] + '.*'!r}"
    elif rule.weights or rule.activations or rule.bias:
        reasons = "; ".join(f"{layer.name}: {layer.obstacle}" for layer in matched)
        problem = f"none of its layers can be quantized ({reasons})"
    if problem:
        raise RuleError(text, problem, names)


def _section(section: type[S], fields: Mapping[str, Any] | None, layer: LayerInfo) -> S | None:
    """Return the section that defaults and rules add up to; None when nothing was said."""
    if fields is None:
        return None
    missing = [name for name in ("method", "n_bits", "training_method") if name not in fields]
    if missing:
        part = "weights" if section is WeightsSection else "activations"
        raise UnsupportedConfigError(
            f"{layer.name}: {part}", f"rules give no {', '.join(missing)}, and the recipe has no {part} default"
        )
    return section.model_validate(dict(fields))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or no path at all
        raise DocumentError(path, f"can't be read: {error}") from error
    kind, parse = "JSON", cast("Callable[[str], Any]", json.loads)
    if path.suffix != ".json":
        try:
            import yaml  # noqa: PLC0415 - an extra, and only this format needs it
        except ImportError as error:
            raise DocumentError(path, "reading YAML needs pyyaml", "pip install trainable-core[yaml]") from error
        kind, parse = "YAML", yaml.safe_load
    try:
        document = plain(parse(text))  # YAML's aliases may lead back to where they stand, or multiply
    except Exception as error:  # a date of month 13 is a ValueError, a deep nesting a RecursionError
        raise DocumentError(path, f"not {kind}: {error}") from error
    if not isinstance(document, dict):
        raise DocumentError(path, f"it holds {type(document).__name__}, not the fields of a recipe")
    return document
