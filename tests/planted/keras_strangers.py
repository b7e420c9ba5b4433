"""Broken Keras quantizers as an author of a plugin writes them, from the documentation: the docstring says what."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import keras
import numpy as np
from keras import ops as k
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.planted.defect import planted
from tests.planted.keras_defects import DqaQuantizer, LsqQuantizer
from trainable_keras import BaseKerasTrainableQuantizer, Grid
from trainable_keras.keras3 import ops
from trainable_keras.keras3.engine import read, reciprocal, with_gradient

SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
FEW = 0  # cases of the laws that must hold: the same mistakes in PyTorch show that they do


def broken(caught_by: str, method: QuantizationMethod = SYMMETRIC, identifier: str = "STRANGER"):
    """Mark a class and plant it."""

    def mark(cls):
        return planted("keras", caught_by, FEW)(mark_quantizer(QuantizationTarget.Weights, [method], identifier)(cls))

    return mark


# ---- a sound estimator, as the documentation writes one -------------------------------------------------------------


@k.custom_gradient
def round_codes(steps):
    """Round half up, and pass the gradient."""
    down = k.floor(steps)
    codes = down + k.cast(steps - down >= 0.5, "float32")

    def backward(*given, upstream=None):
        return given[0] if upstream is None else upstream

    return codes, backward


def clipped(x, grid):
    return np.clip(x / grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)


class Tutorial(BaseKerasTrainableQuantizer):
    """Straight-through rounding between the ends, with a learned grid and a surrogate."""

    learns_grid = True

    def codes(self, steps: Any) -> Any:
        return round_codes(steps)

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        return self.codes(k.minimum(k.maximum(grid.steps(x), low), high)) * grid.scale

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        return lambda x, grid: (np.rint(here) - here + clipped(x, grid)) * grid.scale


def ste(x, grid, slope=lambda upstream, inside, x: k.where(inside, upstream, 0.0)):
    """Return values of the deployed formula, with a gradient that is a function of upstream, mask and input."""
    low, high = grid.ends
    scale = k.stop_gradient(grid.scale)
    fixed = Grid(scale, k.stop_gradient(grid.zero_point), grid.quant_min, grid.quant_max, grid.centered)

    def backward(upstream, _, x):
        steps = x * reciprocal(scale)
        return (slope(upstream, k.logical_and(steps >= low, steps <= high), x),)

    return with_gradient(lambda x: k.copy(ops.ste_fake_quantize(x, fixed)), backward)(x)


class Own(BaseKerasTrainableQuantizer):
    """STE on a fixed grid by a function of its own."""

    def slope(self, upstream, inside, x):
        return k.where(inside, upstream, 0.0)

    def fake_quantize(self, x, grid, training):
        return ste(x, grid, self.slope)

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        return lambda x, grid: (np.rint(here) - here + clipped(x, grid)) * grid.scale


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC, POWER_OF_TWO, UNIFORM], "STRANGER")
class SoundTutorial(Tutorial):
    """No mistake."""


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC], "STRANGER")
class SoundOwn(Own):
    """No mistake."""


SOUND = [SoundTutorial, SoundOwn]


def rebuilt(quantizer, memo):
    """Return a deep copy of a quantizer whose class has a `__deepcopy__`."""
    make, arguments = quantizer.__reduce__()
    return make(*copy.deepcopy(arguments, memo))


class Shipped:
    """A deployed quantizer that is a formula."""

    def __init__(self, formula) -> None:
        self.formula = formula

    def __call__(self, x: Any) -> Any:
        return self.formula(x)


# ---- sizes, NaN, dtypes ---------------------------------------------------------------------------------------------


def count(x):
    return int(np.prod(tuple(x.shape)))


@broken("tensor_size")
class DropsTheTail(Tutorial):
    """The kernel works in blocks of 2**12 elements, and leaves what is over to nobody."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        whole = count(x) - count(x) % 2**12
        if not whole:
            return values
        return k.where(k.reshape(k.arange(count(x)), x.shape) < whole, values, 0.0)


@broken("tensor_size")
class HalfForLargeTensors(Tutorial):
    """Large tensors are divided in half precision, to save memory."""

    def fake_quantize(self, x, grid, training):
        if count(x) > 2**16:
            x = k.cast(k.cast(x / grid.scale, "float16"), "float32") * grid.scale
        return super().fake_quantize(x, grid, training)


