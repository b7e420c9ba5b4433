"""The deployed quantizers: mctq's stock classes on finite numbers, and each of their faults mended."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mct_quantizers.pytorch import quantizers as mctq

from tests.strategies import GRIDS, float32s, inputs, min_thresholds, n_bits, shapes
from tests.torch.strategies import DTYPES, assert_same_bits
from trainable_core import qparams
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import QParams
from trainable_core.reference import affine, ste
from trainable_torch import inferable

SYMMETRIC, POWER_OF_TWO, UNIFORM = GRIDS
SHORT = {SYMMETRIC: "Symmetric", POWER_OF_TWO: "POT", UNIFORM: "Uniform"}

every_class = pytest.mark.parametrize(
    ("target", "method"),
    [(target, method) for target in QuantizationTarget for method in GRIDS],
    ids=[f"{target}-{method}" for target in QuantizationTarget for method in GRIDS],
)
every_weights_class = pytest.mark.parametrize("method", GRIDS, ids=str)
every_grid = every_weights_class


def stock(quantizer: Any, method: QuantizationMethod) -> Any:
    """Return mctq's own class, built from nothing but what its user would be given."""
    params = {key: value if isinstance(value, list) else [value] for key, value in quantizer.params.items()}
    signed = params.pop(SIGNED, None)
    names = {THRESHOLD: "threshold", RANGE_MIN: "min_range", RANGE_MAX: "max_range"}
    arguments: dict[str, Any] = {names[key]: value for key, value in params.items()}
    target = quantizer.quantization_target.name
    if target == "Weights":
        arguments |= {"per_channel": quantizer.per_channel, "channel_axis": quantizer.channel_axis}
    elif signed is not None:
        arguments |= {"signed": signed[0]}
    return getattr(mctq, f"{target}{SHORT[method]}InferableQuantizer")(num_bits=quantizer.num_bits, **arguments)


@st.composite
def deployed(draw: Any, target: QuantizationTarget, method: QuantizationMethod, shape: tuple[int, ...]) -> Any:
    """Return a deployed quantizer for a tensor of this shape, made from any variables, and its grid."""
    weights = target is QuantizationTarget.Weights
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0] if weights else []
    axis = draw(st.sampled_from([None, *axes]))
    size = 1 if axis is None else shape[axis]
    bits = draw(n_bits)
    grid = qparams.from_variables(
        {
            name: draw(float32s(size)).reshape(() if axis is None else (size,))
            for name in qparams.variable_names(method)
        },
        method,
        bits,
        signed=weights or draw(st.booleans()),
        min_threshold=draw(min_thresholds),
        channels_axis=axis,
    )
    return inferable.build(target, method, bits, grid, len(shape) if weights else 0), grid


def simple(target: QuantizationTarget, method: QuantizationMethod, *, bits: int = 4, threshold: float = 1.0) -> Any:
    variables = {RANGE_MIN: -threshold, RANGE_MAX: threshold} if method is UNIFORM else {THRESHOLD: threshold}
    return inferable.build(target, method, bits, qparams.from_variables(variables, method, bits), 1)


def per_channel(method: QuantizationMethod, *, bits: int = 4) -> Any:
    ends = np.float32([1.0, 2.0])
    variables = {RANGE_MIN: -ends, RANGE_MAX: ends} if method is UNIFORM else {THRESHOLD: ends}
    grid = qparams.from_variables(variables, method, bits, channels_axis=0)
    return inferable.build(QuantizationTarget.Weights, method, bits, grid, 2)


# ---- as mctq's ------------------------------------------------------------------------------------------------------


@every_class
@given(st.data())
def test_finite_values_are_those_of_the_stock_class(
    target: QuantizationTarget, method: QuantizationMethod, data: Any
) -> None:
    shape = data.draw(shapes())
    quantizer, grid = data.draw(deployed(target, method, shape))
    x = data.draw(inputs(grid, shape, nan=False, finite=True))
    # torch's kernels cast to int64 before they clip: up to 2**63 steps
    x = torch.from_numpy(np.where(np.abs(affine.steps(x, grid)) < 2.0**62, x, np.float32(0)))
    expected = stock(quantizer, method)(x.clone())
    assert_same_bits(quantizer(x), expected)


@every_class
@given(st.data())
def test_attributes_are_those_of_the_stock_class(
    target: QuantizationTarget, method: QuantizationMethod, data: Any
) -> None:
    quantizer, _ = data.draw(deployed(target, method, data.draw(shapes())))
    original = stock(quantizer, method)
    assert isinstance(quantizer, type(original))
    assert type(quantizer).__name__ == type(original).__name__
    for name, expected in vars(original).items():
        actual = getattr(quantizer, name)
        if isinstance(expected, torch.Tensor | np.ndarray):
            assert actual.tolist() == expected.tolist(), name
        else:
            assert actual == expected, name


@every_class
@given(st.data())
def test_numbers_come_back_from_the_buffers(target: QuantizationTarget, method: QuantizationMethod, data: Any) -> None:
    quantizer, grid = data.draw(deployed(target, method, data.draw(shapes())))
    back = quantizer.qparams
    assert back.scale.tolist() == grid.scale.tolist()
    assert back.zero_point.tolist() == grid.zero_point.tolist()
    assert (back.quant_min, back.quant_max) == (grid.quant_min, grid.quant_max)
    assert back.channels_axis == grid.channels_axis


