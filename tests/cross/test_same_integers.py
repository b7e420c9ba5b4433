"""One recipe and the same float weights give the same integers in PyTorch and in Keras, exact ties aside.

On Keras 3, and on Keras 2 where TF_USE_LEGACY_KERAS is 1.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainable_keras
import trainable_torch
from tests.keras.framework import BACKEND, KERAS_VERSION, keras, kl, tf, to_numpy
from trainable_core import get_trainable_quantizer_class
from trainable_core.backend.description import set_described_params
from trainable_core.config import TrainableQuantizerActivationConfig
from trainable_core.enums import TieRule
from trainable_core.errors import DocumentError, DocumentVersionError
from trainable_core.reference import affine
from trainable_keras.graph import layers_within
from trainable_keras.parts import plan_of
from trainable_keras.training import quantizers_of
from trainable_torch.training import quantizers_of as torch_quantizers

DEPTHWISE = {2: "depthwise_kernel", 3: "kernel"}[KERAS_VERSION]
"""What a depthwise layer calls its kernel."""

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
GRIDS = ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")

# where PyTorch's axes go in Keras's kernels
TO_KERAS = {
    "stem.conv": (2, 3, 1, 0),  # OIHW -> HWIO
    "body": (2, 3, 0, 1),  # (C, 1, H, W) -> (H, W, C, 1)
    "up": (2, 3, 1, 0),  # (in, out, H, W) -> (H, W, out, in)
    "head": (1, 0),
}


def in_torch() -> nn.Sequential:
    torch.manual_seed(0)
    stem = OrderedDict(conv=nn.Conv2d(3, 32, 3, bias=False), norm=nn.BatchNorm2d(32), relu=nn.ReLU())
    layers = OrderedDict(
        stem=nn.Sequential(stem),
        body=nn.Conv2d(32, 32, 3, groups=32),
        up=nn.ConvTranspose2d(32, 24, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(24, 10),
    )
    return nn.Sequential(layers)


def in_keras() -> keras.Sequential:
    stem = [
        keras.Input((10, 10, 3)),
        kl.Conv2D(32, 3, use_bias=False, name="conv"),
        kl.BatchNormalization(epsilon=1e-5, name="norm"),
        kl.ReLU(name="relu"),
    ]
    layers = [
        keras.Input((10, 10, 3)),
        keras.Sequential(stem, name="stem"),
        kl.DepthwiseConv2D(3, name="body"),
        kl.Conv2DTranspose(24, 3, name="up"),
        kl.GlobalAveragePooling2D(name="pool"),
        kl.Dense(10, name="head"),
    ]
    return keras.Sequential(layers)


def kernel_of(layer: str) -> str:
    return DEPTHWISE if layer == "body" else "kernel"


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 3, 10, 10)).astype(np.float32)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def wrappers(qmodel: Any) -> dict[str, Any]:
    """Return a model's wrappers by the name of their layer."""
    if isinstance(qmodel, nn.Module):
        kind = trainable_torch.QuantizationWrapper
        return {name: module for name, module in qmodel.named_modules() if isinstance(module, kind)}
    parts = [layer for layer in layers_within(qmodel) if isinstance(layer, trainable_keras.QuantizationWrapper)]
    return {plan_of(part).layer.name: part for part in parts}


def trained_in_torch(recipe: Any) -> nn.Module:
    model = in_torch()
    model(torch.from_numpy(images(64)))  # the batch norm has seen something
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(model.eval(), recipe), [torch.from_numpy(images(32))])
    optimizer = torch.optim.SGD(trainable_torch.parameter_groups(qmodel), lr=0.05)
    qmodel.train()
    for step in range(3):
        optimizer.zero_grad()
        qmodel(torch.from_numpy(images(8 + step))).square().mean().backward()
        optimizer.step()
    return qmodel.eval()


def handed_to_keras(qmodel: nn.Module, recipe: Any) -> keras.Model:
    """Return a Keras model with the float weights of the trained one, and with its quantizers' numbers from JSON."""
    handed = trainable_keras.wrap(in_keras(), recipe)
    theirs, ours = wrappers(qmodel), wrappers(handed)
    assert list(ours) == list(theirs)
    for name, wrapper in theirs.items():
        getattr(ours[name].layer, kernel_of(name)).assign(
            wrapper.layer.weight.detach().numpy().transpose(TO_KERAS[name])
        )
        ours[name].layer.bias.assign(wrapper.layer.bias.detach().numpy())
    document = json.loads(trainable_torch.describe(qmodel).to_json())
    set_described_params(quantizers_of(handed).values(), document)
    return handed


