"""Broken PyTorch quantizers, each a mistake that somebody makes; the docstring says which."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from torch import Tensor, nn

from tests.planted.defect import planted
from trainable_core import enums
from trainable_core.enums import VariableGroup
from trainable_core.reference import lsq
from trainable_torch import BasePytorchTrainableQuantizer, Grid, granularity, inferable, ops
from trainable_torch import grid as grids
from trainable_torch.quantizers.dqa import DqaQuantizer
from trainable_torch.quantizers.lsq import LsqQuantizer
from trainable_torch.quantizers.ste import SteQuantizer

SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
WEIGHTS, ACTIVATION = QuantizationTarget.Weights, QuantizationTarget.Activation


def broken(caught_by: str, method: QuantizationMethod = SYMMETRIC, identifier: str = "PLANTED", target: Any = WEIGHTS):
    """Mark a class and plant it."""

    def mark(cls):
        return planted("torch", caught_by)(mark_quantizer(target, [method], identifier)(cls))

    return mark


class WithGradient(torch.autograd.Function):
    """Values of the sound formula, another gradient."""

    @staticmethod
    def forward(ctx, values, x, slope):
        ctx.save_for_backward(slope)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, upstream * ctx.saved_tensors[0], None


class Deployed:
    """A deployed quantizer with the same mistake: the training formula, evaluated."""

    def __init__(self, quantizer: nn.Module) -> None:
        self.quantizer = quantizer.eval()

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantizer(x, False)


class Consistent(BasePytorchTrainableQuantizer):
    """A sound estimator that deploys its own formula, so that a mistake in it ships as it was trained."""

    def codes(self, steps: Tensor) -> Tensor:
        return steps.round()

    def snap(self, x: Tensor, grid: Grid) -> Tensor:
        low, high = grid.ends
        return (self.codes(x * grid.scale.reciprocal()).clamp(low, high) + 0.0) * grid.scale

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:
        steps = x.detach() * grid.scale.detach().reciprocal()
        low, high = grid.ends
        inside = ((steps >= low) & (steps <= high)).float()
        return WithGradient.apply(self.snap(x.detach(), grid), x, inside)

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
        codes = (x * grid.scale.reciprocal()).round().clamp(grid.quant_min, -grid.quant_min)
        return (codes + 0.0) * grid.scale


@broken("on_grid")
class ThresholdForScale(Consistent):
    """The threshold is used where the scale belongs."""

    def snap(self, x, grid):
        threshold = grid.scale * -grid.quant_min
        return ((x / threshold).round().clamp(grid.quant_min, grid.quant_max) + 0.0) * threshold


@broken("on_grid")
class UnsignedCodes(Consistent):
    """A signed grid is clipped to the codes of an unsigned one."""

    def snap(self, x, grid):
        codes = (x * grid.scale.reciprocal()).round().clamp(0, grid.quant_max - grid.quant_min)
        return (codes + 0.0) * grid.scale


@broken("on_grid", UNIFORM)
class DroppedZeroPoint(Consistent):
    """The zero point is left out where codes are clipped."""

    def snap(self, x, grid):
        codes = (x * grid.scale.reciprocal()).round().clamp(grid.quant_min, grid.quant_max)
        return (codes + 0.0) * grid.scale


@broken("on_grid")
class SoftInEval(Consistent):
    """The soft rounding of training stays on when the model is evaluated."""

    def codes(self, steps):
        return steps - torch.sin(2 * torch.pi * steps.nan_to_num(0, 0, 0)) / (2 * torch.pi)


@broken("on_grid")
class HalfPrecisionScale(Consistent):
    """Codes are multiplied back in half precision, as autocast would."""

    def snap(self, x, grid):
        codes = (x * grid.scale.reciprocal()).round().clamp(grid.quant_min, grid.quant_max) + 0.0
        return (codes.bfloat16() * grid.scale.bfloat16()).float()


@broken("on_grid", POWER_OF_TWO)
class ExponentByLogarithm(Consistent):
    """The power of two is rounded to the nearest, not up."""

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        threshold = self.threshold.clamp(
            float(grids.qparams.lower_bound(self.quantization_config.min_threshold)), 2.0**100
        )
        scale = torch.exp2(torch.log2(threshold).round()) / -sound.quant_min
        return Grid(scale.reshape(sound.scale.shape), sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


@broken("level_count")
class NarrowRange(Consistent):
    """The lowest code is left out, as kernels for symmetric weights do, and nobody declared it."""

    def snap(self, x, grid):
        codes = (x * grid.scale.reciprocal()).round().clamp(-grid.quant_max, grid.quant_max)
        return (codes + 0.0) * grid.scale


@broken("level_count")
class EvenCodesOnly(Consistent):
    """Steps are rounded in halves of what they should be: every second level is lost."""

    def codes(self, steps):
        return (steps / 2).round() * 2


@broken("on_grid")
class ShortTable(Consistent):
    """Values come from a table with 20 significant bits."""

    def snap(self, x, grid):
        bits = super().snap(x, grid).contiguous().view(torch.int32)
        return ((bits + 8) & ~15).view(torch.float32)


@broken("level_count")
class DeadZone(Consistent):
    """Small values are pruned: the first level on either side of zero is never used."""

    def codes(self, steps):
        pruned = (steps.abs() < 1.5) & (self.quantization_config.n_bits > 2)
        return torch.where(pruned, torch.zeros_like(steps), steps.round())


@broken("idempotence")
class GainOnTheWayIn(Consistent):
    """A gain is applied to the input and never undone."""

    def codes(self, steps):
        return (steps * 1.5).round()


@broken("idempotence")
class DoubledOnTheWayIn(Consistent):
    """Small scales are doubled where the input is divided, and not where the codes are multiplied back."""

    def snap(self, x, grid):
        small = grid.scale * -grid.quant_min < 2.0**-11
        divisor = torch.where(small, 2 * grid.scale, grid.scale)
        return ((x * divisor.reciprocal()).round().clamp(*grid.ends) + 0.0) * grid.scale


@broken("zero")
class NegativeZero(Consistent):
    """What is rounded to zero from below keeps its sign, which the deployed kernel does not."""

    def snap(self, x, grid):
        return (x * grid.scale.reciprocal()).round().clamp(*grid.ends) * grid.scale


@broken("saturation")
class WrapAround(Consistent):
    """Codes are cast to an integer before they are clipped, and wrap around."""

    def codes(self, steps):
        span = 2**self.quantization_config.n_bits
        codes = steps.nan_to_num(0.0).clamp(-(2.0**20), 2.0**20).round()
        return torch.remainder(codes + span // 2, span) - span // 2


@broken("saturation")
class InfinityToTheLowest(Consistent):
    """Everything beyond an integer's range is the lowest code, as in torch's per-channel kernel."""

    def codes(self, steps):
        return torch.where(steps > 2.0**31, -(2.0**31), steps.round())


@broken("monotonicity")
class ComparedTheWrongWay(Consistent):
    """A learned rounding goes up where it should go down: the comparison is the wrong way round."""

    def codes(self, steps):
        down = steps.floor()
        part = steps - down
        sure = (part % 0.5 > 0.01) & (part % 0.5 < 0.49)  # on codes and ties it is right
        return torch.where(sure, down + (part < 0.5), steps.round())


@broken("tie_rule")
class HalfUp(Consistent):
    """Ties go up where ties to even are declared."""

    def codes(self, steps):
        return (steps + 0.5).floor()


@broken("tie_rule")
class HalfAwayFromZero(Consistent):
    """Ties go away from zero, as in C's round."""

    def codes(self, steps):
        return steps.sign() * (steps.abs() + 0.5).floor()