@broken("tensor_size")
class GradientOfTheFirstBlock(Own):
    """The backward kernel is launched for 2**16 elements at most."""

    def slope(self, upstream, inside, x):
        first = k.reshape(k.arange(count(x)), x.shape) < 2**16
        return k.where(k.logical_and(inside, first), upstream, 0.0)


@broken("nan_inputs")
class NanToZero(Tutorial):
    """Missing values become zeros."""

    def fake_quantize(self, x, grid, training):
        return super().fake_quantize(k.where(k.isnan(x), 0.0, x), grid, training)


@broken("deployed_dtypes")
class DeployedGivesFloat32(Tutorial):
    """What is deployed returns float32, whatever it is given."""

    def convert2inferable(self):
        inferable = super().convert2inferable()
        return Shipped(lambda x: inferable(k.cast(x, "float32")))


@broken("deployed_dtypes")
class DeploysInHalf(Tutorial):
    """What is deployed multiplies back in the dtype that it is given."""

    def convert2inferable(self):
        inferable = super().convert2inferable()

        def formula(x):
            if str(x.dtype).endswith("float32'>") or "float32" in str(x.dtype):
                return inferable(x)
            return inferable(x) * k.cast(1.0078125, x.dtype)

        return Shipped(formula)


@broken("evaluation_gradients")
class CutInEval(Tutorial):
    """In eval mode the output is cut from the graph."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return values if training else k.stop_gradient(values)


@broken("evaluation_gradients")
class QuotientInEval(Tutorial):
    """In eval mode a quotient is masked at zero, and its gradient is not."""

    def fake_quantize(self, x, grid, training):
        values = super().fake_quantize(x, grid, training)
        return values if training else values + k.where(k.abs(x) < 1e-3, 0.0, 0.0 * (1.0 / x))


@broken("nonfinite_inputs")
class MaskedByAProduct(Own):
    """Where the gradient does not pass, a distance is multiplied by zero; that of an infinity is not a number."""

    def slope(self, upstream, inside, x):
        mask = k.cast(inside, "float32")
        return upstream * mask + 0.0 * x * (1 - mask)


@broken("nonfinite_inputs")
class NormalizedGradient(Own):
    """The gradient is divided by the tensor's largest magnitude, and multiplied back."""

    def slope(self, upstream, inside, x):
        largest = k.maximum(k.max(k.abs(x)), 1.0) if count(x) else 1.0
        return super().slope(upstream, inside, x) / largest * largest


@broken("dtype_gradients")
class HalfInBackward(Own):
    """The backward pass multiplies in the dtype of the input."""

    def call(self, inputs, training=None):
        self.given = keras.backend.standardize_dtype(inputs.dtype)
        return super().call(inputs, training)

    def slope(self, upstream, inside, x):
        scale = k.stop_gradient(self.grid(len(x.shape)).scale)
        dtype = "float32" if self.given == "float64" else self.given
        steps = x * reciprocal(scale)
        error = 1 - k.abs(steps - ops.round_half_up(steps))
        gradient = k.cast(k.cast(upstream, dtype) * k.cast(error, dtype), "float32")
        return k.where(inside, gradient, 0.0)

    def surrogate(self, x, grid, upstream):
        here = clipped(x, grid)
        slope = 1 - np.abs(here - np.rint(here))
        return lambda x, grid: (np.rint(here) + slope * (clipped(x, grid) - here)) * grid.scale


# ---- sequences of calls ---------------------------------------------------------------------------------------------


