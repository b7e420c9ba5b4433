"""Observed values to quantization params: observe, then calibrate.

Activations pass by in batches, so an `Observer` keeps their exact ends and a histogram, and `calibrate_activation`
reads the params off it. Weights are all there, so `calibrate_weights` takes the values themselves. Both search with
the grids of `trainable_core.qparams` and the fake quantization of `trainable_core.reference.affine`: the error they
measure is the error the model will have.
"""

from trainable_core.calibration.observer import Observer
from trainable_core.calibration.params import calibrate_activation, calibrate_weights
from trainable_core.enums import CalibrationMethod

__all__ = ["CalibrationMethod", "Observer", "calibrate_activation", "calibrate_weights"]