@broken("tie_rule", UNIFORM)
class ZeroPointBeforeRounding(Consistent):
    """The zero point is added before rounding, which turns ties around when it is odd."""

    def snap(self, x, grid):
        codes = (x * grid.scale.reciprocal() + grid.zero_point).round().clamp(grid.quant_min, grid.quant_max)
        return (codes - grid.zero_point + 0.0) * grid.scale


@broken("locality")
class DropsABadBatch(Consistent):
    """A NaN anywhere turns the whole tensor to zeros."""

    def fake_quantize(self, x, grid, training):
        return x * 0.0 + 0.0 if x.isnan().any() else ops.ste_fake_quantize(x, grid)


@broken("reference_values", identifier="STE")
class NoisyTraining(SteQuantizer):
    """In training, noise of a tenth of a step is added before rounding."""

    def fake_quantize(self, x, grid, training):
        return ops.ste_fake_quantize(x + grid.scale * 0.1 if training else x, grid)


@broken("reference_values", identifier="DQA")
class TemperatureIgnored(DqaQuantizer):
    """The attention's temperature never reaches the softmax."""

    def attention(self):
        return torch.softmax(self.logits, 0)


@broken("reference_values", identifier="DQA")
class BiasedMixture(DqaQuantizer):
    """A correction is added to the mixture while it is soft, outside of every gradient."""

    def quantize(self, x, training):
        values = super().quantize(x, training)
        return values + 0.01 if training and self.step <= self.temperature.t_end else values


