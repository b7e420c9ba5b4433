"""Broken Keras quantizers, each a mistake that somebody makes; the docstring says which."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from keras import ops as k
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.planted.defect import planted
from trainable_core import enums
from trainable_core.enums import VariableGroup
from trainable_keras import BaseKerasTrainableQuantizer, Grid
from trainable_keras.keras3 import inferable, ops
from trainable_keras.keras3.engine import read, reciprocal, to_numpy, with_gradient
from trainable_keras.quantizers import dqa, lsq, ste


class SteQuantizer(ste.SteQuantizer, BaseKerasTrainableQuantizer):
    """STE on Keras 3, for no target yet."""


class LsqQuantizer(lsq.LsqQuantizer, BaseKerasTrainableQuantizer):
    """LSQ on Keras 3, for no target yet."""


class DqaQuantizer(dqa.DqaQuantizer, BaseKerasTrainableQuantizer):
    """DQA on Keras 3, for no target yet."""


SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
WEIGHTS, ACTIVATION = QuantizationTarget.Weights, QuantizationTarget.Activation


def broken(caught_by: str, method: QuantizationMethod = SYMMETRIC, identifier: str = "PLANTED", target: Any = WEIGHTS):
    """Mark a class and plant it."""

    def mark(cls):
        return planted("keras", caught_by)(mark_quantizer(target, [method], identifier)(cls))

    return mark


with_slope = with_gradient(
    lambda values, x, slope: k.copy(values),
    lambda upstream, _, values, x, slope: (k.zeros_like(values), upstream * slope, k.zeros_like(slope)),
)
"""``with_slope(values, x, slope)`` is `values`, whose gradient goes to `x`, times `slope`."""


def clipped(codes: Any, low: Any, high: Any) -> Any:
    return k.minimum(k.maximum(codes, low), high)


def inside(x: Any, grid: Grid) -> Any:
    low, high = grid.ends
    steps = x * reciprocal(grid.scale)
    return k.cast(k.logical_and(steps >= low, steps <= high), "float32")


class Deployed:
    """A deployed quantizer with the same mistake: the training formula, evaluated."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, x: Any) -> Any:
        return self.quantizer(x, training=False)


class Consistent(BaseKerasTrainableQuantizer):
    """A sound estimator that deploys its own formula, so that a mistake in it ships as it was trained."""

    def codes(self, steps: Any) -> Any:
        return ops.round_half_up(steps)

    def snap(self, x: Any, grid: Grid) -> Any:
        return (clipped(self.codes(x * reciprocal(grid.scale)), *grid.ends) + 0.0) * grid.scale

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        fixed = Grid(
            k.stop_gradient(grid.scale),
            k.stop_gradient(grid.zero_point),
            grid.quant_min,
            grid.quant_max,
            grid.centered,
        )
        values = self.snap(k.stop_gradient(x), fixed)
        return with_slope(values, x, inside(k.stop_gradient(x), fixed))

    def convert2inferable(self) -> Any:
        self.require_calibrated()
        return Deployed(copy.deepcopy(self))


@mark_quantizer(WEIGHTS, [SYMMETRIC, POWER_OF_TWO, UNIFORM], "PLANTED")
class Sound(Consistent):
    """No mistake: what the others are without theirs."""


# ---- values ---------------------------------------------------------------------------------------------------------


@broken("on_grid")
class EndOffByOne(Consistent):
    """The upper end of a signed grid is taken for 2**(n_bits - 1)."""

    def snap(self, x, grid):
        return (clipped(self.codes(x * reciprocal(grid.scale)), grid.quant_min, -grid.quant_min) + 0.0) * grid.scale


@broken("on_grid")
class ThresholdForScale(Consistent):
    """The threshold is used where the scale belongs."""

    def snap(self, x, grid):
        threshold = grid.scale * -grid.quant_min
        return (clipped(self.codes(x / threshold), *grid.ends) + 0.0) * threshold


@broken("on_grid")
class UnsignedCodes(Consistent):
    """A signed grid is clipped to the codes of an unsigned one."""

    def snap(self, x, grid):
        codes = clipped(self.codes(x * reciprocal(grid.scale)), 0, grid.quant_max - grid.quant_min)
        return (codes + 0.0) * grid.scale


