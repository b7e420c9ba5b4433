"""Broken PyTorch quantizers as an author of a plugin writes them, from the documentation: the docstring says what."""

from __future__ import annotations

import copy
import random
import threading
import time
import weakref

import numpy as np
import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from torch import Tensor, nn

from tests.planted.defect import planted
from trainable_core.reference import lsq
from trainable_core.reference.method import OwnVariable
from trainable_torch import BasePytorchTrainableQuantizer, Grid, ops
from trainable_torch.quantizers.adaround import AdaroundQuantizer
from trainable_torch.quantizers.dqa import DqaQuantizer
from trainable_torch.quantizers.lsq import LsqQuantizer
from trainable_torch.quantizers.ste import SteQuantizer

SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
FEW = 2  # cases of the laws that must hold


def broken(caught_by: str, method: QuantizationMethod = SYMMETRIC, identifier: str = "STRANGER"):
    """Mark a class and plant it."""

    def mark(cls):
        return planted("torch", caught_by, FEW)(mark_quantizer(QuantizationTarget.Weights, [method], identifier)(cls))

    return mark


# ---- a sound estimator, as the documentation writes one -------------------------------------------------------------


class Round(torch.autograd.Function):
    """Rounds to even, and passes the gradient."""

    @staticmethod
    def forward(ctx, steps):
        return steps.round() + 0.0

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def clipped(x, grid):
    return np.clip(x / grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)


class Tutorial(BasePytorchTrainableQuantizer):
    """Straight-through rounding between the ends, with a learned grid and a surrogate."""

    learns_grid = True

    def codes(self, steps: Tensor) -> Tensor:
        return Round.apply(steps)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        return self.codes(torch.minimum(torch.maximum(grid.steps(x), low), high)) * grid.scale

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        return lambda x, grid: (np.rint(here) - here + clipped(x, grid)) * grid.scale


class OwnBackward(torch.autograd.Function):
    """Values that are given, and a gradient that a function of the quantizer computes."""

    @staticmethod
    def forward(ctx, x, values, quantizer, scale):
        ctx.quantizer = quantizer
        ctx.save_for_backward(x, scale)
        return quantizer.kept(x, values)

    @staticmethod
    def backward(ctx, upstream):
        x, scale = ctx.saved_tensors
        return ctx.quantizer.backward(x, scale, upstream), None, None, None


class Own(BasePytorchTrainableQuantizer):
    """STE on a fixed grid by a function of its own."""

    def kept(self, x, values):
        return values.clone()

    def snap(self, x, grid):
        return ops.snap(x, grid.scale, *grid.ends)

    def backward(self, x, scale, upstream):
        return torch.where(self.inside(x, scale), upstream, 0.0)

    def inside(self, x, scale):
        bits = self.quantization_config.n_bits
        steps = x * scale.reciprocal()
        return (steps >= -(2 ** (bits - 1))) & (steps <= 2 ** (bits - 1) - 1)

    def fake_quantize(self, x, grid, training):
        with torch.no_grad():
            values = self.snap(x, grid)
        return OwnBackward.apply(x, values, self, grid.scale.detach())

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        return lambda x, grid: (np.rint(here) - here + clipped(x, grid)) * grid.scale


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC, POWER_OF_TWO, UNIFORM], "STRANGER")
class SoundTutorial(Tutorial):
    """No mistake."""


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC], "STRANGER")
class SoundOwn(Own):
    """No mistake."""


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC], "STRANGER")
class SoundOffsets(BasePytorchTrainableQuantizer):
    """No mistake: what each weight is shifted by before it is rounded learns, and moves it by one code at most."""

    own_variables = (OwnVariable("offset", per_element=True, initial=0.0),)
    deploys_values = True

    def fake_quantize(self, x, grid, training):
        steps = grid.steps(x).clamp(*grid.ends)
        here = steps.detach()
        offset = torch.where(self.offset.isnan(), 0.0, self.offset)  # after a step with a gradient of NaN
        shifted, down, up = steps + offset, here.floor(), here.ceil()
        held = torch.minimum(torch.maximum(shifted.detach(), down), up)
        inside = torch.where(shifted.detach() == held, shifted, held)
        return ops.straight_through(held.round() + 0.0, inside) * grid.scale.detach()


SOUND = [SoundTutorial, SoundOwn, SoundOffsets]


def rebuilt(quantizer, memo):
    """Return a deep copy of a quantizer whose class has a `__deepcopy__`."""
    again = type(quantizer).__new__(type(quantizer))
    memo[id(quantizer)] = again
    again.__setstate__(copy.deepcopy(quantizer.__dict__, memo))
    return again


# ---- how a tensor lies in memory, and how large it is ---------------------------------------------------------------


@broken("memory_layout")
class ViewsItsInput(Tutorial):
    """The tensor is flattened by `view`, which only contiguous ones allow."""

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(x.view(-1).view(x.shape), grid, training)


@broken("memory_layout")
class ReadsTheMemory(Own):
    """The kernel reads the memory in its order, as a C extension does that nobody told of strides."""

    def snap(self, x, grid):
        if x.is_contiguous() or x.numel() < 2 or not x.is_non_overlapping_and_dense():
            return super().snap(x, grid)
        return super().snap(x.as_strided(x.shape, x.contiguous().stride()), grid)


@broken("memory_layout")
class FastPathForContiguous(Own):
    """The fast path for contiguous tensors is sound; the other one forgets to clip the gradient."""

    def backward(self, x, scale, upstream):
        return super().backward(x, scale, upstream) if x.is_contiguous() else upstream


@broken("memory_layout")
class WritesIntoTheUpstream(Own):
    """The mask is multiplied into the upstream gradient, which has one number for all after a sum."""

    def backward(self, x, scale, upstream):
        return upstream.mul_(self.inside(x, scale)) if upstream.numel() else upstream


@broken("memory_layout")
class UpstreamAsItLies(Own):
    """The backward kernel reads the upstream gradient's memory in its order."""

    def backward(self, x, scale, upstream):
        if upstream.is_contiguous() or not upstream.is_non_overlapping_and_dense():
            return super().backward(x, scale, upstream)
        return super().backward(x, scale, upstream.as_strided(upstream.shape, upstream.contiguous().stride()))


@broken("tensor_size")
class DropsTheTail(Own):
    """The kernel works in blocks of 2**14 elements, and leaves what is over to nobody."""

    def snap(self, x, grid):
        values = super().snap(x, grid)
        whole = x.numel() - x.numel() % 2**14
        if whole:
            values.view(-1)[whole:] = 0.0
        return values


@broken("tensor_size")
class HalfForLargeTensors(Own):
    """Large tensors are divided in half precision, to save memory."""

    def snap(self, x, grid):
        if x.numel() < 2**15:
            return super().snap(x, grid)
        return super().snap((x / grid.scale).half().float() * grid.scale, grid)


@broken("tensor_size")
class GradientOfTheFirstBlock(Own):
    """The backward kernel is launched for 2**16 elements at most."""

    def backward(self, x, scale, upstream):
        gradient = super().backward(x, scale, upstream).contiguous()
        gradient.view(-1)[2**16 :] = 0.0
        return gradient