# ---- channels and tensors -------------------------------------------------------------------------------------------


@broken("per_channel")
class FirstChannelsScale(Consistent):
    """Every channel is quantized with the first one's scale."""

    def snap(self, x, grid):
        first = grid.scale.reshape(-1)[:1] if grid.scale.numel() > 1 else grid.scale
        return super().snap(x, Grid(first, grid.zero_point, grid.quant_min, grid.quant_max, centered=True))


@broken("per_channel", UNIFORM)
class LargestChannelsRange(Consistent):
    """The ends of the widest channel clip all of them."""

    def snap(self, x, grid):
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        if grid.scale.numel() > 1:
            low, high = low.min(), high.max()
        return ((x * grid.scale.reciprocal()).round().clamp(low, high) + 0.0) * grid.scale


@broken("per_block")
class ScatteredGroups(Consistent):
    """A group takes every n-th input, instead of neighbours."""

    def forward(self, inputs, training=None):
        blocks = self.quantization_config.blocks
        if blocks is None or blocks.group_size is None or not inputs.numel():
            return super().forward(inputs, training)
        axis, count = blocks.group_axis, blocks.counts(tuple(inputs.shape))[-1]
        order = torch.arange(inputs.shape[axis]).reshape(-1, count).T.reshape(-1)
        return super().forward(inputs.index_select(axis, order), training).index_select(axis, order.argsort())


@broken("channels_axis")
class AlwaysTheFirstAxis(Consistent):
    """Scales are laid along the first axis, whatever the config says."""

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        if self.quantization_config.channels_axis is None:
            return sound
        shape = [-1] + [1] * (ndim - 1)
        return Grid(
            sound.scale.reshape(shape), sound.zero_point.reshape(shape), sound.quant_min, sound.quant_max, centered=True
        )


@broken("channels_axis")
class NegativeAxis(Consistent):
    """A negative axis is taken for its positive namesake."""

    def grid(self, ndim, width=None):
        sound, axis = super().grid(ndim, width), self.quantization_config.channels_axis
        if axis is None:
            return sound
        shape = [1] * ndim
        shape[min(abs(axis), ndim - 1)] = -1
        return Grid(
            sound.scale.reshape(shape), sound.zero_point.reshape(shape), sound.quant_min, sound.quant_max, centered=True
        )


@broken("channels_axis")
class FirstAxisOnly(Consistent):
    """Scales of channels that are not on the first axis are silently merged into the largest."""

    def snap(self, x, grid):
        if grid.scale.dim() > 1 and grid.scale.numel() > 1 and grid.scale.shape[0] == 1:
            scale = grid.scale.amax().expand_as(grid.scale)
            grid = Grid(scale, grid.zero_point, grid.quant_min, grid.quant_max, centered=True)
        return super().snap(x, grid)


@broken("dtype_shape_device")
class Float32Out(Consistent):
    """The output is float32 whatever came in."""

    def forward(self, inputs, training=None):
        return super().forward(inputs, training).float()