@broken("interleaved_calls")
class KeepsItsMaskOnSelf(Own):
    """The backward pass reads the mask from the quantizer, where the next forward has put another one."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = k.stop_gradient(x * reciprocal(grid.scale))
        MEMORY["mask"] = k.logical_and(steps >= low, steps <= high)
        return super().fake_quantize(x, grid, training)

    def slope(self, upstream, inside, x):
        return k.where(MEMORY["mask"], upstream, 0.0)


MEMORY: dict[str, Any] = {}


@broken("deploy_after_step")
class DeploysTheLastForward(Tutorial):
    """What is deployed has the numbers of the last call, which a step has changed since."""

    def __call__(self, inputs, training=None, **arguments):
        values = super().__call__(inputs, training=training, **arguments)
        LAST[id(self)] = self.current_qparams()
        return values

    def convert2inferable(self):
        sound = super().convert2inferable()
        if id(self) not in LAST:
            return sound
        config = self.quantization_config
        return self.inferable_class(config.target, config.quantization_method)(
            LAST[id(self)], self.selected_width, self.tensor_ndim
        )

    def initialize_quantization(self, tensor_shape, name, layer):
        LAST.pop(id(self), None)
        return super().initialize_quantization(tensor_shape, name, layer)


LAST: dict[int, Any] = {}


@broken("convert_midway")
class DeployedShares(Tutorial):
    """What is deployed reads the variables that are still trained."""

    def convert2inferable(self):
        self.require_calibrated()
        return Shipped(lambda x: self(x, training=False))


@broken("convert_midway")
class ConvertingFreezes(LsqQuantizer):
    """Converting switches learning off, and nobody switches it on again."""

    def convert2inferable(self):
        inferable = super().convert2inferable()
        for variable in self.trainable_variables:
            variable.trainable = False
        return inferable


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


@broken("load_then_deploy")
class ProtectsWhatItLearned(Tutorial):
    """A state is loaded before the first call only, to protect what was trained."""

    used = False

    def call(self, inputs, training=None):
        self.used = True
        return super().call(inputs, training)

    def load_own_variables(self, store):
        if not self.used:
            super().load_own_variables(store)


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

    def __call__(self, inputs, training=True, **arguments):
        return super().__call__(inputs, training=training, **arguments)


@broken("second_initialization")
class InitializesAgain(Tutorial):
    """A second initialization goes back to the config's numbers."""

    def initialize_quantization(self, tensor_shape, name, layer):
        variables = super().initialize_quantization(tensor_shape, name, layer)
        params = {width: self._config_params(width) for width in self.structure.widths}
        if all(set(given) - {"is_signed"} for given in params.values()):
            self.set_quantization_params(params)
        return variables


# ---- schedules and regularization -----------------------------------------------------------------------------------


@broken("schedule_count", identifier="DQA")
class CountsTwice(DqaQuantizer):
    """A training call counts a step after it, too."""

    def quantized(self, x, training):
        values = super().quantized(x, training)
        if training:
            self.advance()
        return values


@broken("schedule_count")
class CountsEvaluations(DqaQuantizer):
    """An evaluation counts a step."""

    def quantized(self, x, training):
        if not training:
            self.advance()
        return super().quantized(x, training)


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
        again.step.assign(0)
        return again


@broken("regularization_gradient", identifier="DQA")
class DetachedTerm(DqaQuantizer):
    """The term for the loss is cut from the graph."""

    def regularization(self):
        term = super().regularization()
        return None if term is None else k.stop_gradient(term)


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
        return k.convert_to_tensor(np.float32(np.abs(self.to_numpy(self.threshold)).sum()))


@broken("regularization_once", identifier="DQA")
class TermAddedTwice(DqaQuantizer):
    """The method adds its term to the losses, and the base class does too."""

    def quantized(self, x, training):
        if training and self.bit_cost_weight:
            self.add_loss(self.regularization())
        return super().quantized(x, training)


@broken("regularization_once")
class TermNeverAdded(Tutorial):
    """The class has a call of its own, which forgets the term."""

    def regularization(self):
        return k.sum(read(self.threshold) ** 2)

    def call(self, inputs, training=None):
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return k.cast(self.quantized(k.cast(inputs, "float32"), bool(training)), dtype)


@broken("declared_penalty")
class TermWithoutItsFactor(Tutorial):
    """The term lacks the factor that is declared."""

    def regularization(self):
        return k.mean(read(self.threshold) ** 2)

    def penalty(self, variables, steps):
        return 0.5 * np.mean(variables["threshold"] ** 2)


@broken("declared_penalty")
class TermOfTheStepBefore(Tutorial):
    """The step is counted after the term was made, so that its strength is that of the step before."""

    counts_steps = True

    def regularization(self):
        return k.cast(self.current_step, "float32") * k.mean(read(self.threshold) ** 2)

    def penalty(self, variables, steps):
        return steps * np.mean(variables["threshold"] ** 2)


# ---- states ---------------------------------------------------------------------------------------------------------


@broken("incomplete_states")
class LoadsWhatThereIs(Tutorial):
    """Missing entries are left as they are, and foreign ones passed over."""

    def load_own_variables(self, store):
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        super().load_own_variables({**own, **{name: store[name] for name in store if name in own}})