@broken("tensor_size")
class AnotherTieInTheFastPath(Own):
    """The fast path of tensors beyond 2**16 elements rounds ties up."""

    def snap(self, x, grid):
        if x.numel() <= 2**16:
            return super().snap(x, grid)
        return ((grid.steps(x) + 0.5).floor().clamp(*grid.ends) + 0.0) * grid.scale


# ---- NaN, infinities, dtypes ----------------------------------------------------------------------------------------


class Shipped:
    """A deployed quantizer that is a formula."""

    def __init__(self, formula) -> None:
        self.formula = formula

    def __call__(self, x: Tensor) -> Tensor:
        return self.formula(x)


@broken("nan_inputs")
class NanToZero(Tutorial):
    """Missing values become zeros."""

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(torch.where(x.isnan(), 0.0, x), grid, training)


@broken("nan_inputs")
class NanInTrainingIsAnError(Tutorial):
    """A missing value stops the training."""

    def fake_quantize(self, x, grid, training):
        if training and x.isnan().any():
            message = "NaN in the input"
            raise ValueError(message)
        return super().fake_quantize(x, grid, training)


@broken("deployed_dtypes")
class DeploysInTheInputsDtype(Tutorial):
    """What is deployed computes in the dtype that it is given."""

    def convert2inferable(self):
        self.require_calibrated()
        axis = self.quantization_config.channels_axis

        if self.quantization_config.blocks is not None:
            return super().convert2inferable()

        def formula(x):
            grid = self.frozen.grid(x.dim() if axis is not None else 0)
            scale = grid.scale.detach().to(x.dtype)
            low, high = grid.ends
            return (((x * scale.reciprocal()).round()).clamp(low, high) + 0.0) * scale

        self.__dict__["frozen"] = copy.deepcopy(self)
        return Shipped(formula)


@broken("deployed_dtypes")
class DeployedGivesFloat32(Tutorial):
    """What is deployed returns float32, whatever it is given."""

    def convert2inferable(self):
        inferable = super().convert2inferable()
        return Shipped(lambda x: inferable(x.float()))


@broken("evaluation_gradients")
class CutInEval(Tutorial):
    """In eval mode the output is cut from the graph."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return values if training else values.detach()


@broken("evaluation_gradients")
class RootInEval(Tutorial):
    """In eval mode a square root is differentiated at zero."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return values if training else values + 0 * x.clamp(-1, 1).abs().sqrt()


class ProductOfMasks(torch.autograd.Function):
    """LSQ with its cases added up as products with masks."""

    @staticmethod
    def forward(ctx, x, scale, values, low, high, factor):
        ctx.save_for_backward(x, scale)
        ctx.ends, ctx.factor = (low, high), factor
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        x, scale = ctx.saved_tensors
        low, high = ctx.ends
        steps = x * scale.reciprocal()
        inside = ((steps > low) & (steps < high)).float()
        slope = inside * (steps.round() - steps) + (steps >= high) * high + (steps <= low) * low
        d_scale = (upstream * slope).sum_to_size(scale.shape) * ctx.factor
        return upstream * inside, d_scale, None, None, None, None