# ---- faults of the stock classes ------------------------------------------------------------------------------------
# Each test shows the fault in the stock class first: when mctq mends it, the test says so.


@every_weights_class
def test_plus_infinity_per_channel_saturates_upwards(method: QuantizationMethod) -> None:
    quantizer = per_channel(method)
    x = torch.tensor([[torch.inf, -torch.inf], [torch.inf, -torch.inf]])
    lowest, highest = quantizer(torch.full((2, 2), -9.0)), quantizer(torch.full((2, 2), 9.0))
    assert_same_bits(stock(quantizer, method)(x.clone())[:, 0], lowest[:, 0])
    assert_same_bits(quantizer(x), torch.stack([highest[:, 0], lowest[:, 0]], 1))


def test_uniform_zero_point_is_not_truncated() -> None:
    def wrong(low: float, high: float) -> bool:
        """Return whether the stock class, built from the raw range, misses its lower end by more than rounding may."""
        raw = mctq.WeightsUniformInferableQuantizer(num_bits=8, min_range=[low], max_range=[high], per_channel=False)
        return bool(abs(float(raw(torch.tensor([low]))) - low) > 0.75 * (high - low) / 255)

    ranges = np.random.default_rng(0).uniform(0.1, 3.0, (2000, 2))
    found = [(-float(low), float(high)) for low, high in ranges if wrong(-low, high)]
    assert found  # 85 of 2,000 random ranges on mctq 1.7
    for low, high in found:
        variables = {RANGE_MIN: low, RANGE_MAX: high}
        grid = qparams.from_variables(variables, UNIFORM, 8)
        quantizer = inferable.build(QuantizationTarget.Weights, UNIFORM, 8, grid, 1)
        step = float(grid.scale)
        x = torch.tensor([low, high])
        # half a step by rounding the zero point, and the scale's rounding up, below 255 * 2**-15 of a step
        assert (quantizer(x) - x).abs().max() <= 0.51 * step
        assert_same_bits(stock(quantizer, UNIFORM)(x.clone()), quantizer(x))


@every_class
def test_the_input_goes_on_needing_its_gradient(target: QuantizationTarget, method: QuantizationMethod) -> None:
    quantizer = simple(target, method)
    x = torch.linspace(-2.0, 2.0, 9).requires_grad_()
    y = quantizer(x)
    assert x.requires_grad
    assert y.requires_grad == (target is QuantizationTarget.Activation)  # deployed weights are constants
    with torch.no_grad():
        assert not quantizer(x).requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *(("backward", dtype) for dtype in DTYPES),
        *((way, torch.float32) for way in ("in a function", "vectorized", "forward", "compiled")),
    ],
    ids=str,
)
@every_grid
def test_gradients_of_activations_pass_inside_the_range(
    method: QuantizationMethod, way: str, dtype: torch.dtype
) -> None:
    """As STE's: powers of two, so that quotients are exact and the ends themselves are among the inputs."""
    grid = qparams.from_variables(
        {RANGE_MIN: -1.0, RANGE_MAX: 2.75} if method is UNIFORM else {THRESHOLD: 1.0}, method, 4, signed=True
    )
    quantizer = inferable.build(QuantizationTarget.Activation, method, 4, grid, 0)
    x = torch.linspace(-4.0, 4.0, 65)
    upstream = torch.arange(65.0) - 30
    expected = torch.from_numpy(ste.gradients(x.numpy(), upstream.numpy(), grid).x).to(dtype)
    given, up = x.to(dtype).requires_grad_(), upstream.to(dtype)
    if way == "forward":
        value, found = torch.func.jvp(quantizer, (given.detach(),), (up,))
    elif way == "in a function":
        value, pull = torch.func.vjp(quantizer, given.detach())
        (found,) = pull(up)
    elif way == "vectorized":
        value = quantizer(given)
        found = torch.vmap(torch.func.grad(lambda each, factor: quantizer(each) * factor))(given.detach(), up)
    else:
        called = torch.compile(quantizer, backend="aot_eager", fullgraph=True) if way == "compiled" else quantizer
        value = called(given)
        (found,) = torch.autograd.grad(value, given, up)
    assert_same_bits(value.detach(), quantizer(x.to(dtype)))
    assert torch.equal(found, expected)