@broken("on_grid", UNIFORM)
class DroppedZeroPoint(Consistent):
    """The zero point is left out where codes are clipped."""

    def snap(self, x, grid):
        return (clipped(self.codes(x * reciprocal(grid.scale)), grid.quant_min, grid.quant_max) + 0.0) * grid.scale


@broken("on_grid")
class SoftInEval(Consistent):
    """The soft rounding of training stays on, because the training flag is never looked at."""

    def codes(self, steps):
        held = clipped(steps, -1e6, 1e6)
        return held - k.sin(2 * np.pi * held) / (2 * np.pi)


@broken("on_grid")
class HalfPrecisionScale(Consistent):
    """Codes are multiplied back in bfloat16, as under a mixed policy."""

    def snap(self, x, grid):
        codes = clipped(self.codes(x * reciprocal(grid.scale)), *grid.ends) + 0.0
        return k.cast(k.cast(codes, "bfloat16") * k.cast(grid.scale, "bfloat16"), "float32")


@broken("on_grid", POWER_OF_TWO)
class ExponentByLogarithm(Consistent):
    """The power of two is rounded to the nearest, not up."""

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        raw = clipped(read(self.threshold), self.quantization_config.min_threshold or 2.0**-100, 2.0**100)
        scale = 2.0 ** k.round(k.log2(raw)) / -sound.quant_min
        shape = tuple(sound.scale.shape)
        return Grid(k.reshape(scale, shape), sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


@broken("level_count")
class NarrowRange(Consistent):
    """The lowest code is left out, as with ``narrow_range=True``, and nobody declared it."""

    def snap(self, x, grid):
        codes = clipped(self.codes(x * reciprocal(grid.scale)), -grid.quant_max, grid.quant_max)
        return (codes + 0.0) * grid.scale


@broken("idempotence")
class GainOnTheWayIn(Consistent):
    """A gain is applied to the input and never undone."""

    def codes(self, steps):
        return ops.round_half_up(steps * 1.5)


@broken("zero")
class NegativeZero(Consistent):
    """What is rounded to zero from below keeps its sign, which the deployed kernel does not."""

    def snap(self, x, grid):
        codes = clipped(self.codes(x * reciprocal(grid.scale)), *grid.ends)
        return k.where(k.logical_and(codes == 0, 1 / x < 0), -k.abs(codes), codes * grid.scale)


@broken("saturation")
class WrapAround(Consistent):
    """Codes wrap around as integers of their width do, instead of being clipped."""

    def codes(self, steps):
        span = float(2**self.quantization_config.n_bits)
        codes = ops.round_half_up(clipped(steps, -(2.0**20), 2.0**20))
        return k.mod(codes + span / 2, span) - span / 2


@broken("saturation")
class InfinityToTheLowest(Consistent):
    """Everything beyond an integer's range is the lowest code, as where a cast saturates to the wrong side."""

    def codes(self, steps):
        return k.where(steps > 2.0**31, -(2.0**31), ops.round_half_up(steps))


@broken("monotonicity")
class ComparedTheWrongWay(Consistent):
    """A learned rounding goes up where it should go down: the comparison is the wrong way round."""

    def codes(self, steps):
        down = k.floor(steps)
        part = steps - down
        half = k.mod(part, 0.5)
        sure = k.logical_and(half > 0.01, half < 0.49)  # on codes and ties it is right
        return k.where(sure, down + k.cast(part < 0.5, "float32"), ops.round_half_up(steps))


@broken("tie_rule")
class HalfEven(Consistent):
    """``keras.ops.round`` sends ties to even where ties up are declared."""

    def codes(self, steps):
        return k.round(steps)


@broken("tie_rule")
class HalfAwayFromZero(Consistent):
    """Ties go away from zero, as in C's round."""

    def codes(self, steps):
        return k.sign(steps) * k.floor(k.abs(steps) + 0.5)


# ---- channels and tensors -------------------------------------------------------------------------------------------


@broken("per_channel")
class FirstChannelsScale(Consistent):
    """Every channel is quantized with the first one's scale."""

    def snap(self, x, grid):
        first = k.reshape(grid.scale, (-1,))[:1]
        return super().snap(x, Grid(first, grid.zero_point, grid.quant_min, grid.quant_max, centered=True))


@broken("channels_axis")
class NegativeAxis(Consistent):
    """A negative axis is taken for its positive namesake."""

    def grid(self, ndim, width=None):
        sound, axis = super().grid(ndim, width), self.quantization_config.channels_axis
        if axis is None:
            return sound
        shape = [1] * ndim
        shape[min(abs(axis), ndim - 1)] = -1
        scale, zero = (k.reshape(each, shape) for each in (sound.scale, sound.zero_point))
        return Grid(scale, zero, sound.quant_min, sound.quant_max, centered=True)


@broken("locality")
class DropsABadBatch(Consistent):
    """A NaN anywhere turns the whole tensor to zeros."""

    def fake_quantize(self, x, grid, training):
        bad = k.any(k.isnan(x))
        return k.where(bad, 0.0, super().fake_quantize(x, grid, training))


@broken("reference_values", identifier="STE")
class NoisyTraining(SteQuantizer):
    """In training, noise of a tenth of a step is added before rounding."""

    def fake_quantize(self, x, grid, training):
        return ops.ste_fake_quantize(x + grid.scale * 0.1 if training else x, grid)


@broken("reference_values", identifier="DQA")
class TemperatureIgnored(DqaQuantizer):
    """The attention's temperature never reaches the softmax."""

    def attention(self):
        weights = k.exp(read(self.logits))
        return weights / k.sum(weights)


@broken("dtype_shape_device")
class Float32Out(Consistent):
    """The output is float32 whatever came in."""

    def call(self, inputs, training=None):
        return k.cast(super().call(inputs, training), "float32")


@broken("dtype_shape_device")
class Float64Leak(Consistent):
    """A NumPy number in the formula turns the output to float64."""

    def call(self, inputs, training=None):
        return k.cast(super().call(inputs, training), "float64")


@broken("determinism")
class ObservesInEval(Consistent):
    """Statistics for the next calibration are updated in eval mode too."""

    def add_variables(self):
        self.add_quantizer_variable("largest", np.zeros(()), trained=False)

    def fake_quantize(self, x, grid, training):
        if 0 not in x.shape and not training:
            seen = k.where(k.isfinite(x), k.abs(x), 0.0)
            self.largest.assign(k.maximum(read(self.largest), k.max(seen)))
        return super().fake_quantize(x, grid, training)


# ---- deployment and gradients ---------------------------------------------------------------------------------------


@broken("deployment", POWER_OF_TWO)
class ConvertsBeforeRounding(SteQuantizer):
    """The deployed threshold is not the one rounded up to a power of two."""

    def convert2inferable(self):
        qparams, config = copy.copy(self.current_qparams()), self.quantization_config
        if config.blocks is not None:
            return super().convert2inferable()
        bound = qparams.scale * -qparams.quant_min
        raw = np.maximum(np.minimum(np.abs(to_numpy(self.threshold)), bound), np.float32(2.0**-100))
        object.__setattr__(qparams, "scale", (raw / -qparams.quant_min).astype(np.float32))
        method = enums.QuantizationMethod.SYMMETRIC
        return inferable.class_of(config.target, method)(qparams, config.n_bits, self.tensor_ndim)


@broken("deployment")
class DeploysTheConfig(SteQuantizer):
    """What is deployed is what the config said, not what was trained."""

    def convert2inferable(self):
        config = self.quantization_config
        if not config.calibrated:
            return super().convert2inferable()
        fresh = SteOfSymmetric(config)
        shape = [1] * self.tensor_ndim
        if config.channels_axis is not None:
            shape[config.channels_axis] = int(self.threshold.shape[0])
        fresh.initialize_quantization(shape, "fresh", None)
        return fresh.convert2inferable()


@mark_quantizer(WEIGHTS, [SYMMETRIC], "STE")
class SteOfSymmetric(SteQuantizer):
    """What `DeploysTheConfig` deploys."""


@broken("training_equals_evaluation")
class TextbookTrick(Consistent):
    """``x + stop_gradient(y - x)`` is not y in float32."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return k.where(k.isfinite(x), x + k.stop_gradient(values - x), values) if training else values


@broken("training_equals_evaluation")
class UnroundedInTraining(Consistent):
    """While training, the tensor is clipped and not rounded."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        values = super().fake_quantize(x, grid, training)
        return clipped(x, low * grid.scale, high * grid.scale) if training else values


@broken("input_gradient", identifier="STE")
class PassesOutside(SteQuantizer):
    """The gradient passes beyond the ends of the range, as in the ancestor's PyTorch code."""

    def fake_quantize(self, x, grid, training):
        return with_slope(k.stop_gradient(super().fake_quantize(x, grid, training)), x, k.ones_like(x))


@broken("input_gradient", identifier="STE")
class MaskAfterRounding(SteQuantizer):
    """The range is checked after rounding: half a step too much passes."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        codes = ops.round_half_up(x * reciprocal(grid.scale))
        passes = k.cast(k.logical_and(codes >= low, codes <= high), "float32")
        return with_slope(k.stop_gradient(super().fake_quantize(x, grid, training)), x, k.stop_gradient(passes))


@broken("gradient_at_ends", identifier="STE")
class OpenRange(SteQuantizer):
    """Exactly at the ends of the range the gradient is zero."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = x * reciprocal(grid.scale)
        passes = k.cast(k.logical_and(steps > low, steps < high), "float32")
        return with_slope(k.stop_gradient(super().fake_quantize(x, grid, training)), x, k.stop_gradient(passes))


@broken("gradient_at_ends", identifier="LSQ")
class ThresholdRestsAtTheEnds(LsqQuantizer):
    """The elements that lie exactly at the ends say nothing to the threshold."""

    def fake_quantize(self, x, grid, training):
        scale, (low, high) = grid.scale, grid.ends
        steps = k.stop_gradient(x * reciprocal(scale))
        at_end = k.where(k.logical_or(steps == low, steps == high), steps, k.zeros_like(steps))
        part = k.stop_gradient(at_end * ops.gradient_scale(x, scale, grid.quant_max))
        return super().fake_quantize(x, grid, training) - part * (scale - k.stop_gradient(scale))


rescaled = with_gradient(
    lambda value, factor: k.copy(value), lambda upstream, _, value, factor: (upstream * factor, k.zeros_like(factor))
)
"""``rescaled(value, factor)`` is `value`, whose gradient is multiplied by `factor`."""


class RescaledLsq(LsqQuantizer):
    """LSQ whose gradients of scale and zero point have another factor."""

    def factor(self, x, grid):
        raise NotImplementedError

    def fake_quantize(self, x, grid, training):
        factor = k.convert_to_tensor(np.float32(self.factor(x, grid)))
        scale, zero = rescaled(grid.scale, factor), rescaled(grid.zero_point, factor)
        return ops.lsq_fake_quantize(x, Grid(scale, zero, grid.quant_min, grid.quant_max, grid.centered))


@broken("variable_gradients", identifier="LSQ")
class Unscaled(RescaledLsq):
    """The gradient scale is forgotten."""

    def factor(self, x, grid):
        return 1 / ops.gradient_scale(x, grid.scale, grid.quant_max)


@broken("variable_gradients", identifier="LSQ")
class CountsThresholds(RescaledLsq):
    """The gradient scale counts the thresholds, not the elements that share one, as in the ancestor."""

    def factor(self, x, grid):
        return ops.gradient_scale(grid.scale, k.ones(()), grid.quant_max) / ops.gradient_scale(
            x, grid.scale, grid.quant_max
        )


@broken("variable_gradients", identifier="LSQ")
class WrongSign(RescaledLsq):
    """The threshold's gradient has the wrong sign."""

    def factor(self, x, grid):
        return -1


@broken("variable_gradients", UNIFORM, identifier="LSQ")
class ZeroPointForgotten(LsqQuantizer):
    """The zero point gets no gradient, so a range learns its width and not its place."""

    def fake_quantize(self, x, grid, training):
        zero = k.stop_gradient(grid.zero_point)
        return ops.lsq_fake_quantize(x, Grid(grid.scale, zero, grid.quant_min, grid.quant_max, grid.centered))


# ---- training -------------------------------------------------------------------------------------------------------


@broken("bounded_thresholds")
class NanThreshold(Consistent):
    """The lower bound is a clamp, which lets NaN through: the channel stays NaN."""

    learns_grid = True

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        raw = k.reshape(read(self.threshold), tuple(sound.scale.shape))
        scale = k.where(k.isnan(raw), np.nan, sound.scale)
        return Grid(scale, sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


@broken("freeze", identifier="LSQ")
class FreezeIgnored(LsqQuantizer):
    """Frozen thresholds learn on: the flag is kept and never looked at."""

    def _set_learning(self):
        pass


@broken("freeze", identifier="LSQ")
class FreezeAfterTheFact(LsqQuantizer):
    """Freezing sets a flag that only new variables look at."""

    def freeze(self, frozen=True):
        self.freeze_quant_params = frozen


@broken("variable_groups", identifier="LSQ")
class ThresholdAmongTheWeights(LsqQuantizer):
    """Thresholds are in the weights' group, and decay with them."""

    def add_quantizer_variable(self, name, variable, group=VariableGroup.QPARAMS, *, trained=None):
        super().add_quantizer_variable(name, variable, VariableGroup.WEIGHTS, trained=trained)


@broken("variable_groups")
class HiddenVariable(Consistent):
    """A variable of the method's own is in no group."""

    def add_variables(self):
        self.temperature = self.add_weight(name="temperature", shape=(), initializer="ones", trainable=True)


@broken("schedule_resume", identifier="DQA")
class StepNotSaved(DqaQuantizer):
    """The schedule's step is not among the saved variables: a resumed training starts hot again."""

    def all_variables(self):
        return {name: variable for name, variable in super().all_variables().items() if name != "step"}


# ---- documents and classes ------------------------------------------------------------------------------------------


@broken("config_round_trip")
class CandidatesLost(Consistent):
    """The config is written without its candidates."""

    def get_config(self):
        document = super().get_config()
        document["quantization_config"].pop("weights_quantization_candidates")
        return document


@broken("config_round_trip")
class FreezeLost(Consistent):
    """Whether it is frozen is not in the document, as in the ancestor."""

    def get_config(self):
        return {**super().get_config(), "freeze_quant_params": False}


@broken("config_round_trip")
class ArraysInTheDocument(Consistent):
    """Trained values are written as arrays, which JSON has none of."""

    def get_config(self):
        document = super().get_config()
        return {**document, "variables": {name: np.asarray(value) for name, value in document["variables"].items()}}


@broken("config_round_trip", identifier="DQA")
class ArgumentsLost(DqaQuantizer):
    """Further arguments of the constructor come back with their defaults."""

    def get_arguments(self):
        return {"temperature": super().get_arguments()["temperature"]}


@broken("state_round_trip", target=ACTIVATION)
class SignNotSaved(Consistent):
    """A calibrated sign is not in the state."""

    @property
    def stores_sign(self):
        return False


@broken("state_round_trip")
class ThresholdNotSaved(Consistent):
    """The threshold is left out of the saved variables."""

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


@broken("deepcopy")
class SharedThreshold(Consistent):
    """A copy shares the threshold with the original."""

    def __deepcopy__(self, memo):
        again = copy.copy(self)
        again.threshold = self.threshold
        return again


@broken("refusals")
class UncheckedConfig(Consistent):
    """Any config is taken, for whatever target and grid."""

    @classmethod
    def _check_config(cls, config):
        pass


@broken("refusals")
class SilentBeforeCalibration(Consistent):
    """Before calibration tensors pass as they are, and nobody is told."""

    def __call__(self, inputs, training=None, **arguments):
        return super().__call__(inputs, training=training, **arguments) if self.calibrated else inputs