@broken("nonfinite_inputs", identifier="LSQ")
class MaskedByAProduct(LsqQuantizer):
    """Outside of the range the rounding error is multiplied by zero; that of an infinity is not a number."""

    def fake_quantize(self, x, grid, training):
        values = ops.snap(x.detach(), grid.scale.detach(), *grid.ends)
        factor = lsq.gradient_scale(x.numel() // max(grid.scale.numel(), 1), grid.quant_max)
        return ProductOfMasks.apply(x, grid.scale, values, *grid.ends, factor)


@broken("nonfinite_inputs")
class NormalizedGradient(Own):
    """The gradient is divided by the tensor's largest magnitude, and multiplied back."""

    def backward(self, x, scale, upstream):
        largest = x.abs().max().clamp_min(1.0) if x.numel() else 1.0
        return super().backward(x, scale, upstream) / largest * largest


@broken("dtype_gradients")
class HalfInBackward(Tutorial):
    """The backward pass multiplies in the dtype of the input."""

    def forward(self, inputs, training=None):
        self.__dict__["given"] = inputs.dtype
        return super().forward(inputs, training)

    def codes(self, steps):
        return HalfSlope.apply(steps, self.given)

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        slope = 1 - np.abs(here - np.rint(here))
        return lambda x, grid: (np.rint(here) + slope * (clipped(x, grid) - here)) * grid.scale


class HalfSlope(torch.autograd.Function):
    """Rounding whose gradient becomes smaller in the middle between two codes."""

    @staticmethod
    def forward(ctx, steps, dtype):
        codes = steps.round() + 0.0
        ctx.dtype = torch.float32 if dtype == torch.float64 else dtype
        ctx.save_for_backward(steps - codes)
        return codes

    @staticmethod
    def backward(ctx, upstream):
        slope = (1 - ctx.saved_tensors[0].abs()).to(ctx.dtype)
        return (upstream.to(ctx.dtype) * slope).float(), None


# ---- sequences of calls ---------------------------------------------------------------------------------------------


@broken("interleaved_calls")
class KeepsItsInputOnSelf(Own):
    """The backward pass reads the input from the quantizer, where the next forward has put another one."""

    def kept(self, x, values):
        self.__dict__["memory"] = x.detach().clone()
        return values.clone()

    def backward(self, x, scale, upstream):
        return super().backward(self.memory, scale, upstream)

    def __deepcopy__(self, memo):
        self.__dict__.pop("memory", None)
        return rebuilt(self, memo)


@broken("interleaved_calls")
class MaskBuffer(Own):
    """The mask is written into a buffer that is made once."""

    def kept(self, x, values):
        self.__dict__["mask"] = self.inside(x, self.grid(x.dim()).scale.detach())
        return values.clone()

    def backward(self, x, scale, upstream):
        return upstream * self.mask


class SetsGrad(torch.autograd.Function):
    """Gives the scale's gradient to the variable itself."""

    @staticmethod
    def forward(ctx, x, values, quantizer):
        ctx.quantizer, ctx.save = quantizer, x
        ctx.save_for_backward(x)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        quantizer, (x,) = ctx.quantizer, ctx.saved_tensors
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            values = Tutorial.fake_quantize(quantizer, given, quantizer.grid(x.dim()), True)
            threshold = quantizer.threshold
            wanted = [given, threshold] if threshold.requires_grad else [given]
            d_x, *rest = torch.autograd.grad(values, wanted, upstream)
        if rest:
            quantizer.threshold.grad = rest[0]
        return d_x, None, None


@broken("accumulation")
class SetsItsGradient(Tutorial):
    """The backward pass sets the threshold's gradient, and does not add to it."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x.detach(), grid, training).detach()
        return SetsGrad.apply(x, values, self)


@broken("accumulation")
class ClearsItsGradient(Tutorial):
    """A forward in training clears the gradient that is there, to be on the safe side."""

    def fake_quantize(self, x, grid, training):
        if training:
            self.threshold.grad = None
        return super().fake_quantize(x, grid, training)


@broken("deploy_after_step")
class DeploysTheLastForward(Tutorial):
    """What is deployed has the numbers of the last call, which a step has changed since."""

    def forward(self, inputs, training=None):
        values = super().forward(inputs, training)
        self.__dict__["last"] = super().convert2inferable()
        return values

    def assign(self, variable, value):
        self.__dict__["last"] = None
        super().assign(variable, value)

    def _load_from_state_dict(self, *arguments):
        self.__dict__["last"] = None
        super()._load_from_state_dict(*arguments)

    def convert2inferable(self):
        self.require_calibrated()
        return copy.deepcopy(self.__dict__.get("last")) or super().convert2inferable()


@broken("convert_midway")
class DeployedShares(Tutorial):
    """What is deployed reads the variables that are still trained."""

    def convert2inferable(self):
        self.require_calibrated()
        return Shipped(lambda x: self(x, False))


@broken("convert_midway")
class ConvertingFreezes(LsqQuantizer):
    """Converting switches gradients off, and nobody switches them on again."""

    def convert2inferable(self):
        self.requires_grad_(requires_grad=False)
        return super().convert2inferable()


@broken("convert_midway", POWER_OF_TWO)
class ConvertingRounds(LsqQuantizer):
    """Converting writes the threshold that it rounded up into the variable."""

    def convert2inferable(self):
        inferable = super().convert2inferable()
        qparams = self.current_qparams()
        self.assign(self.threshold, qparams.scale * -qparams.quant_min)
        return inferable


@broken("recalibration")
class KeepsTheFirstCalibration(Tutorial):
    """Calibrated once, it takes no other numbers, and tells nobody."""

    def set_quantization_params(self, params):
        if not self.calibrated:
            super().set_quantization_params(params)


@broken("recalibration")
class NewParametersAtCalibration(LsqQuantizer):
    """A calibration makes new parameters, which no optimizer holds."""

    def set_quantization_params(self, params):
        for name in self.variable_names if self.calibrated else ():
            setattr(self, name, nn.Parameter(self.get_quantizer_variable(name).detach().clone()))
        super().set_quantization_params(params)


@broken("load_then_deploy")
class RemembersWhatItDeployed(Tutorial):
    """What was deployed is deployed again until the next call; loading a state is none."""

    def forward(self, inputs, training=None):
        self.__dict__["ready"] = None
        return super().forward(inputs, training)

    def assign(self, variable, value):
        self.__dict__["ready"] = None
        super().assign(variable, value)

    def convert2inferable(self):
        if self.__dict__.get("ready") is None:
            self.__dict__["ready"] = super().convert2inferable()
        return self.ready

    def train(self, mode=True):
        if mode:
            self.__dict__["ready"] = None
        return super().train(mode)


@broken("load_then_deploy")
class ProtectsWhatItLearned(Tutorial):
    """A state is loaded before the first call only, to protect what was trained."""

    used = False

    def forward(self, inputs, training=None):
        self.__dict__["used"] = True
        return super().forward(inputs, training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = {prefix + name: value for name, value in self.state_dict().items()}
        super()._load_from_state_dict({**state_dict, **own} if self.used else state_dict, prefix, *args)


@broken("freeze_midway")
class FreezeLeavesGradients(LsqQuantizer):
    """Frozen variables keep their last gradient, which an optimizer goes on applying."""

    def freeze(self, frozen=True):
        self.freeze_quant_params = frozen
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)


@broken("freeze_midway")
class FreezeZeroesGradients(LsqQuantizer):
    """Frozen variables have a gradient of zero: weight decay pulls them on."""

    def freeze(self, frozen=True):
        super().freeze(frozen)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter) if frozen else parameter.grad


@broken("freeze_midway")
class ThawsOnce(LsqQuantizer):
    """A second thaw does nothing."""

    thawed = False

    def freeze(self, frozen=True):
        if not frozen and self.thawed:
            return
        super().freeze(frozen)
        self.thawed = self.thawed or not frozen


@broken("training_by_default", identifier="DQA")
class TrainsByDefault(DqaQuantizer):
    """`training` is true where nobody says anything, in eval mode too."""

    def forward(self, inputs, training=True):
        return super().forward(inputs, training)


@broken("training_by_default", identifier="DQA")
class EvaluatesByDefault(DqaQuantizer):
    """`training` is false where nobody says anything: the soft forward is never trained."""

    def forward(self, inputs, training=False):
        return super().forward(inputs, training)


@broken("second_initialization")
class InitializesAgain(Tutorial):
    """A second initialization goes back to the config's numbers."""

    def initialize_quantization(self, tensor_shape, name, layer):
        variables = super().initialize_quantization(tensor_shape, name, layer)
        params = {width: self._config_params(width) for width in self.structure.widths}
        if all(set(given) - {"is_signed"} for given in params.values()):
            self.set_quantization_params(params)
        return variables


@broken("second_initialization")
class MakesItsVariableAgain(Tutorial):
    """The method's own variable is made in `initialize_quantization`, anew each time."""

    def initialize_quantization(self, tensor_shape, name, layer):
        super().initialize_quantization(tensor_shape, name, layer)
        self.add_quantizer_variable("seen", torch.zeros(()), trained=False)
        return {each: self.get_quantizer_variable(each) for each in self.variable_names}


# ---- schedules and regularization -----------------------------------------------------------------------------------


@broken("schedule_count", identifier="DQA")
class CountsInForwardToo(DqaQuantizer):
    """A forward in training counts a step, and the model counts it once more; the forward's own comes after."""

    def quantize(self, x, training):
        values = super().quantize(x, training)
        if training:
            self.advance()
        return values


@broken("schedule_count")
class CountsEvaluations(DqaQuantizer):
    """An evaluation counts a step."""

    def quantize(self, x, training):
        if not training:
            self.advance()
        return super().quantize(x, training)


@broken("schedule_of_a_frozen_quantizer", identifier="DQA")
class FrozenScheduleStops(DqaQuantizer):
    """The schedule stops while the variables are frozen."""

    def advance(self):
        if not self.freeze_quant_params:
            super().advance()


@broken("schedule_of_a_copy", identifier="DQA")
class CopyStartsOver(DqaQuantizer):
    """A copy's schedule starts again."""

    def __deepcopy__(self, memo):
        again = rebuilt(self, memo)
        again.step.zero_()
        return again


@broken("schedule_of_a_copy", identifier="DQA")
class SharedStep(DqaQuantizer):
    """A copy counts on in the original."""

    def __deepcopy__(self, memo):
        memo[id(self.step)] = self.step
        return rebuilt(self, memo)


@broken("regularization_gradient", identifier="DQA")
class DetachedTerm(DqaQuantizer):
    """The term for the loss is cut from the graph."""

    def regularization(self):
        term = super().regularization()
        return None if term is None else term.detach()


@broken("regularization_gradient", identifier="DQA")
class TermPushesUp(DqaQuantizer):
    """The term rewards wide codes."""

    def regularization(self):
        term = super().regularization()
        return None if term is None else -term


@broken("regularization_gradient")
class TermOfNumPy(Tutorial):
    """The term is computed with NumPy, which knows no gradients."""

    def regularization(self):
        return torch.tensor(float(np.abs(self.threshold.detach().numpy()).sum()))


@broken("regularization_gradient")
class TermOfTheWrongVariable(Tutorial):
    """The term's gradient has the wrong sign, as where a custom function forgot a minus."""

    def regularization(self):
        term = 1 / (1 + self.threshold.abs()).sum()
        return term.detach() - (term - term.detach())


@broken("regularization_once")
class TermDecaysWhenItIsRead(Tutorial):
    """The term's factor falls whenever somebody asks for the term."""

    factor = 1.0

    def regularization(self):
        self.factor *= 0.5
        return self.factor * (self.threshold**2).sum()


@broken("declared_penalty")
class TermWithoutItsFactor(Tutorial):
    """The term lacks the factor that is declared."""

    def regularization(self):
        return (self.threshold**2).mean()

    def penalty(self, variables, steps):
        return 0.5 * np.mean(variables["threshold"] ** 2)


@broken("declared_penalty")
class TermWithoutItsSchedule(Tutorial):
    """The term has from the first step on the strength that it should have at the end of the schedule."""

    counts_steps = True

    def regularization(self):
        return (self.threshold**2).mean()

    def penalty(self, variables, steps):
        return min(steps / 4, 1) * np.mean(variables["threshold"] ** 2)


@broken("declared_penalty")
class TermIsForgotten(Tutorial):
    """A term is declared, and the method has another name than the one that is asked for."""

    def regularisation(self):
        return self.threshold.sum()

    def penalty(self, variables, steps):
        return np.sum(variables["threshold"])


# ---- states ---------------------------------------------------------------------------------------------------------


@broken("incomplete_states")
class LoadsWhatThereIs(Tutorial):
    """Missing entries are left as they are."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], unexpected, errors)


@broken("incomplete_states")
class TakesForeignEntries(Tutorial):
    """Entries that nobody knows are passed over."""

    def load_state_dict(self, state_dict, *args, **kwargs):
        own = self.state_dict()
        return super().load_state_dict({k: v for k, v in state_dict.items() if k in own}, *args, **kwargs)


@broken("incomplete_states", UNIFORM)
class LoadsByPosition(Tutorial):
    """Entries are taken in the order in which they come."""

    def load_state_dict(self, state_dict, *args, **kwargs):
        own = list(self.state_dict())
        if set(own) == set(state_dict):
            state_dict = dict(zip(own, state_dict.values(), strict=True))
        return super().load_state_dict(state_dict, *args, **kwargs)


@broken("config_round_trip")
class OptionNotWritten(Tutorial):
    """An option was added to the constructor, and not to `get_arguments`."""

    def __init__(self, quantization_config, freeze_quant_params=False, pull=0.5):
        super().__init__(quantization_config, freeze_quant_params)
        self.pull = pull

    def regularization(self):
        return self.pull * (self.threshold**2).sum()


@broken("config_round_trip", identifier="DQA")
class SelectsInAnAttribute(DqaQuantizer):
    """The width that somebody selects is kept in an attribute, which nothing saves."""

    chosen = None

    @property
    def selected_width(self):
        return self.chosen or super().selected_width

    def select_width(self, width):
        self.chosen = width


@broken("state_round_trip", identifier="DQA")
class SelectionOutsideOfTheState(SelectsInAnAttribute):
    """The width that somebody selects is written into the config, and not into the state."""

    def get_config(self):
        return {**super().get_config(), "chosen": self.chosen}

    @classmethod
    def from_config(cls, config):
        again = super().from_config(config)
        again.chosen = config["chosen"]
        return again


@broken("state_round_trip")
class DrawnToItsFirstThreshold(Tutorial):
    """The term draws the threshold to that of the first step, which is in an attribute and not in the state."""

    first = None

    def regularization(self):
        if self.first is None:
            self.first = self.threshold.detach().clone()
        return ((self.threshold - self.first) ** 2).sum()


@broken("deepcopy", identifier="DQA")
class CopyTrains(DqaQuantizer):
    """A copy is in training mode, whatever mode the original is in."""

    def __deepcopy__(self, memo):
        return rebuilt(self, memo).train()


@broken("pickling", identifier="DQA")
class PickledWithoutItsMode(DqaQuantizer):
    """What comes out of a pickle is in training mode, whatever mode it was pickled in."""

    def __reduce_ex__(self, protocol):
        make, arguments, *rest = super().__reduce_ex__(protocol)
        state = {**rest[0], "training": True}
        return make, arguments, state

    def __deepcopy__(self, memo):
        return rebuilt(self, memo)


@broken("modifiers")
class TermOfItsOwnAlone(Tutorial):
    """The method's term for the tensor takes the place of those of the modifiers."""

    def regularization_of(self, x):
        return 1e-4 * x.nan_to_num(0, 0, 0).square().mean() if x.numel() else None


@broken("declared_variables")
class BoundedLogarithm(Tutorial):
    """The logarithm of the threshold is bounded where it is decoded, and small thresholds come back larger."""

    grid_parameters = ("log_threshold",)

    def encode_grid(self, numbers):
        return {"log_threshold": np.log(numbers["threshold"])}

    def decode_grid(self, variables):
        return {"threshold": variables["log_threshold"].clamp(-8, 8).exp()}


# ---- what is around a call ------------------------------------------------------------------------------------------


@broken("global_random_state")
class DrawsASample(Tutorial):
    """Statistics of a random sample of the tensor are taken in training."""

    def fake_quantize(self, x, grid, training):
        if training:
            torch.rand(3)
        return super().fake_quantize(x, grid, training)


@broken("global_random_state")
class SeedsEverything(Tutorial):
    """The forward seeds the global generator, so that it can be repeated."""

    def fake_quantize(self, x, grid, training):
        torch.manual_seed(0)
        return super().fake_quantize(x, grid, training)


@broken("global_random_state")
class DrawsFromNumpy(Tutorial):
    """NumPy's global numbers decide which channel is logged."""

    def fake_quantize(self, x, grid, training):
        np.random.rand()  # noqa: NPY002 - the mistake
        return super().fake_quantize(x, grid, training)


@broken("global_random_state")
class DrawsInEval(Tutorial):
    """Python's global numbers decide whether an evaluation is logged."""

    def fake_quantize(self, x, grid, training):
        if not training:
            random.random()  # noqa: S311 - the mistake
        return super().fake_quantize(x, grid, training)


HISTORY: list[Tensor] = []


@broken("kept_memory")
class KeepsAHistory(Tutorial):
    """The last outputs are kept for a plot."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        HISTORY[:] = [*HISTORY[-9:], values]
        return values


@broken("kept_memory")
class KeepsItsInput(Tutorial):
    """The last input is kept in an attribute, with what it needs for backward."""

    def forward(self, inputs, training=None):
        self.__dict__["inputs"] = inputs
        return super().forward(inputs, training)


@broken("fresh_output")
class ReturnsItsInput(Own):
    """A tensor that is on the grid already is returned as it is."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return x if torch.equal(values, x) and not torch.signbit(x[x == 0]).any() else values


@broken("fresh_output")
class OutputBuffer(Own):
    """Outputs of eval mode are written into one buffer."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        if training:
            return values
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault(
            tuple(x.shape), torch.empty_like(values.detach(), memory_format=torch.contiguous_format)
        )
        return Into.apply(values, buffer)

    def __deepcopy__(self, memo):
        self.__dict__.pop("buffers", None)
        return rebuilt(self, memo)


class Into(torch.autograd.Function):
    """Writes values into memory that is there already."""

    @staticmethod
    def forward(ctx, values, buffer):
        return buffer.data.copy_(values).view(values.shape)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


@broken("upstream_unchanged")
class MasksInPlace(Own):
    """The mask is multiplied into the upstream gradient where its memory is its own."""

    def backward(self, x, scale, upstream):
        if not upstream.is_contiguous() or not upstream.numel() or not x.is_contiguous():
            return super().backward(x, scale, upstream)
        return upstream.mul_(self.inside(x, scale)).add_(0.0)


@broken("gradient_mode")
class RecordsAlways(Tutorial):
    """Gradients are switched on for the straight-through trick, under `no_grad` too."""

    def fake_quantize(self, x, grid, training):
        with torch.enable_grad():
            return super().fake_quantize(x, self.grid(x.dim()), training)


@broken("second_derivatives")
class CutInBackward(Own):
    """The backward pass cuts its result from the graph, except for a zero that keeps it differentiable."""

    def backward(self, x, scale, upstream):
        return super().backward(x, scale, upstream).detach() + 0.0 * upstream


@broken("pickling")
class LambdaAttribute(Tutorial):
    """The rounding function is a lambda in an attribute."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.rounding = lambda steps: Round.apply(steps)  # noqa: PLW0108 - the mistake

    def codes(self, steps):
        return self.rounding(steps)


class Owner:
    """What a quantizer belongs to."""


OWNER = Owner()


@broken("pickling")
class WeakReference(Tutorial):
    """A weak reference to the owner is kept in an attribute."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.owner = weakref.ref(OWNER)


LOCAL = threading.local()
LOCAL.ready = True


@broken("threads")
class OnlyInTheFirstThread(Tutorial):
    """A thread's own storage is filled when the module is imported: in that thread alone."""

    def fake_quantize(self, x, grid, training):
        if not LOCAL.ready:
            raise AssertionError
        return super().fake_quantize(x, grid, training)


@broken("threads")
class CurrentTensorOnSelf(Own):
    """The tensor is put on the quantizer, and read again a moment later."""

    def snap(self, x, grid):
        self.__dict__["current"] = x
        time.sleep(0.0005)
        values = super().snap(self.current, grid)
        self.__dict__["current"] = None
        return values


@broken("cast_models")
class HalvesItsThreshold(Tutorial):
    """Variables are cast with the model."""

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)  # noqa: SLF001 - the mistake