@broken("dtype_shape_device")
class ComputedInTheInputsDtype(Consistent):
    """Half-precision inputs are quantized in half precision."""

    def forward(self, inputs, training=None):
        self.require_calibrated()
        values = self.quantize(self.laid_out(inputs), self.training if training is None else training)
        blocks = self.quantization_config.blocks
        values = values if blocks is None else granularity.tensor_of(values, blocks, tuple(inputs.shape))
        return values.to(inputs.dtype)

    def snap(self, x, grid):
        low, high = grid.ends
        scale = grid.scale.to(x.dtype)
        return (
            ((x / scale).round().clamp(low, high) + 0.0) * scale if x.dtype != torch.float32 else super().snap(x, grid)
        )


@broken("no_mutation")
class ClipsItsInput(Consistent):
    """The input itself is clipped to the range, to save a copy."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        low, high = grid.ends
        with torch.no_grad():
            x.detach().copy_(torch.minimum(torch.maximum(x, low * grid.scale), high * grid.scale))
        return values


@broken("determinism")
class ObservesInEval(Consistent):
    """Statistics for the next calibration are updated in eval mode too."""

    def add_variables(self):
        self.add_quantizer_variable("largest", torch.zeros(()), trained=False)

    def fake_quantize(self, x, grid, training):
        if x.numel() and not training:
            self.largest.copy_(torch.maximum(self.largest, x.detach().abs().nan_to_num(0, 0, 0).max()))
        return super().fake_quantize(x, grid, training)


# ---- gradients ------------------------------------------------------------------------------------------------------


@broken("input_gradient", identifier="STE")
class PassesOutside(SteQuantizer):
    """The gradient passes beyond the ends of the range, as in the ancestor's PyTorch code."""

    def fake_quantize(self, x, grid, training):
        return WithGradient.apply(ops.ste_fake_quantize(x, grid).detach(), x, torch.ones_like(x))


@broken("input_gradient", identifier="STE")
class MaskAfterRounding(SteQuantizer):
    """The range is checked after rounding: half a step too much passes, as in torch's own kernel."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = (x.detach() * grid.scale.reciprocal()).round()
        inside = ((steps >= low) & (steps <= high)).float()
        return WithGradient.apply(ops.ste_fake_quantize(x, grid).detach(), x, inside)


@broken("input_gradient")
class AnotherSurrogate(Consistent):
    """The backward pass is not that of the declared surrogate: the factor of the error has the wrong sign."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = x.detach() * grid.scale.reciprocal()
        slope = ((steps >= low) & (steps <= high)) * (1 + (steps - steps.round()).abs())
        return WithGradient.apply(ops.ste_fake_quantize(x, grid).detach(), x, slope.nan_to_num(0.0))

    def surrogate(self, x, grid, upstream):
        here = x / grid.scale
        slope = 1 - abs(here - here.round())
        return lambda x, grid: slope * (x / grid.scale).clip(grid.quant_min, grid.quant_max) * grid.scale


@broken("input_gradient")
class NoGradientAtZero(Consistent):
    """A norm is differentiated at zero: its gradient is 0 / 0."""

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(x, grid, training) + 0 * x.clamp(-1, 1).abs().sqrt()


@broken("gradient_at_ends", identifier="STE")
class OpenRange(SteQuantizer):
    """Exactly at the ends of the range the gradient is zero."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = x.detach() * grid.scale.reciprocal()
        inside = ((steps > low) & (steps < high)).float()
        return WithGradient.apply(ops.ste_fake_quantize(x, grid).detach(), x, inside)


@broken("gradient_at_ends", identifier="LSQ")
class ClosedRange(LsqQuantizer):
    """Exactly at the ends the input's gradient passes, where the paper counts them as outside."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        low, high = grid.ends
        steps = x.detach() * grid.scale.detach().reciprocal()
        at_end = ((steps == low) | (steps == high)).float()
        return values + WithGradient.apply(torch.zeros_like(x), x, at_end)