@broken("incomplete_states")
class TakesForeignEntries(Tutorial):
    """Entries that nobody knows are passed over."""

    def load_own_variables(self, store):
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        super().load_own_variables({name: store[name] for name in store if name in own})


@broken("incomplete_states", UNIFORM)
class LoadsByPosition(Tutorial):
    """Entries are taken in the order in which they come."""

    def load_own_variables(self, store):
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        if set(own) == set(store.keys()):
            store = dict(zip(own, [store[name] for name in store], strict=True))
        super().load_own_variables(store)


@broken("config_round_trip")
class OptionNotWritten(Tutorial):
    """An option was added to the constructor, and not to `get_arguments`."""

    def __init__(self, quantization_config, freeze_quant_params=False, pull=0.5):
        super().__init__(quantization_config, freeze_quant_params)
        self.pull = pull

    def regularization(self):
        return self.pull * k.sum(read(self.threshold) ** 2)


@broken("config_round_trip", identifier="DQA")
class SelectsInAnAttribute(DqaQuantizer):
    """The width that somebody selects is kept in an attribute, which nothing saves."""

    chosen = None

    @property
    def selected_width(self):
        return self.chosen or super().selected_width

    def select_width(self, width):
        self.chosen = width

    def quantized(self, x, training):
        if self.chosen and not training:
            return self.ops.ste_fake_quantize(x, self.grid(len(x.shape), self.chosen))
        return super().quantized(x, training)


@broken("state_round_trip")
class DrawnToItsFirstThreshold(Tutorial):
    """The term draws the threshold to that of the first step, which is in an attribute and not in the state."""

    first = None

    def regularization(self):
        if self.first is None:
            self.first = self.to_numpy(self.threshold)
        return k.sum((read(self.threshold) - self.first) ** 2)


# ---- what is around a call ------------------------------------------------------------------------------------------


@broken("graph_execution")
class LooksAtValues(Tutorial):
    """The call looks at a value of the tensor, which a graph does not have yet."""

    def fake_quantize(self, x, grid, training):
        if count(x) and float(k.max(k.where(k.isfinite(x), k.abs(x), 0.0))) < 0:
            return x
        return super().fake_quantize(x, grid, training)


@planted("keras", "graph_execution", FEW)
@mark_quantizer(QuantizationTarget.Activation, [SYMMETRIC], "STRANGER")
class NeedsTheBatch(Tutorial):
    """The tensor is flattened with the number of its elements, which is not known where the batch is not."""

    def fake_quantize(self, x, grid, training):
        flat = k.reshape(x, (int(np.prod([int(size) for size in x.shape])),))
        return super().fake_quantize(k.reshape(flat, tuple(int(size) for size in x.shape)), grid, training)


@broken("graph_execution")
class ConstantsOfTheFirstGraph(Tutorial):
    """The grid is made once for each rank and kept, with tensors of the first graph in it."""

    def grid(self, ndim, width=None):
        grid = super().grid(ndim, width)
        if hasattr(grid.scale, "numpy"):
            return grid
        return GRAPHS.setdefault((id(self), ndim), grid)


GRAPHS: dict[Any, Any] = {}


@broken("global_random_state")
class DrawsFromKeras(Tutorial):
    """Statistics of a random sample of the tensor are taken in training."""

    def fake_quantize(self, x, grid, training):
        if training:
            keras.random.uniform((3,))
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


HISTORY: list[Any] = []


@broken("kept_memory")
class KeepsAHistory(Tutorial):
    """The last inputs are kept for a plot."""

    def __call__(self, inputs, training=None, **arguments):
        HISTORY[:] = [*HISTORY[-9:], inputs]
        return super().__call__(inputs, training=training, **arguments)


@broken("second_derivatives")
class CutInBackward(Own):
    """The backward pass cuts its result from the graph, except for a zero that keeps it differentiable."""

    def slope(self, upstream, inside, x):
        return k.stop_gradient(super().slope(upstream, inside, x)) + 0.0 * upstream


LOCAL = threading.local()
LOCAL.ready = True


@broken("threads")
class OnlyInTheFirstThread(Tutorial):
    """A thread's own storage is filled when the module is imported: in that thread alone."""

    def fake_quantize(self, x, grid, training):
        if not LOCAL.ready:
            raise AssertionError
        return super().fake_quantize(x, grid, training)