# ---- gradients where tests seldom look ------------------------------------------------------------------------------


@broken("variable_gradients")
class BoundHoldsBack(Tutorial):
    """A clamp bounds the threshold: below the bound nothing leads back."""

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        bound = max(self.quantization_config.min_threshold, 2.0**-100)
        scale = self.threshold.nan_to_num(bound, 2.0**100, bound).clamp(bound, 2.0**100) * (-1.0 / sound.quant_min)
        return Grid(scale.view(sound.scale.shape), sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


class Rule(torch.autograd.Function):
    """STE and the scale's gradient, by a function of the quantizer."""

    @staticmethod
    def forward(ctx, x, scale, values, quantizer):
        ctx.quantizer = quantizer
        ctx.save_for_backward(x, scale)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        x, scale = ctx.saved_tensors
        return *ctx.quantizer.gradients(x, scale, upstream, ctx.needs_input_grad), None, None


class ByRule(Tutorial):
    """The tutorial's gradients in closed form."""

    def fake_quantize(self, x, grid, training):
        values = ops.snap(x.detach(), grid.scale.detach(), *grid.ends)
        return Rule.apply(x, grid.scale, values, self)

    def gradients(self, x, scale, upstream, needs):
        bits = self.quantization_config.n_bits
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        steps = x * scale.reciprocal()
        held = steps.clamp(low, high)
        inside = (steps >= low) & (steps <= high)
        slope = self.slope(held.round() - torch.where(inside, steps, 0.0), held)
        return torch.where(inside, upstream, 0.0), (upstream * slope).sum_to_size(scale.shape)

    def slope(self, slope, held):
        return slope


@broken("variable_gradients")
class SlopeInEightBits(ByRule):
    """The slope outside of the range is held in eight bits."""

    def slope(self, slope, held):
        return slope.clamp(-128, 127)


@broken("variable_gradients")
class NothingForAFixedInput(ByRule):
    """Where the input needs no gradient, the backward pass ends at once, and the threshold gets none."""

    def gradients(self, x, scale, upstream, needs):
        d_x, d_scale = super().gradients(x, scale, upstream, needs)
        return (d_x, d_scale) if needs[0] else (None, None)


@broken("variable_gradients")
class SumsOverTheFirstAxes(ByRule):
    """Half of the threshold's gradient is lost where a tensor has more than three axes."""

    def gradients(self, x, scale, upstream, needs):
        d_x, d_scale = super().gradients(x, scale, upstream, needs)
        return d_x, d_scale * (0.5 if x.dim() > 3 else 1.0)


@broken("on_grid", UNIFORM)
class CodesInSixteenBits(SteQuantizer):
    """Codes are cast to int16, which the upper half of 16 unsigned bits leaves."""

    def fake_quantize(self, x, grid, training):
        codes = (x.detach() * grid.scale.reciprocal()).nan_to_num(0.0).round() + grid.zero_point
        codes = codes.clamp(grid.quant_min, grid.quant_max).to(torch.int32).to(torch.int16).float()
        values = (codes - grid.zero_point) * grid.scale
        return ops.ste_fake_quantize(x, grid) if self.selected_width < 16 else x + (values - x).detach()

    def convert2inferable(self):
        sound = copy.deepcopy(self).eval()
        return Shipped(lambda x: sound(x, False))


@broken("regularization_of_tensor", identifier="ADAROUND")
class TermOfHalfTheRoundings(AdaroundQuantizer):
    """The regularizer counts a rounding's distance from a half once, and not twice."""

    def regularization_of(self, x):
        term = super().regularization_of(x)
        return None if term is None else term / 2


@broken("inside_a_layer")
class KeepsItsFirstWeights(SteQuantizer):
    """In a layer, what is quantized are the weights that the layer had when the quantizer was made for it."""

    def initialize_quantization(self, tensor_shape, name, layer):
        made = super().initialize_quantization(tensor_shape, name, layer)
        self.first = None if layer is None else layer.weight.detach().clone()
        return made

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(x if self.first is None else x + (self.first - x).detach(), grid, training)


# ---- what a framework does with a whole call, and what others do with the object ------------------------------------


class Differentiable(torch.autograd.Function):
    """Values that are given, and the gradient inside of the range, in the form that transforms take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, values, scale, low, high):
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, scale, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, scale)
        ctx.save_for_forward(x, scale)

    @staticmethod
    def backward(ctx, upstream):
        x, scale = ctx.saved_tensors
        steps = x * scale.reciprocal()
        return torch.where((steps >= ctx.low) & (steps <= ctx.high), upstream, 0.0), None, None, None, None

    @staticmethod
    def jvp(ctx, d_x, *others):
        return d_x * 1.0


@broken("forward_derivatives")
class TangentEverywhere(Own):
    """In forward mode the derivative passes beyond the ends of the range too."""

    def fake_quantize(self, x, grid, training):
        values = ops.snap(x.detach(), grid.scale.detach(), *grid.ends)
        return Differentiable.apply(x, values, grid.scale.detach(), *grid.ends)


class RoundInBatches(torch.autograd.Function):
    """Rounds to even, and in a batch half up."""

    @staticmethod
    def forward(steps):
        return steps.round() + 0.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep nothing."""

    @staticmethod
    def backward(ctx, upstream):
        return upstream

    @staticmethod
    def vmap(info, in_dims, steps):
        return (steps + 0.5).floor(), in_dims[0]


@broken("vectorized_calls")
class AnotherTieInABatch(Tutorial):
    """The rule for `vmap` is a formula of its own, which sends ties up."""

    def codes(self, steps):
        return RoundInBatches.apply(steps)


@broken("told_scale")
class TellsItsFirstScale(Tutorial):
    """The scale that others build on is kept from the first time that it was asked for."""

    def deployed_scale(self):
        return self.__dict__.setdefault("told", super().deployed_scale())


@broken("replaced_methods")
class CallsByItsClass(Tutorial):
    """A method is called through the class, and what somebody put into the object is passed over."""

    def quantize(self, x, training):
        return type(self).fake_quantize(self, x, self.grid(x.dim()), training)


@broken("modifiers")
class PassesModifiersOver(Tutorial):
    """Modifiers are kept and not asked: the method alone decides the values."""

    def modified_values(self, x, training):
        return self.quantize(x, training)


@broken("modifiers")
class ModifiersAfterTheFact(Tutorial):
    """Modifiers are given the tensor that they made themselves, and not the quantizer's input."""

    def modified_values(self, x, training):
        for modifier in self.modifiers:
            x = modifier.enter(self, x, training)
        quantized = self.quantize(x, training)
        for modifier in self.modifiers:
            quantized = modifier.leave(self, x, quantized, training)
        return quantized


@broken("modifier_state")
class ForgetsWithTheCheckpoint(Tutorial):
    """What a modifier keeps is a buffer that is not saved."""

    def add_state(self, name, value):
        self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)


