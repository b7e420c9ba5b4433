"""The documents in the artifacts that need no framework: configs, a recipe, and the layers that it is resolved for."""

from __future__ import annotations

from typing import Any

from trainable_core import (
    QuantizationMethod,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.recipe.layers import LayerInfo, WeightInfo

CONFIGS: dict[str, Any] = {
    "weights": TrainableQuantizerWeightsConfig(
        weights_quantization_method=QuantizationMethod.UNIFORM,
        weights_n_bits=3,
        weights_quantization_params={"range_min": [-1.0, -0.5], "range_max": [0.25, 2.0]},
        weights_per_channel_threshold=True,
        weights_channels_axis=1,
        weights_quantization_candidates=[{"n_bits": 2}, {"n_bits": 8, "quantization_params": {"threshold": 1.5}}],
        min_threshold=0.001,
    ),
    "activation": TrainableQuantizerActivationConfig(
        activation_quantization_method=QuantizationMethod.POWER_OF_TWO,
        activation_n_bits=8,
        activation_quantization_params={"threshold": 4.0, "is_signed": False},
        enable_activation_quantization=False,
    ),
    "candidate": TrainableQuantizerCandidateConfig(n_bits=5, quantization_params={"threshold": 0.5}),
}
RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "per_channel": True, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ", "placement": "inputs"},
    "calibration": {"weights": "mse", "activations": "percentile", "percentile": 99.99},
    "target": "mctq",
    "fold_batch_norm": True,
    "rules": [
        {"match": {"name": "stem.*"}, "weights": {"n_bits": 8}},
        {"match": {"op": "linear"}, "weights": {"training_method": "DQA", "candidates": [2, 4]}},
        {"match": {"name": "head"}, "skip": True},
    ],
}
RECIPE_IN_YAML = """\
schema_version: 1
weights:     {method: SYMMETRIC, n_bits: 4, per_channel: true, training_method: LSQ}
activations: {method: UNIFORM,   n_bits: 8, training_method: LSQ, placement: inputs}
calibration: {weights: mse, activations: percentile, percentile: 99.99}
target: mctq
fold_batch_norm: true
rules:
  - {match: {name: "stem.*"},  weights: {n_bits: 8}}
  - {match: {op: linear},      weights: {training_method: DQA, candidates: [2, 4]}}
  - {match: {name: "head"},    skip: true}
"""
LAYERS = [
    LayerInfo("stem.conv", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)}),
    LayerInfo("body.linear", "linear", {"weight": WeightInfo((16, 8), 0)}),
    LayerInfo("relu", "activation"),
    LayerInfo("head", "linear", {"weight": WeightInfo((10, 16), 0)}),
]
