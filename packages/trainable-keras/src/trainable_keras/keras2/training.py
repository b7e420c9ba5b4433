"""What a training loop needs of a wrapped model: variable groups, terms for the loss, freezing, step counting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from trainable_core.backend.variable_groups import variable_groups
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras2.engine import Tensor
from trainable_keras.keras2.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras2.wrapping import state_of, trainable_quantizers


def quantizers_of(model: Any) -> dict[str, BaseKerasTrainableQuantizer]:
    """Return a model's trainable quantizers by the name of their tensor, each once."""
    return {quantizer.subject: quantizer for quantizer in trainable_quantizers(model)}


def parameter_groups(
    qmodel: Any, *, weights: Mapping[str, Any] | None = None, qparams: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the model's trainable variables in groups, for one optimizer each in a loop of one's own.

    Parameters
    ----------
    qmodel : tf.keras.Model
        A wrapped model.
    weights : mapping, optional
        Options of the group WEIGHTS, such as a learning rate: everything that is not a quantizer's.
    qparams : mapping, optional
        Options of the group QPARAMS: thresholds, ranges, attention logits. Without a ``weight_decay`` here it is 0:
        decay would pull thresholds to zero.

    Returns
    -------
    list of dict
        ``{"params": [...], "name": "WEIGHTS" or "QPARAMS", **options}``; a group without variables is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    InvalidArgumentError
        When an option would replace the variables or the name.

    Notes
    -----
    A Keras optimizer has no groups. With one optimizer for all, as in `fit`, keep weight decay off the thresholds:
    ``optimizer.exclude_from_weight_decay(var_list=group["params"])``.
    """
    state_of(qmodel)
    return variable_groups(qmodel.trainable_variables, trainable_quantizers(qmodel), weights, qparams)


def regularization(qmodel: Any) -> Tensor:
    """Return the sum of the quantizers' terms for the loss; a zero scalar when no method has one.

    A call with ``training=True`` adds the same terms to ``qmodel.losses``, which `fit` minimizes; so a loop adds either
    these or those.
    """
    state_of(qmodel)
    terms = [quantizer.regularization() for quantizer in trainable_quantizers(qmodel)]
    return tf.add_n([tf.zeros(()), *(term for term in terms if term is not None)])


def freeze_quant_params(qmodel: Any, frozen: bool = True) -> Any:  # noqa: FBT001, FBT002 - reads as a fact
    """Stop every quantizer's variables from learning, or let them learn again; returns the model.

    A compiled model is to be compiled again: its optimizer has the variables that were trainable then.
    """
    state_of(qmodel)
    for quantizer in trainable_quantizers(qmodel):
        quantizer.freeze(frozen)
    forget_functions(qmodel)
    return qmodel


def advance_schedules(qmodel: Any) -> None:
    """Count one training step in every quantizer with a schedule.

    A quantizer's own call does it with ``training=True``; call this only to skip steps.
    """
    state_of(qmodel)
    for quantizer in trainable_quantizers(qmodel):
        if type(quantizer).advance is not BaseTrainableQuantizer.advance:
            quantizer.advance()


def forget_functions(qmodel: Any) -> None:
    """Let Keras trace its functions anew: those it has were traced with what the quantizers were before."""
    for name in ("train_function", "test_function", "predict_function"):
        if hasattr(qmodel, name):
            setattr(qmodel, name, None)