@broken("gradient_of_a_frozen_quantizer")
class PassesWhileFrozen(Own):
    """Frozen, nothing is trained: the backward pass returns the gradient as it came."""

    def backward(self, x, scale, upstream):
        return upstream + 0.0 if self.freeze_quant_params else super().backward(x, scale, upstream)


@broken("graph_execution")
class UnroundedWhileTraced(Tutorial):
    """While a compiler traces, rounding is left out, because the function in it could not be traced once."""

    def codes(self, steps):
        return steps if torch.compiler.is_compiling() else super().codes(steps)


@broken("width_selection", identifier="DQA")
class SelectsTheSmallest(DqaQuantizer):
    """Whatever width is asked for, the smallest one is selected."""

    def select_width(self, width):
        super().select_width(min(self.widths))


# ---- what authors who had not read the laws got wrong ---------------------------------------------------------------


@broken("gradient_reaches_the_input")
class RoundsWithoutAGradient(Tutorial):
    """The straight-through estimator is forgotten: weights inside the range get no gradient."""

    surrogate = None

    def codes(self, steps):
        return steps.round() + 0.0


@broken("gradient_reaches_the_input")
class PassesItUphill(Own):
    """The gradient of the input has the wrong sign."""

    surrogate = None

    def backward(self, x, scale, upstream):
        return -super().backward(x, scale, upstream)