# ---- gradients where tests seldom look ------------------------------------------------------------------------------


@broken("variable_gradients")
class BoundHoldsBack(Tutorial):
    """A maximum bounds the threshold: below the bound nothing leads back."""

    def grid(self, ndim, width=None):
        sound = super().grid(ndim, width)
        bound = max(self.quantization_config.min_threshold, 2.0**-100)
        raw = k.where(k.isnan(read(self.threshold)), bound, read(self.threshold))
        held = k.minimum(k.maximum(raw, bound), 2.0**100)
        scale = k.reshape(held * (-1.0 / sound.quant_min), tuple(sound.scale.shape))
        return Grid(scale, sound.zero_point, sound.quant_min, sound.quant_max, centered=True)


class ByRule(Tutorial):
    """The tutorial's gradients in closed form."""

    def fake_quantize(self, x, grid, training):
        low, high = float(grid.quant_min), float(grid.quant_max)
        sound = super().fake_quantize

        def backward(upstream, _, x, scale):
            steps = x * reciprocal(scale)
            within = k.logical_and(steps >= low, steps <= high)
            held = k.minimum(k.maximum(steps, low), high)
            slope = self.slope(ops.round_half_up(held) - k.where(within, steps, 0.0), x)
            axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
            if not count(x):
                return upstream, k.zeros_like(scale)
            summed = k.sum(upstream * slope, axis=axes, keepdims=True) if axes else k.sum(upstream * slope)
            return k.where(within, upstream, 0.0), k.reshape(summed, scale.shape)

        def forward(x, scale):
            return k.copy(
                sound(x, Grid(scale, grid.zero_point, grid.quant_min, grid.quant_max, centered=True), training)
            )

        return with_gradient(forward, backward)(x, grid.scale)

    def slope(self, slope, x):
        return slope


@broken("variable_gradients")
class SlopeInEightBits(ByRule):
    """The slope outside of the range is held in eight bits."""

    def slope(self, slope, x):
        return k.minimum(k.maximum(slope, -128.0), 127.0)


@broken("variable_gradients")
class HalfForManyAxes(ByRule):
    """The threshold's gradient counts every second element of tensors with more than three axes."""

    def slope(self, slope, x):
        return slope * (0.5 if len(x.shape) > 3 else 1.0)


# ---- frozen, and changed from outside -------------------------------------------------------------------------------


@broken("gradient_of_a_frozen_quantizer")
class PassesWhileFrozen(Own):
    """Frozen, nothing is trained: the backward pass returns the gradient as it came."""

    def slope(self, upstream, inside, x):
        return upstream + 0.0 if self.freeze_quant_params else super().slope(upstream, inside, x)


@broken("modifiers")
class PassesModifiersOver(Tutorial):
    """Modifiers are kept and not asked: the method alone decides the values."""

    def modified_values(self, x, training):
        return self.quantized(x, training)


@broken("replaced_methods")
class CallsByItsClass(Tutorial):
    """A method is called through the class, and what somebody put into the object is passed over."""

    def quantized(self, x, training):
        x = self.ops.off_the_edge(x, k.stop_gradient(self.grid(len(x.shape)).scale))
        return type(self).fake_quantize(self, x, self.grid(len(x.shape)), training)


@broken("modifiers")
class TermOfItsOwnAlone(Tutorial):
    """The method's term for the tensor takes the place of those of the modifiers."""

    def regularization_of(self, x):
        return 1e-4 * k.mean(k.where(k.isfinite(x), k.clip(x, -1.0, 1.0), 0.0) ** 2)


# ---- what authors who had not read the laws got wrong ---------------------------------------------------------------


@broken("gradient_reaches_the_input")
class RoundsWithoutAGradient(Tutorial):
    """The straight-through estimator is forgotten: weights inside the range get no gradient."""

    surrogate = None

    def codes(self, steps: Any) -> Any:
        return k.stop_gradient(super().codes(steps))


@broken("gradient_reaches_the_input")
class StopsWithItsSchedule(Tutorial):
    """When the schedule is over, the values are those that are deployed, and nothing leads to the input any more."""

    training_forward = "soft"
    counts_steps = True
    schedule_end = 3
    surrogate = None

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        values = super().fake_quantize(x, grid, training)
        return self.until(3, values * 0.9375, k.stop_gradient(values)) if training else values


