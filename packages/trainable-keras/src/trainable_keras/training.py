"""What a training loop needs of a wrapped model: variable groups, terms for the loss, freezing, step counting."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainable_core.backend.variable_groups import variable_groups
from trainable_core.enums import VariableGroup
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.framework import Framework
from trainable_keras.functions import Tensor
from trainable_keras.parts import KerasWrapper
from trainable_keras.wrapping import parts_of, state_of, trainable_quantizers


def quantizers_of(model: Any) -> dict[str, Any]:
    """Return a model's trainable quantizers by the name of their tensor, each once."""
    return {quantizer.subject: quantizer for quantizer in trainable_quantizers(model)}


def parameter_groups(
    framework: Framework,
    qmodel: Any,
    weights: Mapping[str, Any] | None = None,
    qparams: Mapping[str, Any] | None = None,
    pace: str = "threshold",
) -> list[dict[str, Any]]:
    """Return the model's trainable variables in groups; see `trainable_keras.parameter_groups`."""
    state_of(framework, qmodel)
    return variable_groups(qmodel.trainable_variables, trainable_quantizers(qmodel), weights, qparams, pace)


def exclude_from_weight_decay(framework: Framework, optimizer: Any, qmodel: Any) -> None:
    """Let an optimizer leave the quantizers' variables out of weight decay; see the verb of that name."""
    state_of(framework, qmodel)
    own = [v for q in trainable_quantizers(qmodel) for v in q.get_trainable_variables(VariableGroup.QPARAMS)]
    optimizer.exclude_from_weight_decay(var_list=own)


def regularization(framework: Framework, qmodel: Any) -> Tensor:
    """Return the sum of the quantizers' terms for the loss; see `trainable_keras.regularization`."""
    state_of(framework, qmodel)
    enabled = [each for each in trainable_quantizers(qmodel) if each.quantization_config.enabled]
    terms = [quantizer.regularization() for quantizer in enabled]
    wrappers = [part for part in parts_of(qmodel) if isinstance(part, KerasWrapper)]
    weights = {id(q): (w, q) for wrapper in wrappers for _, w, q in wrapper.weights_now()}  # shared ones once
    for weight, quantizer in weights.values():
        if isinstance(quantizer, BaseTrainableQuantizer) and quantizer.quantization_config.enabled:
            terms.append(quantizer.regularization_of(framework.functions.cast(weight, "float32")))
    return framework.functions.total([term for term in terms if term is not None])


def freeze_quant_params(
    framework: Framework,
    qmodel: Any,
    frozen: bool,  # noqa: FBT001 - reads as a fact
    names: Collection[str] | None = None,
) -> Any:
    """Stop every quantizer's variables from learning, or let them learn again; see the verb of that name.

    With `names`, only those of the quantizers of these tensors.
    """
    state_of(framework, qmodel)
    chosen = trainable_quantizers(qmodel) if names is None else [quantizers_of(qmodel)[name] for name in names]
    for quantizer in chosen:
        quantizer.freeze(frozen)
    forget_functions(qmodel)
    return qmodel


def advance_schedules(framework: Framework, qmodel: Any) -> None:
    """Count one training step in every quantizer with a schedule; see `trainable_keras.advance_schedules`."""
    state_of(framework, qmodel)
    for quantizer in trainable_quantizers(qmodel):
        if quantizer.has_schedule:
            quantizer.advance()


def forget_functions(qmodel: Any) -> None:
    """Let Keras trace its functions anew: those it has were traced with what the quantizers were before."""
    for name in ("train_function", "test_function", "predict_function"):
        if hasattr(qmodel, name):
            setattr(qmodel, name, None)