@broken("gradient_direction")
class LearnsFromInsideAlone(Tutorial):
    """Values beyond the range give the threshold nothing, so it never grows."""

    surrogate = None

    def fake_quantize(self, x, grid, training):
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = grid.steps(x)
        inside = (steps >= low) & (steps <= high)
        codes = self.codes(torch.minimum(torch.maximum(steps, low), high))
        return torch.where(inside, codes * grid.scale, codes.detach() * grid.scale.detach())


@broken("loss_scale")
class ClipsWhatComesIn(Own):
    """The upstream gradient is clipped, so a large loss scale leaves nothing of it."""

    def backward(self, x, scale, upstream):
        return super().backward(x, scale, upstream.clamp(-100.0, 100.0))


@broken("loss_scale")
class HidesAnOverflow(Own):
    """Infinities in the upstream gradient become numbers, so a gradient scaler takes the step."""

    def backward(self, x, scale, upstream):
        return super().backward(x, scale, upstream.nan_to_num())


@broken("contexts")
class KeepsTheGridOfAnEvaluation(Tutorial):
    """The grid is kept while no gradients are taken, and thrown away when the mode changes, not when numbers do."""

    def grid(self, ndim, width=None):
        if torch.is_grad_enabled():
            return super().grid(ndim, width)
        known = self.__dict__.setdefault("kept", {})
        if ndim not in known:
            known[ndim] = super().grid(ndim, width)
        return known[ndim]

    def train(self, mode=True):
        self.__dict__.pop("kept", None)
        return super().train(mode)


@broken("mode_of_the_call")
class AsksTheModule(Tutorial):
    """Whether the model trains is asked of the module, and not of the call."""

    training_forward = "soft"
    surrogate = None

    def codes(self, steps):
        return steps if self.training else super().codes(steps)


@broken("several_quantizers")
class OptionOfTheClass(Own):
    """An option is an attribute of the class: the quantizer that was made last decides for all."""

    conformance_arguments = ({"share": 0.5},)
    surrogate = None

    def __init__(self, quantization_config, freeze_quant_params=False, share=1.0):
        super().__init__(quantization_config, freeze_quant_params)
        type(self).share = share

    def get_arguments(self):
        return {"share": self.share}

    def backward(self, x, scale, upstream):
        return super().backward(x, scale, upstream) * self.share


@broken("other_device")
class AddsFromTheCpu(Tutorial):
    """What is added to the input is made on the CPU, wherever the input is."""

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(x + torch.zeros(x.shape), grid, training)


class Noisy(BasePytorchTrainableQuantizer):
    """Random rounding in training."""

    training_forward = "random"

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = grid.steps(x)
        codes = torch.floor(steps.detach() + self.noise(x)) if training else steps.detach().round()
        return (
            ops.straight_through(torch.clamp(codes, low, high) + 0.0, torch.clamp(steps, low, high))
            * grid.scale.detach()
        )

    def noise(self, x):
        return torch.rand_like(x)


@broken("random_values")
class NoiseOfThePlace(Noisy):
    """What is called random is a function of the element's place, the same at each call."""

    def noise(self, x):
        return (torch.arange(x.numel(), device=x.device) * 0.618 % 1.0).reshape(x.shape).float()