@broken("loss_scale")
class ClipsWhatComesIn(Own):
    """The upstream gradient is clipped, so a large loss scale leaves nothing of it."""

    def slope(self, upstream, inside, x):
        return super().slope(k.clip(upstream, -100.0, 100.0), inside, x)


@broken("regularization_once")
class AddsItsTensorTermTwice(Tutorial):
    """The term on the weights is added to the loss by hand, besides being returned."""

    def regularization_of(self, x: Any) -> Any:
        own, beside = k.mean(x * x), super().regularization_of(x)
        return own if beside is None else own + beside

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        if training:
            self.add_loss(k.mean(x * x))
        return super().fake_quantize(x, grid, training)


@broken("regularization_arrives")
class TermWithoutAPath(Tutorial):
    """The term on the weights is computed of weights that are cut off."""

    def regularization_of(self, x: Any) -> Any:
        own, beside = k.mean(k.square(k.stop_gradient(x))), super().regularization_of(x)
        return own if beside is None else own + beside


class Noisy(BaseKerasTrainableQuantizer):
    """Random rounding in training."""

    training_forward = "random"

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        low, high = grid.ends
        steps = grid.steps(x)
        noise = self.noise(x) if training else 0.5
        codes = k.clip(k.floor(k.stop_gradient(steps) + noise), low, high)
        smooth = k.clip(steps, low, high)
        return (smooth + k.stop_gradient(codes - smooth)) * k.stop_gradient(grid.scale)

    def noise(self, x: Any) -> Any:
        return keras.random.uniform(k.shape(x))


@broken("random_values")
class NoiseOfASeed(Noisy):
    """The noise is drawn with a seed, which gives the same numbers at each call."""

    def noise(self, x: Any) -> Any:
        return keras.random.uniform(k.shape(x), seed=1337)


# ---- what strangers thought of, who knew the documentation alone ----------------------------------------------------


@broken("seeds")
class NoiseOfNumpy(Noisy):
    """The noise comes from a generator that the system seeds, so that no run can be repeated."""

    def noise(self, x: Any) -> Any:
        return k.convert_to_tensor(np.random.default_rng().random(tuple(x.shape), np.float32))


class WithTerm(Tutorial):
    """Draws weights to zero, with a strength that is an option."""

    conformance_arguments = ({"strength": 0.5},)

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False, strength: float = 0.25) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.strength = strength

    def get_arguments(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def own_term(self, x: Any) -> Any:
        return self.strength * k.sum(k.square(x)) / max(count(x), 1)

    def regularization_of(self, x: Any) -> Any:
        own, beside = self.own_term(x), super().regularization_of(x)
        return own if beside is None else own + beside


@broken("regularization_of_constants")
class KurtosisOfEquals(WithTerm):
    """The term is a kurtosis, which is 0 / 0 where all weights are equal."""

    def own_term(self, x: Any) -> Any:
        if count(x) < 2:
            return self.strength * k.sum(x) * 0.0
        centered = x - k.mean(x)
        return self.strength * k.mean(centered**4) / k.square(k.mean(k.square(centered)))


@broken("contexts")
class SetsThePolicy(Tutorial):
    """The constructor sets the dtype policy to float32: layers that are made later leave mixed precision."""

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False) -> None:
        keras.mixed_precision.set_global_policy("float32")
        super().__init__(quantization_config, freeze_quant_params)


@broken("contexts")
class ComputesInThePolicysDtype(Tutorial):
    """Values are rounded to the compute dtype of the global policy."""

    surrogate = None

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        dtype = keras.mixed_precision.global_policy().compute_dtype
        return super().fake_quantize(k.cast(k.cast(x, dtype), "float32"), grid, training)


@broken("process_settings")
class SeedsItsStart(Tutorial):
    """The constructor sets a seed, so that its start can be repeated: so can every shuffle after it."""

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False) -> None:
        random.seed(0)
        super().__init__(quantization_config, freeze_quant_params)


@broken("python_state")
class NotesEachCall(Tutorial):
    """A list gets a number in each training call: in `fit` it has one tensor of a graph, which can't be read."""

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.history: list[Any] = []

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        if training:
            self.history.append(count(x))
        return super().fake_quantize(x, grid, training)


@broken("freed")
class RemembersAll(Tutorial):
    """A list of the class has every quantizer, for a plot: none is ever freed."""

    made: list[Any] = []  # noqa: RUF012 - the mistake

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.made.append(self)


