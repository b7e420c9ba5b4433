"""The base of every PyTorch quantizer: a module that owns its variables; the rest is core's.

A training method subclasses it and writes `fake_quantize`, or a `rule` that stands for it. Everything else has a
default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray
from torch import Tensor, nn

from trainable_core import qparams
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import SIGNED
from trainable_core.enums import VariableGroup
from trainable_core.errors import InvalidArgumentError, ShapeMismatchError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.schedule import AnnealingScheduler
from trainable_torch import granularity, inferable, kernels, ops
from trainable_torch import grid as grids
from trainable_torch.annealing import PytorchLinearAnnealingScheduler, value_at
from trainable_torch.grid import Grid
from trainable_torch.kernels.cache import Dependencies

_CALLED = "__call__", "forward", "quantize", "fake_quantize", "rule", "grid"
"""What stands between a call and the kernels: whoever replaces one of these is called."""

RESHAPED = (
    "if the weight has another shape than when it was wrapped, calibrate(qmodel, force=True) makes new thresholds."
)
"""Hint for a weight that doesn't fit its thresholds any more."""


class BasePytorchTrainableQuantizer(
    nn.Module, BaseTrainableQuantizer, metaclass=UnlistedSubclass, of=BaseInferableQuantizer
):
    """Base class of trainable PyTorch quantizers.

    Parameters
    ----------
    quantization_config : TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig
        What to quantize and how; empty params are filled in by calibration.
    freeze_quant_params : bool
        Whether the quantizer's variables stay as they are while the model trains.

    Notes
    -----
    Variables are float32 and stay float32 when the model is cast; fake quantization is computed in float32 and returned
    in the input's dtype. NaN inputs stay NaN, infinities saturate.
    """

    backend: ClassVar[str] = "torch"

    estimated_by: ClassVar[tuple[str, ...]] = ("fake_quantize", "rule", "quantize", "forward", "__call__")
    """Methods one of which a training method writes."""

    scheduler = PytorchLinearAnnealingScheduler
    """Schedule whose step may be a tensor, such as `current_step`."""

    step: Tensor
    """Number of training steps counted so far, an int64 buffer; where the class says `counts_steps`."""

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        nn.Module.__init__(self)
        self._forms: dict[int, grids.Form] = {}
        BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)
        self._axis, self._enabled = quantization_config.channels_axis, quantization_config.enabled
        self._blocks = quantization_config.blocks
        if self.stores_sign:
            self.register_buffer(SIGNED, torch.tensor(self.signed))

    # ---- what a method writes: `fake_quantize`, or a `rule` ----------------------------------------------------------

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - mctq's call
        """Return `x` on the grid, with this method's gradient; by default what its `rule` says.

        Parameters
        ----------
        x : Tensor, float32, any shape
            Real values.
        grid : Grid
            Its numbers, shaped to broadcast against `x`; gradients given to `grid.scale` and `grid.zero_point` reach
            the variables.
        training : bool
            Whether the model trains.

        Returns
        -------
        Tensor, float32, shape of `x`
            With values that equal ``ops.snap`` on the same grid, when training equals deployment.
        """
        rule = self.rule(x.numel() // max(grid.scale.numel(), 1), grid.quant_max)
        if rule is None:
            message = f"{type(self).__name__} has neither `fake_quantize` nor `rule`"
            raise NotImplementedError(message)
        return ops.fake_quantize(x, grid, rule)

    def rule(self, sharing: int, quant_max: int) -> ops.Rule | None:  # noqa: ARG002 - for those that have one
        """Return how gradients come back, where that is all there is to the method; None: `fake_quantize` does more.

        A method with a rule needs no `fake_quantize`, and is as fast as the built-in ones: a layer and its quantizers
        can then be one function.

        Parameters
        ----------
        sharing : int
            Number of elements of the tensor that share one scale.
        quant_max : int
            Last code of the grid.
        """
        return None

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` fake-quantized on the selected width's grid; a method that mixes widths overrides it."""
        made = None if torch.compiler.is_compiling() else self._fake_quantization(x)
        if made is None or not made.fits(x):
            return self.fake_quantize(x, self.grid(x.dim()), training)
        return made.apply(x)

    # ---- calling ----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return the input fake-quantized, in its own dtype, on its own device.

        Parameters
        ----------
        inputs : Tensor, any shape and floating dtype
            What to quantize; never changed.
        training : bool, optional
            Whether the model trains; by default the module's own mode.

        Raises
        ------
        QuantizerStateError
            Before calibration.
        ShapeMismatchError
            When the input is no floating tensor, or has another number of channels than the quantizer.
        """
        if not self._enabled:
            return inputs
        if not self.calibrated:
            self.require_calibrated()
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ShapeMismatchError(self.subject, "a floating tensor", getattr(inputs, "dtype", type(inputs).__name__))
        if self._axis is not None:
            self._check_channels(inputs.shape)
        values = inputs if inputs.dtype == torch.float32 else inputs.float()
        trains = self.training if training is None else bool(training)
        quantized = self.modified_values(self.laid_out(values), trains)
        if self._blocks is not None:
            quantized = granularity.tensor_of(quantized, self._blocks, tuple(inputs.shape))
        return quantized if quantized.dtype == inputs.dtype else quantized.to(inputs.dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return `x` with a row for each block that has a scale of its own, if some have."""
        return x if self._blocks is None else granularity.rows_of(x, self._blocks)

    def modified_values(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - as in `forward`
        """Return what the method, and the modifiers that change values, make of a float32 tensor; see `laid_out`."""
        if not self.modified:
            return self.quantize(x, training)
        entered = x
        for modifier in self.modifiers:
            entered = modifier.enter(self, entered, training)
        quantized = self.quantize(entered, training)
        for modifier in self.modifiers:
            quantized = modifier.leave(self, x, quantized, training)
        return quantized

    def fake_quantization(self, x: Tensor) -> kernels.FakeQuantization | None:
        """Return what `forward` does with a float32 tensor, where that is a rule on a grid; else None.

        Raises
        ------
        QuantizerStateError, ShapeMismatchError
            As `forward` does.
        """
        return None if self.__dict__["_blocks"] is not None else self._fake_quantization(x)

    def _fake_quantization(self, x: Tensor) -> kernels.FakeQuantization | None:
        """Return what `quantize` does with a float32 tensor, which has a row for each block where there are blocks."""
        # a look into the dictionary costs a tenth of an attribute, and a small layer asks two quantizers at each call
        fields: Any = self.__dict__
        cls: Any = type(self)
        own = fields["modified"] or not fields.keys().isdisjoint(_CALLED)
        if own or not fields["_enabled"] or not _follows_rule(cls):
            return None  # called by itself, it raises what it has to
        if not fields["_calibrated"]:
            self.require_calibrated()
        structure = fields["structure"]
        width = structure.width or self.selected_width
        form = fields["_forms"][width]
        shape, sharing = structure.shape, x.numel()
        if fields["_axis"] is not None:
            if fields["_blocks"] is None:
                self._check_channels(x.shape)
            sharing //= shape[0] or 1
            shape = self._scale_shape(x.dim())
        rule = self.rule(sharing, form.quant_max)
        return None if rule is None else kernels.FakeQuantization(form, self._variables(width), shape, rule)

    def dependencies(self) -> Dependencies | None:
        """Return what the values depend on besides the input; None where a method does something of its own."""
        if not self._is_a_rule() or not self._enabled or not self.calibrated or self._blocks is not None:
            return None
        width = self.structure.width or self.selected_width
        return (self._forms[width], self._axis), self._variables(width)

    def snapping(self, x: Tensor) -> kernels.Snapping:
        """Return what snaps tensors of as many dimensions to the grid as it is now, where there are `dependencies`."""
        width = self.structure.width or self.selected_width
        return kernels.Snapping.of(self._forms[width], self._variables(width), self._scale_shape(x.dim()))

    def _is_a_rule(self) -> bool:
        """Return whether a rule is all there is to this quantizer: nothing modifies or replaces what it stands for."""
        cls: Any = type(self)
        return _follows_rule(cls) and not self.modified and self.__dict__.keys().isdisjoint(_CALLED)

    def _check_channels(self, shape: torch.Size) -> None:
        if self._blocks is not None:
            found = math.prod(self._blocks.counts(tuple(shape), self.subject))
            if found != self.structure.shape[0]:
                expected = f"{self.structure.shape[0]} blocks with a scale each"
                raise ShapeMismatchError(self.subject, expected, f"{found} in shape {tuple(shape)}", RESHAPED)
            return
        axis, channels = self._axis, self.structure.shape[0]
        if axis is not None and (not -len(shape) <= axis < len(shape) or shape[axis] != channels):
            expected = f"{channels} channels along axis {axis}"
            raise ShapeMismatchError(self.subject, expected, f"shape {tuple(shape)}", RESHAPED)

    def grid(self, ndim: int, width: int | None = None) -> Grid:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        width = width or self.structure.width or self.selected_width
        if self.grid_parameters:
            return self.grid_of(self.grid_tensors(width), ndim, width)
        return self._forms[width].grid(self._variables(width), self._scale_shape(ndim))

    def grid_of(self, numbers: Mapping[str, Tensor], ndim: int, width: int | None = None) -> Grid:
        """Return the grid of a threshold or a range that the method computed itself, for a tensor of `ndim` dimensions.

        Parameters
        ----------
        numbers : mapping of str to Tensor
            ``threshold``, or ``range_min`` and ``range_max``: one number per tensor or per channel, as the quantizer's
            variables have. They are bounded here; gradients reach them through the grid.
        ndim : int
            Number of dimensions of the tensor that is to be fake-quantized.
        width : int, optional
            Bit width; by default the selected one.
        """
        width = width or self.structure.width or self.selected_width
        names = qparams.variable_names(self.quantization_config.quantization_method)
        return self._forms[width].grid([numbers[name] for name in names], self._scale_shape(ndim))

    def grid_tensors(self, width: int) -> dict[str, Tensor]:
        """Return threshold or range ends of one width as tensors; see core's base class."""
        variables = {key: ops.finite_gradient(variable) for key, variable in self.grid_variables(width).items()}
        return self.decode_grid(variables) if self.grid_parameters else variables

    def read_variable(self, name: str, ndim: int | None = None) -> Tensor:
        """Return a variable, shaped for a tensor of `ndim` dimensions where that is given; see core's base class."""
        variable: Tensor = self.get_quantizer_variable(name)
        if ndim is None or variable.dim() == 0 or tuple(variable.shape) != self.structure.shape:
            return variable
        return variable.view(self._scale_shape(ndim))

    @property
    def is_switched_off(self) -> bool:
        """Whether tensors pass as they are."""
        return not self._enabled

    def deployed_scale(self) -> Tensor:
        """Return the scale of the grid as it would be deployed now, outside of the graph: () or (C,).

        Raises
        ------
        QuantizerStateError
            Before calibration.
        """
        if not self.calibrated:
            self.require_calibrated()
        is_own = type(self).grid is not BasePytorchTrainableQuantizer.grid or "grid" in self.__dict__
        if is_own or self.grid_parameters or torch.compiler.is_compiling():
            scale: Tensor = self.grid(self.tensor_ndim).scale.detach()
            return scale.reshape(-1) if scale.dim() else scale
        width = self.structure.width or self.selected_width
        return self._forms[width].numbers(self._variables(width), self.structure.shape)[0]

    def _variables(self, width: int) -> list[Tensor]:
        fields: Any = self.__dict__
        get = fields["_parameters" if self.learns_grid else "_buffers"].get
        # a variable that something computes, as a parametrization does, is not there
        return [
            getattr(self, name) if (variable := get(name)) is None else variable
            for name in fields["structure"].names[width]
        ]

    def _scale_shape(self, ndim: int) -> tuple[int, ...]:
        axis, shape = self._axis, self.structure.shape
        if axis is None:
            return shape
        sizes = [1] * ndim
        sizes[axis] = shape[0]
        return tuple(sizes)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the variables for a tensor, and decide what is constant about its grids; see core's base class."""
        variables = super().initialize_quantization(tensor_shape, name, layer)
        self._decide_forms()
        return variables

    def _decide_forms(self) -> None:
        config = self.quantization_config
        self._forms = {
            width: grids.form(
                config.quantization_method, width, signed=self._signed, min_threshold=config.min_threshold
            )
            for width in self.structure.widths
        }

    def switch_off(self) -> None:
        """Pass tensors on as they are from here on; see core's base class."""
        super().switch_off()
        self._enabled = False
        self.requires_grad_(requires_grad=False)  # DistributedDataParallel would wait for gradients

    def convert2inferable(self) -> inferable.InferableQuantizer | granularity.DynamicInferableQuantizer:
        """Return mctq's inferable quantizer, mended, with the trained numbers; this quantizer goes on as it is.

        Where mctq has no form for the granularity, it is one of `trainable_torch.granularity`.

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the config switches quantization off.
        """
        config = self.quantization_config
        self.require_deployable()
        width = self.selected_width
        qparams = self.deployed_qparams()
        device = next(iter(self.grid_variables(width).values())).device
        if self._blocks is not None:
            made = granularity.build_blocks(config.quantization_method, width, qparams, self._blocks)
            return made.to(device).train(self.training)
        built = inferable.build(config.target, config.quantization_method, width, qparams, self.tensor_ndim)
        return built.to(device).train(self.training)

    # ---- a schedule's step ------------------------------------------------------------------------------------------

    @property
    def current_step(self) -> Tensor:
        """Number of the present training step, counted from 0, for a `scheduler`; an int64 tensor.

        A forward in training mode is counted before its values are computed: the first one is step 0.
        """
        return (self.step - 1).clamp_min(0)

    def add_step(self) -> None:
        """Create the buffer ``step``; see core's base class."""
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def count_step(self) -> None:
        """Add one to the buffer ``step``; see core's base class."""
        if torch.compiler.is_compiling():
            # A compiled backward may read the step again, and would find it counted on (pytorch/pytorch#197039).
            self.step = self.step + 1
        else:
            self.step += 1

    @property
    def counted_steps(self) -> int:
        """Number of training steps counted so far; see core's base class."""
        return int(self.step) if self.counts_steps and self.variable_names else 0

    @counted_steps.setter
    def counted_steps(self, count: int) -> None:
        self.step.fill_(count)

    def annealed(self, schedule: AnnealingScheduler | float) -> Tensor | float:
        """Return the value of a schedule at the present training step, a float64 tensor; a number as it is."""
        return value_at(schedule, self.current_step) if isinstance(schedule, AnnealingScheduler) else schedule

    def add_state(self, name: str, value: NDArray[Any]) -> None:
        """Keep a float32 tensor as a buffer; see core's base class."""
        self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def set_state(self, name: str, value: Tensor) -> None:
        """Set what `add_state` keeps, outside of the graph."""
        if torch.compiler.is_compiling():  # as in `count_step`
            setattr(self, name, value)
        else:
            self.get_buffer(name).copy_(value)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the modifiers look at a weight; see core's base class."""
        super().observe(x.detach().float())

    def until(self, end: int, soft: Tensor, deployed: Tensor) -> Tensor:
        """Return `soft` in the training steps before `end` steps are counted, and `deployed` from then on.

        Parameters
        ----------
        end : int
            What the class gives as ``schedule_end``.
        soft, deployed : Tensor
            Values in training, of one shape; the gradient comes from the one that is returned.
        """
        return torch.where(self.step.to(torch.float64) >= float(end), deployed, soft)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen
        for name in self.variable_names:
            variable = self.get_quantizer_variable(name)
            if isinstance(variable, nn.Parameter):
                variable.requires_grad_(self._enabled and not frozen)  # one that is switched off has nothing to learn
                if frozen:
                    variable.grad = None

    # ---- the primitives core asks for -------------------------------------------------------------------------------

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 tensor: as a parameter when it is trained, else as a buffer; see core's base class.

        A `torch.nn.Parameter`, such as one of the layer's, is kept as the object it is, and learns unless it is frozen
        or needs no gradient.

        Raises
        ------
        InvalidArgumentError
            When the name can't be an attribute, or a tensor that needs a gradient would have to be copied.
        """
        if not isinstance(name, str) or "." in name or (name not in self._variable_groups and hasattr(self, name)):
            problem = "a variable's name has no dots and is not that of another attribute"
            raise InvalidArgumentError(f"{self.subject}: variable {name!r}", problem)
        given = isinstance(variable, nn.Parameter)
        if isinstance(variable, Tensor) and (given or variable.requires_grad):
            if not given or variable.dtype != torch.float32:
                problem = (
                    f"a {type(variable).__name__} of {variable.dtype} that needs a gradient would have to be copied"
                )
                raise InvalidArgumentError(
                    f"{self.subject}: variable {name!r}", problem, "pass a float32 nn.Parameter."
                )
            learns = variable.requires_grad if trained is None else trained
            variable.requires_grad_(learns and not self.freeze_quant_params)
            self.register_parameter(name, cast("nn.Parameter", variable))
        else:
            value = torch.as_tensor(variable).to(torch.float32)
            if self.learns_grid if trained is None else trained:
                self.register_parameter(name, nn.Parameter(value, requires_grad=not self.freeze_quant_params))
            else:
                self.register_buffer(name, value)
        self._variable_groups[name] = group

    def get_trainable_variables(self, group: VariableGroup) -> list[Tensor]:
        """Return the parameters of one group that an optimizer may change; none when frozen."""
        variables = (self.get_quantizer_variable(name) for name, of in self._variable_groups.items() if of is group)
        return [variable for variable in variables if isinstance(variable, nn.Parameter) and variable.requires_grad]

    def to_numpy(self, variable: Tensor) -> NDArray[Any]:
        """Return a variable's value."""
        array: NDArray[Any] = variable.detach().cpu().numpy()
        return array

    @torch.no_grad()
    def assign(self, variable: Tensor, value: NDArray[Any]) -> None:
        """Set a variable, in place."""
        variable.copy_(torch.as_tensor(value))

    # ---- module life ------------------------------------------------------------------------------------------------

    @property
    def signed(self) -> bool:
        """Whether the grid reaches below zero; a buffer repeats it, for states and for `torch.distributed`."""
        return self._signed

    @signed.setter
    def signed(self, signed: bool) -> None:
        self._signed = bool(signed)
        if self._forms:
            self._decide_forms()
        if SIGNED in self._buffers:
            self.get_buffer(SIGNED).fill_(self._signed)

    def _apply(self, fn: Any, recurse: bool = True) -> BasePytorchTrainableQuantizer:  # noqa: FBT001, FBT002 - torch's signature
        """Move the variables; they stay float32 whatever dtype the model is cast to."""
        super()._apply(lambda tensor: inferable.keep_float32(fn, tensor), recurse)  # type: ignore[no-untyped-call] # torch leaves it so
        return self

    def train(self, mode: bool = True) -> BasePytorchTrainableQuantizer:  # noqa: FBT001, FBT002 - torch's signature
        """Set the mode; no fake-quantized weight is kept through training."""
        if mode:
            kernels.forget(self)
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        sign = state_dict.get(prefix + SIGNED) if self.stores_sign else None
        if sign is not None and not sign.is_meta:
            self._signed = bool(sign)
            self._decide_forms()
        variables = [v for width in self.structure.widths for v in self.grid_variables(width).values()]
        if variables and not any(variable.is_meta for variable in variables):
            self.calibrated = not any(bool(variable.isnan().all()) for variable in variables)

    def extra_repr(self) -> str:
        """Return grid and state in a few words."""
        config = self.quantization_config
        axis = "" if config.channels_axis is None else f", channels_axis={config.channels_axis}"
        axis = axis if self._blocks is None else f", {self._blocks}"
        state = "" if self.calibrated else ", not calibrated"
        return f"{self.training_method}, {config.quantization_method}, n_bits={config.n_bits}{axis}{state}"


@functools.lru_cache(maxsize=256)
def _follows_rule(cls: Any) -> bool:
    """Return whether a class has a rule, and no other method was changed after the rule that stands for them."""
    owners = {name: next(index for index, each in enumerate(cls.__mro__) if name in vars(each)) for name in _CALLED}
    if cls.grid_parameters:  # the kernels make grids from thresholds and ranges themselves
        return False
    return cls.rule is not BasePytorchTrainableQuantizer.rule and owners["rule"] == min(owners.values())