@broken("seeds")
class SeedsTheNextLayer(Noisy):
    """A seed is set after the noise is drawn, so every dropout behind the quantizer has one mask."""

    def noise(self, x):
        found = super().noise(x)
        torch.manual_seed(7)
        return found


@broken("regularization_arrives")
class TermWithoutAPath(Tutorial):
    """The term on the weights is computed of weights that are cut off."""

    def regularization_of(self, x):
        own, beside = x.detach().square().mean(), super().regularization_of(x)
        return own if beside is None else own + beside


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC, UNIFORM], "STRANGER")
class SoundNoise(Noisy):
    """No mistake."""


@mark_quantizer(QuantizationTarget.Activation, [SYMMETRIC], "STRANGER")
class SoundActivation(Tutorial):
    """No mistake."""


@planted("torch", "several_sizes", FEW)
@mark_quantizer(QuantizationTarget.Activation, [SYMMETRIC], "STRANGER")
class KeepsItsFirstCount(Tutorial):
    """The number of elements in the gradient's scale is that of the first batch."""

    surrogate = None

    def fake_quantize(self, x, grid, training):
        if training:
            self.__dict__.setdefault("count", x.numel())
        share = 1.0 / max(getattr(self, "count", 1), 1) ** 0.5
        scale = grid.scale.detach() + (grid.scale - grid.scale.detach()) * share
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        return self.codes(torch.minimum(torch.maximum(grid.steps(x), low), high)) * scale


SOUND += [SoundNoise, SoundActivation]


# ---- what strangers thought of, who knew the documentation alone ----------------------------------------------------


@broken("random_channels")
class NoiseOfTheWidestChannel(Noisy):
    """The noise is as wide as the widest channel's step, in all channels."""

    def fake_quantize(self, x, grid, training):
        steps = grid.steps(x).clamp(*grid.ends)
        noise = (torch.rand_like(x) - 0.5) * (grid.scale.max() / grid.scale) if training else 0.0
        codes = (steps.detach().round() + noise).clamp(*grid.ends)
        return ops.straight_through(torch.where(x.isnan(), x, codes + 0.0), steps) * grid.scale.detach()


@broken("seeds")
class NoiseOfTheSystem(Noisy):
    """The noise comes from a generator that the system seeds, so that no run can be repeated."""

    def noise(self, x):
        generator = torch.Generator()
        generator.seed()
        return torch.rand(x.shape, generator=generator).to(x.device)


class WithTerm(Tutorial):
    """Draws weights to zero, with a strength that is an option."""

    conformance_arguments = ({"strength": 0.5},)

    def __init__(self, quantization_config, freeze_quant_params=False, strength=0.25):
        super().__init__(quantization_config, freeze_quant_params)
        self.strength = strength

    def get_arguments(self):
        return {"strength": self.strength}

    def own_term(self, x):
        return self.strength * x.square().sum() / max(x.numel(), 1)

    def regularization_of(self, x):
        own, beside = self.own_term(x), super().regularization_of(x)
        return own if beside is None else own + beside


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC], "STRANGER")
class SoundTerm(WithTerm):
    """No mistake."""


SOUND.append(SoundTerm)


@broken("regularization_of_constants")
class KurtosisOfEquals(WithTerm):
    """The term is a kurtosis, which is 0 / 0 where all weights are equal."""

    def own_term(self, x):
        if x.numel() < 2:
            return self.strength * x.sum() * 0.0
        centered = x - x.mean()
        return self.strength * centered.square().square().mean() / centered.square().mean().square()


@broken("contexts")
class TermInHalfPrecision(WithTerm):
    """The sum of squares is a matrix product, which autocast computes in half precision."""

    def own_term(self, x):
        flat = x.flatten()
        return self.strength * (flat @ flat) / max(x.numel(), 1)


@broken("contexts")
class SwitchesAutocastOff(Tutorial):
    """Autocast is switched off by the global switch, and stays off for the layers behind."""

    def fake_quantize(self, x, grid, training):
        torch.set_autocast_enabled("cpu", False)
        return super().fake_quantize(x, grid, training)


@broken("representation")
class ShowsItsThreshold(Tutorial):
    """What is printed shows the threshold, without asking whether there is one."""

    def extra_repr(self):
        return f"threshold={float(self.threshold.detach().mean()):.4g}"


@broken("disabled")
class AlwaysOn(Tutorial):
    """The call is written anew, without the question whether quantization is switched off."""

    def forward(self, inputs, training=None):
        self.require_calibrated()
        if inputs.dtype == torch.float32 and not self.modifiers and self.quantization_config.enabled is False:
            structure = self.grid(inputs.dim() if self.quantization_config.channels_axis is not None else 0)
            return self.fake_quantize(inputs, structure, bool(training))
        return super().forward(inputs, training)


@broken("python_state")
class WarmUpInPython(Tutorial):
    """How often it was called is counted in an attribute, which no checkpoint has, and which a graph counts once."""

    surrogate = None

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.calls = 0

    def fake_quantize(self, x, grid, training):
        if training:
            self.calls += 1
        share = 1.0 if self.calls < 500 else 0.5
        scale = grid.scale.detach() + (grid.scale - grid.scale.detach()) * share
        return self.codes(grid.steps(x).clamp(*grid.ends)) * scale


@broken("process_settings")
class SeedsItsStart(Tutorial):
    """The constructor sets a seed, so that its start can be repeated: so can every shuffle after it."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        torch.manual_seed(0)
        super().__init__(quantization_config, freeze_quant_params)


@broken("freed")
class RemembersAll(Tutorial):
    """A list of the class has every quantizer, for a plot: none is ever freed."""

    made: list[nn.Module] = []  # noqa: RUF012 - the mistake

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.made.append(self)


@broken("recalibration")
class DrawnToItsFirstStart(Tutorial):
    """The term draws thresholds to those of the first training step, which a second calibration doesn't renew."""

    def add_variables(self):
        super().add_variables()
        self.add_state("anchor", np.zeros(self.structure.shape, np.float32))

    def fake_quantize(self, x, grid, training):
        if training:
            here = self.read_variable("threshold").detach()
            self.set_state("anchor", torch.where(self.anchor == 0, here, self.anchor))
        return super().fake_quantize(x, grid, training)

    def regularization(self):
        distance = self.read_variable("threshold") - self.anchor
        return 0.25 * torch.where(self.anchor == 0, 0.0, distance).square().mean()


class Consumed(torch.autograd.Function):
    """Passes gradients where its mask is one, and writes the product into the mask."""

    @staticmethod
    def forward(ctx, steps, low, high):
        ctx.mask = ((steps >= low) & (steps <= high)).float()
        return steps.clamp(low, high).round() + 0.0

    @staticmethod
    def backward(ctx, upstream):
        return ctx.mask.mul_(upstream).clone(), None, None


@broken("interleaved_calls")
class ConsumesItsMask(Tutorial):
    """The backward pass multiplies into its mask: a second one through the same call has the product of both."""

    surrogate = None

    def fake_quantize(self, x, grid, training):
        return Consumed.apply(grid.steps(x), *grid.ends) * grid.scale


