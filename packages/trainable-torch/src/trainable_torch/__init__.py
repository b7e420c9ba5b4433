"""Quantization-aware training for PyTorch: the way of the data is wrap, calibrate, train, finalize.

The verbs are those of every backend; the numbers come from `trainable_core`. Names load when used, so that the plugin's
entry point costs nothing while another backend is asked for.
"""

from typing import TYPE_CHECKING

from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_torch.annealing import PytorchLinearAnnealingScheduler
    from trainable_torch.calibration import calibrate
    from trainable_torch.callback import training_callback
    from trainable_torch.description import describe
    from trainable_torch.diagnosing import diagnose, suggest
    from trainable_torch.distillation import distill
    from trainable_torch.exporting import export
    from trainable_torch.finalized import finalize
    from trainable_torch.grid import Grid
    from trainable_torch.holder import ActivationQuantizationHolder
    from trainable_torch.layers import register_layer
    from trainable_torch.mctq import to_mctq
    from trainable_torch.quantizers import BasePytorchTrainableQuantizer
    from trainable_torch.reading import running
    from trainable_torch.reconstruction import reconstruct
    from trainable_torch.reporting import report
    from trainable_torch.serialization import load, save
    from trainable_torch.statistics import freeze_batch_norm, reestimate_batch_norm
    from trainable_torch.tracking import track
    from trainable_torch.training import (
        advance_schedules,
        average_scalar_gradients,
        exclude_from_weight_decay,
        freeze_quant_params,
        parameter_groups,
        regularization,
    )
    from trainable_torch.verifying import verify
    from trainable_torch.wrapper import QuantizationWrapper
    from trainable_torch.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantizationHolder",
    "BasePytorchTrainableQuantizer",
    "Grid",
    "PytorchLinearAnnealingScheduler",
    "QuantizationWrapper",
    "advance_schedules",
    "average_scalar_gradients",
    "calibrate",
    "describe",
    "diagnose",
    "distill",
    "exclude_from_weight_decay",
    "export",
    "finalize",
    "freeze_batch_norm",
    "freeze_quant_params",
    "load",
    "parameter_groups",
    "reconstruct",
    "reestimate_batch_norm",
    "register_layer",
    "regularization",
    "report",
    "running",
    "save",
    "suggest",
    "to_mctq",
    "track",
    "training_callback",
    "verify",
    "wrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annealing": ["PytorchLinearAnnealingScheduler"],
        "calibration": ["calibrate"],
        "callback": ["training_callback"],
        "description": ["describe"],
        "diagnosing": ["diagnose", "suggest"],
        "distillation": ["distill"],
        "exporting": ["export"],
        "finalized": ["finalize"],
        "grid": ["Grid"],
        "holder": ["ActivationQuantizationHolder"],
        "layers": ["register_layer"],
        "mctq": ["to_mctq"],
        "quantizers": ["BasePytorchTrainableQuantizer"],
        "reading": ["running"],
        "reconstruction": ["reconstruct"],
        "reporting": ["report"],
        "serialization": ["load", "save"],
        "statistics": ["freeze_batch_norm", "reestimate_batch_norm"],
        "tracking": ["track"],
        "training": [
            "advance_schedules",
            "average_scalar_gradients",
            "exclude_from_weight_decay",
            "freeze_quant_params",
            "parameter_groups",
            "regularization",
        ],
        "verifying": ["verify"],
        "wrapper": ["QuantizationWrapper"],
        "wrapping": ["wrap"],
    },
)
