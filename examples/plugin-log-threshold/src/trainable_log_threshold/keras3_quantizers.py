"""The quantizers of Keras 3: each estimator joined with that Keras's layer, and marked."""

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_keras.keras3 import BaseKerasTrainableQuantizer
from trainable_log_threshold import dsq, keras_dsq, keras_log, log


@mark_quantizer(QuantizationTarget.Weights, log.METHODS, "LOG_THRESHOLD")
class LogWeightsQuantizer(keras_log.LogQuantizer, BaseKerasTrainableQuantizer):
    """LOG_THRESHOLD for weights."""


@mark_quantizer(QuantizationTarget.Activation, log.METHODS, "LOG_THRESHOLD")
class LogActivationQuantizer(keras_log.LogQuantizer, BaseKerasTrainableQuantizer):
    """LOG_THRESHOLD for activations."""


@mark_quantizer(QuantizationTarget.Weights, dsq.METHODS, "DSQ")
class DsqWeightsQuantizer(keras_dsq.DsqQuantizer, BaseKerasTrainableQuantizer):
    """DSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, dsq.METHODS, "DSQ")
class DsqActivationQuantizer(keras_dsq.DsqQuantizer, BaseKerasTrainableQuantizer):
    """DSQ for activations."""


QUANTIZERS = [LogWeightsQuantizer, LogActivationQuantizer, DsqWeightsQuantizer, DsqActivationQuantizer]