@broken("bad_batches")
class PoisonedAverage(Tutorial):
    """A moving average takes whatever comes, a NaN or an infinity too, and keeps it."""

    def add_variables(self):
        super().add_variables()
        self.add_state("average", np.zeros((), np.float32))

    def fake_quantize(self, x, grid, training):
        if training and x.numel():
            self.set_state("average", 0.9 * self.average + 0.1 * x.detach().abs().max())
        return super().fake_quantize(x, grid, training)


@broken("config_round_trip")
class RoundsItsOption(WithTerm):
    """The option is rounded to three digits in the document: a strength of 1e-4 is zero after loading."""

    def get_arguments(self):
        return {"strength": round(self.strength, 3)}


@broken("config_round_trip")
class ZeroIsNotGiven(WithTerm):
    """`strength or 0.25`: whoever switches the term off, with zero, trains with the default."""

    def __init__(self, quantization_config, freeze_quant_params=False, strength=0.25):
        super().__init__(quantization_config, freeze_quant_params, strength or 0.25)


@broken("refusals")
class TakesAnyOption(WithTerm):
    """The constructor takes any keyword, so a misspelt option is passed over."""

    def __init__(self, quantization_config, freeze_quant_params=False, **options):
        super().__init__(quantization_config, freeze_quant_params, options.get("strength", 0.25))


@broken("loss_scale")
class DropsSmallGradients(Own):
    """Gradients below 1e-6 are set to zero as noise: a mean over a large output has no others."""

    def backward(self, x, scale, upstream):
        gradient = super().backward(x, scale, upstream)
        return torch.where(gradient.abs() < 1e-6, 0.0, gradient)


@broken("other_device")
class ConstantFromTheConstructor(Tutorial):
    """A constant is made in the constructor: a model that was made on the meta device has it there for good."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.half = torch.full((), 0.5)

    def fake_quantize(self, x, grid, training):
        half = self.half if x.device == self.half.device else self.half.to(x.device)
        return super().fake_quantize(x, grid, training) * (half + half)


@broken("gradient_mode")
class AsksForAGradient(Tutorial):
    """A training call asks for the gradient of its input: the user's batch keeps it."""

    def fake_quantize(self, x, grid, training):
        if training and torch.is_grad_enabled() and x.is_leaf and not x.requires_grad:
            x.requires_grad_()
        return super().fake_quantize(x, grid, training)


@broken("replaced_methods")
class PassesHooksOver(Tutorial):
    """A call goes to `forward` directly: hooks on the quantizer are never called."""

    def __call__(self, inputs, training=None):
        return self.forward(inputs, training)


@broken("modifier_state")
class ObservesForItself(Tutorial):
    """`observe` is written anew without the base class's: no modifier sees a weight."""

    @torch.no_grad()
    def observe(self, x):
        self.__dict__["norm"] = float(x.norm())


@broken("modifier_state")
class CopiesItsConfig(Tutorial):
    """A copy is made of the config alone, without what modifiers have counted."""

    def __deepcopy__(self, memo):
        again = type(self).from_config(self.get_config())
        again.train(self.training)
        memo[id(self)] = again
        return again


@broken("declared_variables", POWER_OF_TWO)
class ExponentialOfAProduct(Tutorial):
    """A threshold of 2**13 comes back a little larger by `exp(v * log(2))`, and a power of two doubles it."""

    grid_parameters = ("log2_threshold",)

    def encode_grid(self, numbers):
        return {"log2_threshold": np.log2(numbers["threshold"])}

    def decode_grid(self, variables):
        return {"threshold": (variables["log2_threshold"] * float(np.log(2))).exp()}


@broken("contexts")
class DeterministicForAll(Tutorial):
    """The constructor demands deterministic algorithms of the whole process, for the method's own sum."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        torch.use_deterministic_algorithms(True)


@broken("contexts")
class DefaultDtypeForAll(Tutorial):
    """A call sets the default dtype, so that its constants have it, and does not put it back."""

    def fake_quantize(self, x, grid, training):
        torch.set_default_dtype(torch.float32)
        return super().fake_quantize(x, grid, training)


@broken("several_quantizers")
class SizesByName(Tutorial):
    """The number of elements is kept for all models of the process, by the layer's name."""

    sizes: dict[str, int] = {}  # noqa: RUF012 - the mistake

    def initialize_quantization(self, tensor_shape, name, layer):
        self.elements = self.sizes.setdefault(name, int(np.prod(tensor_shape)))
        return super().initialize_quantization(tensor_shape, name, layer)

    def fake_quantize(self, x, grid, training):
        factor = max(self.elements, 1) ** -0.5
        scale = grid.scale.detach() + (grid.scale - grid.scale.detach()) * factor
        return super().fake_quantize(x, grid, training) / grid.scale.detach() * scale

    surrogate = None


@broken("schedule_resume")
class LoadsOnlyByItself(Tutorial):
    """A number is read in `load_state_dict`, which PyTorch calls for a whole model and for no part of it."""

    strength = 0.0

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        state[prefix + "strength"] = torch.tensor(self.strength)
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        state = dict(state_dict)
        self.strength = float(state.pop("strength"))
        return super().load_state_dict(state, strict, assign)


@broken("regularization_gradient")
class TermOfNoCallsYet(Tutorial):
    """A term is divided by the number of calls: the first loss, before any call, is NaN."""

    def add_variables(self):
        super().add_variables()
        self.add_state("calls", np.zeros((), np.float32))

    def fake_quantize(self, x, grid, training):
        if training:
            self.set_state("calls", self.calls + 1)
        return super().fake_quantize(x, grid, training)

    def regularization(self):
        return 1e-3 * (self.threshold.square().mean() * self.calls.sign()) / self.calls.sign()


@broken("python_state")
class CoinOfPython(Tutorial):
    """A generator of Python's own decides about each call: no checkpoint has it, and a graph asks it once."""

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.coin = random.Random(3)  # noqa: S311 - no secret

    def fake_quantize(self, x, grid, training):
        if training and self.coin.random() < 0.5:
            return super().fake_quantize(x.clone(), grid, training)
        return super().fake_quantize(x, grid, training)


@broken("determinism")
class AverageOfGradients(Own):
    """A moving average is set in the backward pass, of an evaluation too: a saliency map trains it."""

    def add_variables(self):
        super().add_variables()
        self.add_state("size", np.zeros((), np.float32))

    def backward(self, x, scale, upstream):
        with torch.no_grad():
            self.size.mul_(0.9).add_(0.1 * upstream.abs().nan_to_num(posinf=0.0).sum())
        return super().backward(x, scale, upstream)


@broken("bad_batches")
class MeanOfNothing(Tutorial):
    """The average of an empty tensor is NaN, and stays in the state."""

    def add_variables(self):
        super().add_variables()
        self.add_state("average", np.zeros((), np.float32))

    def fake_quantize(self, x, grid, training):
        if training:
            with torch.no_grad():
                mean = torch.where(x.isfinite(), x.abs(), 0.0).mean()
            self.set_state("average", 0.9 * self.average + 0.1 * mean)
        return super().fake_quantize(x, grid, training)