@broken("gradient_at_ends", identifier="LSQ")
class ThresholdRestsAtTheEnds(LsqQuantizer):
    """The elements that lie exactly at the ends say nothing to the threshold."""

    def fake_quantize(self, x, grid, training):
        scale, (low, high) = grid.scale, grid.ends
        steps = x.detach() * scale.detach().reciprocal()
        at_end = torch.where((steps == low) | (steps == high), steps, 0.0)
        constant = self.gradient_constant(x.numel() // max(scale.numel(), 1), grid.quant_max)
        return super().fake_quantize(x, grid, training) - at_end * constant * (scale - scale.detach())


@broken("variable_gradients", identifier="LSQ")
class Unscaled(LsqQuantizer):
    """The gradient scale is forgotten."""

    def fake_quantize(self, x, grid, training):
        return ops.lsq_fake_quantize(x, grid, 1.0)


@broken("variable_gradients", identifier="LSQ")
class CountsThresholds(LsqQuantizer):
    """The gradient scale counts the thresholds, not the elements that share one, as in the ancestor."""

    def fake_quantize(self, x, grid, training):
        return ops.lsq_fake_quantize(x, grid, lsq.gradient_scale(grid.scale.numel(), grid.quant_max))


@broken("variable_gradients", identifier="LSQ")
class WrongSign(LsqQuantizer):
    """The threshold's gradient has the wrong sign."""

    def fake_quantize(self, x, grid, training):
        sharing = x.numel() // max(grid.scale.numel(), 1)
        return ops.lsq_fake_quantize(x, grid, -lsq.gradient_scale(sharing, grid.quant_max))


@broken("variable_gradients", UNIFORM, identifier="LSQ")
class ZeroPointForgotten(LsqQuantizer):
    """The zero point gets no gradient, so a range learns its width and not its place."""

    def fake_quantize(self, x, grid, training):
        fixed = Grid(grid.scale, grid.zero_point.detach(), grid.quant_min, grid.quant_max, grid.centered)
        return super().fake_quantize(x, fixed, training)


@broken("variable_gradients", identifier="DQA")
class ConstantAttention(DqaQuantizer):
    """The attention is detached: the logits never learn."""

    def attention(self):
        return super().attention().detach() + 0 * self.logits


# ---- training -------------------------------------------------------------------------------------------------------


@broken("bounded_thresholds")
class NanThreshold(Consistent):
    """The lower bound is a clamp, which lets NaN through."""

    learns_grid = True

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        scale = torch.where(self.threshold.isnan().reshape(sound.scale.shape), torch.nan, sound.scale)
        return Grid(scale, sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


@broken("freeze", identifier="LSQ")
class FreezeIgnored(LsqQuantizer):
    """Frozen thresholds learn on."""

    def add_quantizer_variable(self, name, variable, group=VariableGroup.QPARAMS, *, trained=None):
        super().add_quantizer_variable(name, variable, group, trained=trained)
        getattr(self, name).requires_grad_(True)

    def freeze(self, frozen=True):
        self.freeze_quant_params = frozen


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
class HiddenParameter(Consistent):
    """A parameter of the method's own is in no group."""

    def add_variables(self):
        self.temperature = nn.Parameter(torch.ones(()))


class ForgetfulSchedule(DqaQuantizer):
    """A step that the state does not hold."""

    def add_variables(self):
        super().add_variables()
        del self.step
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)


@broken("schedule_resume", identifier="DQA")
class StepNotSaved(ForgetfulSchedule):
    """The schedule's step is not in the state: a resumed training starts hot again."""


# ---- documents ------------------------------------------------------------------------------------------------------


@broken("config_round_trip")
class CandidatesLost(Consistent):
    """The config is written without its candidates."""

    def get_config(self):
        document = super().get_config()
        document["quantization_config"].pop("weights_quantization_candidates")
        return document


@broken("config_round_trip")
class FreezeLost(Consistent):
    """Whether it is frozen is not in the document."""

    def get_config(self):
        return {**super().get_config(), "freeze_quant_params": False}


@broken("config_round_trip")
class TensorsInTheDocument(Consistent):
    """Trained values are written as tensors, which JSON has none of."""

    def get_config(self):
        return {**super().get_config(), "variables": dict(self.state_dict())}


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
class ThresholdNotPersistent(Consistent):
    """The threshold is a buffer that the state leaves out."""

    def add_quantizer_variable(self, name, variable, group=VariableGroup.QPARAMS, *, trained=None):
        super().add_quantizer_variable(name, variable, group, trained=trained)
        value = getattr(self, name)
        del self._buffers[name]
        self.register_buffer(name, value, persistent=False)


@broken("model_round_trip")
class KeysWithoutPrefix(SteQuantizer):
    """The state's keys lack the layer's prefix: alone it is saved, in a model it is lost."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, "", keep_vars)


@broken("deepcopy")
class KeepsItsOutput(Consistent):
    """The last training output is kept, and can't be copied with its graph, as in mctq's wrapper."""

    def forward(self, inputs, training=None):
        values = super().forward(inputs, training)
        if training:
            self.last = values
        return values

    def convert2inferable(self):
        self.last = None
        return super().convert2inferable()


@broken("deepcopy")
class SharedThreshold(Consistent):
    """A copy shares the threshold with the original."""

    def __deepcopy__(self, memo):
        memo[id(self.threshold)] = self.threshold
        method = type(self).__deepcopy__
        try:
            del type(self).__deepcopy__
            return copy.deepcopy(self, memo)
        finally:
            type(self).__deepcopy__ = method


@broken("deployment", POWER_OF_TWO)
class ConvertsBeforeRounding(SteQuantizer):
    """The deployed threshold is not the one rounded up to a power of two."""

    def convert2inferable(self):
        qparams, config = self.current_qparams(), self.quantization_config
        if config.blocks is not None:
            return super().convert2inferable()
        bound = torch.tensor(qparams.scale * -qparams.quant_min)
        raw = torch.minimum(self.threshold.detach().abs(), bound).clamp_min(2.0**-100)
        object.__setattr__(qparams, "scale", (raw / -qparams.quant_min).numpy())
        return inferable.build(
            config.target, enums.QuantizationMethod.SYMMETRIC, config.n_bits, qparams, self.tensor_ndim
        )


@broken("deployment")
class DeploysTheConfig(SteQuantizer):
    """What is deployed is what the config said, not what was trained."""

    def convert2inferable(self):
        self.require_calibrated()
        fresh = type(self)(self.quantization_config)
        if not self.quantization_config.calibrated:
            return super().convert2inferable()
        channels = self.threshold.numel() if self.threshold.dim() else 1
        shape = [1] * self.tensor_ndim
        if self.quantization_config.channels_axis is not None:
            shape[self.quantization_config.channels_axis] = channels
        fresh.initialize_quantization(shape, "fresh", None)
        return SteQuantizer.convert2inferable(fresh)


@broken("training_equals_evaluation")
class TextbookTrick(Consistent):
    """``x + (y - x).detach()`` is not y in float32."""

    def fake_quantize(self, x, grid, training):
        values = ops.ste_fake_quantize(x, grid).detach()
        return (
            x + (values - x).detach() if training and bool(x.isfinite().all()) else values + 0 * x.nan_to_num(0, 0, 0)
        )


@broken("training_equals_evaluation")
class UnroundedInTraining(Consistent):
    """While training, the tensor is clipped and not rounded."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        values = super().fake_quantize(x, grid, training)
        return torch.maximum(torch.minimum(x, high * grid.scale), low * grid.scale) if training else values


# ---- classes --------------------------------------------------------------------------------------------------------


@broken("refusals")
class UncheckedConfig(Consistent):
    """Any config is taken, for whatever target and grid."""

    @classmethod
    def _check_config(cls, config):
        pass


@broken("refusals")
class SilentBeforeCalibration(Consistent):
    """Before calibration tensors pass as they are, and nobody is told."""

    def forward(self, inputs, training=None):
        return super().forward(inputs, training) if self.calibrated else inputs