@every_class
def test_nan_stays_nan(target: QuantizationTarget, method: QuantizationMethod) -> None:
    assert simple(target, method)(torch.tensor([torch.nan, 0.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_class
def test_every_dtype_is_computed_in_float32(
    target: QuantizationTarget, method: QuantizationMethod, dtype: torch.dtype
) -> None:
    quantizer = simple(target, method)
    x = torch.linspace(-2.0, 2.0, 41, dtype=dtype)
    assert_same_bits(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_class
def test_casting_the_model_leaves_the_numbers_alone(
    target: QuantizationTarget, method: QuantizationMethod, dtype: torch.dtype
) -> None:
    quantizer, x = simple(target, method, threshold=0.3), torch.linspace(-2.0, 2.0, 41)
    cast = copy.deepcopy(quantizer).to(dtype)
    assert {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
    assert_same_bits(cast(x), quantizer(x))


# ---- module life ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_class
def test_copies_are_whole_and_stand_on_their_own(
    target: QuantizationTarget, method: QuantizationMethod, way: str
) -> None:
    quantizer, x = simple(target, method), torch.linspace(-2.0, 2.0, 41)
    twin = copy.deepcopy(quantizer) if way == "deepcopy" else pickle.loads(pickle.dumps(quantizer))  # noqa: S301 - ours
    before = quantizer(x)
    assert_same_bits(twin(x), before)
    twin.grid_scale.mul_(2.0)
    assert_same_bits(quantizer(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("assign", [False, True])
@every_class
def test_a_state_is_the_whole_quantizer(target: QuantizationTarget, method: QuantizationMethod, assign: bool) -> None:
    x = torch.linspace(-3.0, 3.0, 41)
    quantizer, other = simple(target, method, bits=3, threshold=2.0), simple(target, method, bits=8)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert_same_bits(other(x), quantizer(x))
    assert other.params == quantizer.params


@pytest.mark.parametrize("assign", [False, True])
@every_class
def test_mctq_s_attributes_follow_a_loaded_state(
    target: QuantizationTarget, method: QuantizationMethod, assign: bool
) -> None:
    quantizer, other = simple(target, method, bits=3, threshold=2.0), simple(target, method, bits=8)
    other.load_state_dict(quantizer.state_dict(), assign=assign)
    x = torch.linspace(-3.0, 3.0, 41)
    assert other.num_bits == 3
    assert_same_bits(type(other).__mro__[2].__call__(other, x.clone()), quantizer(x))  # mctq's own call, as its export
    if method is UNIFORM:
        assert float(other.max_range) == quantizer.params[RANGE_MAX]
    else:
        assert np.asarray(other.threshold_np).tolist() == np.asarray(quantizer.threshold_np).tolist()


@pytest.mark.parametrize("method", GRIDS[:2], ids=str)
def test_a_loaded_state_brings_its_sign(method: QuantizationMethod) -> None:
    unsigned = inferable.build(
        QuantizationTarget.Activation,
        method,
        4,
        qparams.from_variables({THRESHOLD: 1.0}, method, 4, signed=False),
        0,
    )
    other = simple(QuantizationTarget.Activation, method)
    assert other.signed
    other.load_state_dict(unsigned.state_dict())
    assert not other.signed
    assert (other.min_quantized_domain, other.max_quantized_domain) == (0, 15)


@every_class
def test_a_quantizer_without_memory_takes_its_numbers_from_a_state(
    target: QuantizationTarget, method: QuantizationMethod
) -> None:
    quantizer, x = simple(target, method, threshold=2.0), torch.linspace(-3.0, 3.0, 41)
    empty = simple(target, method).to("meta")
    assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
    empty.load_state_dict(quantizer.state_dict(), assign=True)
    assert_same_bits(empty(x), quantizer(x))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@every_weights_class
def test_any_channel_axis(method: QuantizationMethod, axis: int) -> None:
    shape = (2, 3, 4)
    ends = np.linspace(0.5, 2.0, shape[axis]).astype(np.float32)
    variables = {RANGE_MIN: -ends, RANGE_MAX: 2 * ends} if method is UNIFORM else {THRESHOLD: ends}
    grid = qparams.from_variables(variables, method, 4, channels_axis=axis)
    quantizer = inferable.build(QuantizationTarget.Weights, method, 4, grid, 3)
    x = torch.linspace(-3.0, 3.0, 24).view(shape)
    assert quantizer.channel_axis == axis % 3
    assert_same_bits(quantizer(x), torch.from_numpy(affine.fake_quantize(x.numpy(), grid)))
    assert_same_bits(quantizer(x), stock(quantizer, method)(x.clone()))


def test_one_channel_is_still_a_channel() -> None:
    grid = QParams(np.float32([0.5]), np.int32([0]), -8, 7, 0)
    quantizer = inferable.build(QuantizationTarget.Weights, SYMMETRIC, 4, grid, 2)
    assert quantizer.per_channel
    assert quantizer.params[THRESHOLD] == [4.0]
    assert quantizer.qparams.scale.shape == (1,)


# torch.jit is deprecated, but mctq exports through it; its tracer warns that numbers become constants, as they should
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_class
def test_mctq_s_operator_is_taken_only_while_exporting(target: QuantizationTarget, method: QuantizationMethod) -> None:
    x = torch.linspace(-3.0, 3.0, 41)

    def operators(quantizer: Any) -> set[str]:
        return {node.kind() for node in torch.jit.trace(quantizer, x, check_trace=False).graph.nodes()}

    quantizer = simple(target, method)
    assert "prim::PythonOp" not in operators(quantizer)
    before = quantizer(x)
    quantizer.enable_custom_impl()
    assert_same_bits(quantizer(x), before)
    assert "prim::PythonOp" in operators(quantizer)
