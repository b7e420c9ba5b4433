"""The quantizers of Keras 2: each estimator joined with that Keras's layer, and marked."""

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_keras.keras2 import BaseKerasTrainableQuantizer
from trainable_log_threshold import dsq, keras_dsq, keras_tqt, tqt


@mark_quantizer(QuantizationTarget.Weights, tqt.METHODS, "TQT")
class TqtWeightsQuantizer(keras_tqt.TqtQuantizer, BaseKerasTrainableQuantizer):
    """TQT for weights."""


@mark_quantizer(QuantizationTarget.Activation, tqt.METHODS, "TQT")
class TqtActivationQuantizer(keras_tqt.TqtQuantizer, BaseKerasTrainableQuantizer):
    """TQT for activations."""


@mark_quantizer(QuantizationTarget.Weights, dsq.METHODS, "DSQ")
class DsqWeightsQuantizer(keras_dsq.DsqQuantizer, BaseKerasTrainableQuantizer):
    """DSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, dsq.METHODS, "DSQ")
class DsqActivationQuantizer(keras_dsq.DsqQuantizer, BaseKerasTrainableQuantizer):
    """DSQ for activations."""


QUANTIZERS = [TqtWeightsQuantizer, TqtActivationQuantizer, DsqWeightsQuantizer, DsqActivationQuantizer]
