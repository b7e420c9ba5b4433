"""How the models are quantized whose training steps are measured, in every framework."""

from __future__ import annotations

from typing import Any


def recipe(training_method: str, weight_bits: int) -> dict[str, Any]:
    """Return how all layers are quantized: weights per channel, 8-bit activations at their inputs."""
    one = {"method": "SYMMETRIC", "training_method": training_method}
    return {
        "weights": {**one, "n_bits": weight_bits, "per_channel": True},
        "activations": {**one, "n_bits": 8},
        "calibration": {"weights": "minmax", "activations": "minmax"},
        "fold_batch_norm": False,
    }