def codes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) / scale).astype(np.int64)


def ties(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Tell which values lie exactly half way between two codes, in the float32 arithmetic of both backends."""
    steps = values * (np.float32(1) / scale.astype(np.float32))
    return steps - np.floor(steps) == np.float32(0.5)


def scales_of(quantizer: Any, shape: Any) -> np.ndarray:
    """Return the scale of each element of a weight."""
    grid, blocks = quantizer.current_qparams(), quantizer.quantization_config.blocks
    if blocks is None:
        return np.broadcast_to(grid.along(len(shape)).scale, shape)
    rows = np.broadcast_to(grid.scale[:, None], blocks.layout(tuple(shape)).rows)
    return blocks.tensor(rows, tuple(shape))


GROUPS = {
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ", "group_size": 8},
    "activations": {"method": "UNIFORM", "n_bits": 4, "training_method": "LSQ"},
    "target": "native",
}
"""Scales for groups of eight inputs: four per channel of a transposed convolution, three of the linear layer."""


@pytest.mark.parametrize(
    "recipe", [RECIPES / "w4a4_lsq.yaml", RECIPES / "w2a4_lsq.yaml", GROUPS], ids=["w4a4", "w2a4", "w4a4 in groups"]
)
def test_a_model_trained_in_torch_quantizes_to_the_same_integers_in_keras(recipe: Any) -> None:
    qmodel = trained_in_torch(recipe)
    handed = handed_to_keras(qmodel, recipe)
    total = different = tied = 0
    for name, wrapper in wrappers(qmodel).items():
        quantizer = torch_quantizers(qmodel)[f"{name}.weights_quantizers.weight"]
        axes = TO_KERAS[name]
        scale = scales_of(quantizer, wrapper.layer.weight.shape).transpose(axes)
        found = to_numpy(wrappers(handed)[name].get_quantized_weights()[kernel_of(name)])
        expected = wrapper.get_quantized_weights()["weight"].detach().numpy().transpose(axes)
        weights = wrapper.layer.weight.detach().numpy().transpose(axes)
        same = codes(found, scale) == codes(expected, scale)
        at_ties = ties(weights, np.broadcast_to(scale, weights.shape))
        assert (same | at_ties).all(), name
        assert np.array_equal(found[same], expected[same])
        total, different, tied = total + same.size, different + int((~same).sum()), tied + int(at_ties.sum())
    print(f"{different} of {total} integers differ; {tied} weights are exact ties")  # noqa: T201 - the measurement, with -s
    assert different <= tied
    assert total == 3 * 32 * 9 + 32 * 9 + 32 * 24 * 9 + 24 * 10
    described, ours = trainable_torch.describe(qmodel), trainable_keras.describe(handed)
    assert [(row.layer, row.n_bits, row.params) for row in ours.rows] == [
        (row.layer, row.n_bits, row.params) for row in described.rows
    ]


def test_the_handed_model_computes_what_the_trained_one_does() -> None:
    recipe = RECIPES / "w4a4_lsq.yaml"
    qmodel = trained_in_torch(recipe)
    handed = handed_to_keras(qmodel, recipe)
    x = images(50)
    with torch.no_grad():
        expected = qmodel(torch.from_numpy(x)).numpy()
    found = handed.predict(channels_last(x), verbose=0)
    # Sums in another order move a value in its last places, and next to a tie an activation's code by one step of
    # 1/15 of its range; averaged over 64 positions that is far below the spread of the outputs.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_the_same_input_gives_the_same_integers_but_at_exact_ties(grid: str, n_bits: int) -> None:
    config = TrainableQuantizerActivationConfig(
        activation_quantization_method=grid,
        activation_n_bits=n_bits,
        activation_quantization_params=(
            {"range_min": -0.7, "range_max": 1.9} if grid == "UNIFORM" else {"threshold": 1.3}
        ),
    )
    ours = get_trainable_quantizer_class("Activation", "STE", grid, backend=BACKEND)(config)
    theirs = get_trainable_quantizer_class("Activation", "STE", grid, backend="torch")(config)
    for quantizer in (ours, theirs):
        quantizer.initialize_quantization(None, "x", None)
    grid_numbers = ours.current_qparams()
    random = np.random.default_rng(n_bits).normal(size=100_000).astype(np.float32)
    halves = (np.arange(-(2.0**n_bits), 2.0**n_bits) + 0.5).astype(
        np.float32
    ) * grid_numbers.scale  # ties, mostly exact
    x = np.concatenate([random, halves])
    found, expected = to_numpy(ours(tf.constant(x))), theirs(torch.from_numpy(x)).detach().numpy()
    same, at_ties = found == expected, ties(x, np.broadcast_to(grid_numbers.scale, x.shape))
    assert (same | at_ties).all()
    assert (np.abs(codes(found, grid_numbers.scale) - codes(expected, grid_numbers.scale)) <= 1).all()
    assert not same.all()  # the two tie rules are two
    assert np.array_equal(found, affine.fake_quantize(x, grid_numbers, tie_rule=TieRule.HALF_UP))
    assert np.array_equal(expected, affine.fake_quantize(x, grid_numbers, tie_rule=TieRule.HALF_EVEN))


def test_calibration_gives_the_same_numbers_in_both() -> None:
    recipe = {
        "weights": {"method": "UNIFORM", "n_bits": 4, "training_method": "STE"},
        "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"},
        "calibration": {"weights": "mse", "activations": "percentile"},
    }
    torch.manual_seed(0)
    theirs = nn.Sequential(OrderedDict(fc=nn.Linear(6, 5)))
    ours = keras.Sequential([keras.Input((6,)), kl.Dense(5, name="fc")])
    ours.layers[0].kernel.assign(theirs.fc.weight.detach().numpy().T)
    x = images(6)[:, :, :2, :1].reshape(-1, 6)
    one = trainable_torch.describe(
        trainable_torch.calibrate(trainable_torch.wrap(theirs, recipe), [torch.from_numpy(x)])
    )
    other = trainable_keras.describe(trainable_keras.calibrate(trainable_keras.wrap(ours, recipe), [x]))
    assert sorted((row.target, row.params) for row in one.rows) == sorted(
        (row.target, row.params) for row in other.rows
    )


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Return the description of a small model of PyTorch's."""
    torch.manual_seed(0)
    qmodel = trainable_torch.wrap(nn.Sequential(OrderedDict(fc=nn.Linear(4, 3))), RECIPES / "w4a4_lsq.yaml")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return trainable_torch.describe(trainable_torch.calibrate(qmodel, [torch.from_numpy(x)])).to_dict()


def dense(units: int = 3, name: str = "fc", recipe: Any = RECIPES / "w4a4_lsq.yaml") -> keras.Model:
    return trainable_keras.wrap(keras.Sequential([keras.Input((4,)), kl.Dense(units, name=name)]), recipe)


MISFITS: dict[str, tuple[Any, str]] = {
    "other channels": (lambda: dense(5), r"fc\.kernel, which needs \(5,\)"),
    "another layer": (lambda: dense(name="other"), "quantizers for fc"),
    "another width": (lambda: dense(recipe=RECIPES / "w2a4_lsq.yaml"), "4 bits for fc.*2"),
}


@pytest.mark.parametrize(("make", "fact"), MISFITS.values(), ids=MISFITS)
def test_a_document_that_does_not_fit_is_refused_and_changes_nothing(
    make: Any, fact: str, document: dict[str, Any]
) -> None:
    qmodel = make()
    with pytest.raises(DocumentError, match=fact):
        set_described_params(quantizers_of(qmodel).values(), document)
    assert {row.state for row in trainable_keras.describe(qmodel).rows} == {"not calibrated"}


@pytest.mark.parametrize("given", [{}, {"schema_version": 2, "rows": []}, None])
def test_what_is_no_description_is_refused(given: Any) -> None:
    with pytest.raises(DocumentVersionError):
        set_described_params([], given)


def test_a_document_goes_back_to_torch(document: dict[str, Any]) -> None:
    qmodel = trainable_torch.wrap(nn.Sequential(OrderedDict(fc=nn.Linear(4, 3))), RECIPES / "w4a4_lsq.yaml")
    set_described_params(torch_quantizers(qmodel).values(), document)
    assert trainable_torch.describe(qmodel).to_dict() == document
