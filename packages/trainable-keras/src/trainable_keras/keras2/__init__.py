"""Quantization-aware training for Keras 2: the way of the data is wrap, calibrate, train, finalize.

The verbs are those of every backend; the numbers come from `trainable_core`. Names load when used, so that the plugin's
entry point costs nothing while another backend is asked for. Where Keras 2 is imported already, the layers are
registered with it at once, so that ``tf.keras.models.load_model`` finds them.
"""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from trainable_core.errors import FrameworkError
from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_keras.keras2.annealing import KerasLinearAnnealingScheduler
    from trainable_keras.keras2.calibration import calibrate
    from trainable_keras.keras2.description import describe
    from trainable_keras.keras2.finalized import finalize
    from trainable_keras.keras2.grid import Grid
    from trainable_keras.keras2.holder import ActivationQuantizationHolder
    from trainable_keras.keras2.layers import register_layer
    from trainable_keras.keras2.quantizers import BaseKerasTrainableQuantizer
    from trainable_keras.keras2.serialization import load, save
    from trainable_keras.keras2.training import advance_schedules, freeze_quant_params, parameter_groups, regularization
    from trainable_keras.keras2.wrapper import QuantizationWrapper
    from trainable_keras.keras2.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantizationHolder",
    "BaseKerasTrainableQuantizer",
    "Grid",
    "KerasLinearAnnealingScheduler",
    "QuantizationWrapper",
    "advance_schedules",
    "calibrate",
    "describe",
    "finalize",
    "freeze_quant_params",
    "load",
    "parameter_groups",
    "register_layer",
    "regularization",
    "save",
    "wrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annealing": ["KerasLinearAnnealingScheduler"],
        "calibration": ["calibrate"],
        "description": ["describe"],
        "finalized": ["finalize"],
        "grid": ["Grid"],
        "holder": ["ActivationQuantizationHolder"],
        "layers": ["register_layer"],
        "quantizers": ["BaseKerasTrainableQuantizer"],
        "serialization": ["load", "save"],
        "training": ["advance_schedules", "freeze_quant_params", "parameter_groups", "regularization"],
        "wrapper": ["QuantizationWrapper"],
        "wrapping": ["wrap"],
    },
)


def _keras_2_is_loaded() -> bool:
    """Return whether Keras 2 is in the process, or TensorFlow is and will take it: asking costs no import."""
    versions = [str(getattr(sys.modules.get(name), "__version__", "")) for name in ("tf_keras", "keras")]
    legacy = os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in {"1", "true"}
    return any(version.startswith("2.") for version in versions) or (legacy and "tensorflow" in sys.modules)


if _keras_2_is_loaded():
    with contextlib.suppress(FrameworkError):  # another Keras is in charge after all; said when a name is used
        import trainable_keras.keras2.wrapping  # noqa: F401 - registers wrapper, holder and deployed quantizers with Keras