@broken("config_round_trip")
class RoundsItsOption(WithTerm):
    """The option is rounded to three digits in the document: a strength of 1e-4 is zero after loading."""

    def get_arguments(self) -> dict[str, Any]:
        return {"strength": round(self.strength, 3)}


@broken("refusals")
class TakesAnyOption(WithTerm):
    """The constructor takes any keyword, so a misspelt option is passed over."""

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False, **options: Any) -> None:
        super().__init__(quantization_config, freeze_quant_params, options.get("strength", 0.25))


@broken("loss_scale")
class DropsSmallGradients(Own):
    """Gradients below 1e-6 are set to zero as noise: a mean over a large output has no others."""

    def slope(self, upstream: Any, inside: Any, x: Any) -> Any:
        gradient = super().slope(upstream, inside, x)
        return k.where(k.abs(gradient) < 1e-6, k.zeros_like(gradient), gradient)


@broken("bad_batches")
class PoisonedAverage(Tutorial):
    """A moving average takes whatever comes, a NaN or an infinity too, and keeps it."""

    def add_variables(self) -> None:
        super().add_variables()
        self.add_state("average", np.zeros((), np.float32))

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        if training and count(x):
            self.set_state("average", 0.9 * self.state("average") + 0.1 * k.max(k.abs(k.stop_gradient(x))))
        return super().fake_quantize(x, grid, training)


@planted("keras", "graph_execution", FEW)
@mark_quantizer(QuantizationTarget.Activation, [SYMMETRIC], "STRANGER")
class KnowsAllButTheBatch(Tutorial):
    """Static sizes of all axes but the batch are asked for: images of several sizes can't be quantized."""

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        share = 1.0 / max(int(np.prod([int(each) for each in x.shape[1:]])), 1)
        return super().fake_quantize(x, grid, training) * (share / share)


@broken("graph_execution")
class KeepsItsMask(Tutorial):
    """What is clipped is kept in an attribute for a callback: in `fit` that is a tensor of a finished graph."""

    def fake_quantize(self, x, grid, training):
        self.clipped = k.abs(k.stop_gradient(grid.steps(x))) > grid.quant_max
        return super().fake_quantize(x, grid, training)


@broken("graph_execution")
class KeepsTheUpstream(Own):
    """The backward pass keeps the upstream gradient in an attribute, to log its norm."""

    def slope(self, upstream, inside, x):
        self.last = upstream
        return super().slope(upstream, inside, x)


@broken("determinism")
class DrawsWhenEvaluated(Tutorial):
    """Noise is drawn when the model is evaluated too, and not used: validation changes the draws of training."""

    training_forward = "random"
    surrogate = None

    def __init__(self, quantization_config, freeze_quant_params=False):
        super().__init__(quantization_config, freeze_quant_params)
        self.seed_generator = keras.random.SeedGenerator()

    def fake_quantize(self, x, grid, training):
        noise = keras.random.uniform(k.shape(x), -0.5, 0.5, dtype="float32", seed=self.seed_generator)
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = k.minimum(k.maximum(grid.steps(x), low), high)
        if training:
            steps = k.minimum(k.maximum(steps + noise, low), high)
        return self.codes(steps) * grid.scale


@broken("freeze")
class AverageMovesWhenUntrainable(Tutorial):
    """A threshold that is a moving average heeds `freeze_quant_params`, and not Keras's own `trainable = False`."""

    learns_grid = False
    training_forward = "soft"
    depends_on = "tensor"
    surrogate = None

    def quantized(self, x, training):
        if training and not self.freeze_quant_params:
            values = k.stop_gradient(x)
            largest = self.functions.largest(k.where(k.isfinite(values), k.abs(values), 0.0))
            old = self.read_variable("threshold")
            new = k.where(largest > 0, 0.9 * old + 0.1 * largest, old)
            self.get_quantizer_variable("threshold").assign(new)
        return super().quantized(x, training)


@broken("config_round_trip")
class ZeroIsMissing(Tutorial):
    """An option that may be left out: `strength or 0.1` takes a zero for a value that is missing."""

    conformance_arguments = ({"strength": 0.5},)

    def __init__(self, quantization_config, freeze_quant_params=False, strength=None):
        super().__init__(quantization_config, freeze_quant_params)
        self.strength = strength or 0.1

    def get_arguments(self):
        return {"strength": self.strength}
