"""The base of every PyTorch quantizer: a module that owns its variables; the rest is core's.

A training method subclasses it and writes `fake_quantize`. Everything else has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray
from torch import Tensor, nn

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import SIGNED
from trainable_core.enums import VariableGroup
from trainable_core.errors import QuantizerStateError, ShapeMismatchError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_torch import grid as grids
from trainable_torch import inferable, ops
from trainable_torch.grid import Grid
from trainable_torch.kernels import cache, native


class BasePytorchTrainableQuantizer(nn.Module, BaseTrainableQuantizer, BaseInferableQuantizer):  # type: ignore[misc]
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

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        nn.Module.__init__(self)
        self._forms: dict[Any, Any] = {}
        BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)
        self._axis = quantization_config.channels_axis
        if self.stores_sign:
            self.register_buffer(SIGNED, torch.tensor(self.signed))

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` on the grid, with this method's gradient; what a training method writes.

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
        raise NotImplementedError

    def rule(self, x: Tensor, grid: Grid) -> ops.Rule | None:  # noqa: ARG002 - for those that have one
        """Return all that `fake_quantize` does with `x`, or None: it does something of its own.

        With a rule a layer and its quantizers can be one function; see `trainable_torch.kernels.layer`.
        """
        return None

    def checked_rule(self, x: Tensor) -> ops.Rule | None:
        """Return the rule for a float32 tensor that was found fit, with the errors of `forward`; None: it has none."""
        if not self.quantization_config.enabled:
            return None
        self.require_calibrated()
        self._check_channels(x.shape)
        return self.rule(x, self.grid(x.dim()))

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` fake-quantized on the selected width's grid; a method that mixes widths overrides it."""
        return self.fake_quantize(x, self.grid(x.dim()), training)

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
        if not self.quantization_config.enabled:
            return inputs
        self.require_calibrated()
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ShapeMismatchError(self.subject, "a floating tensor", getattr(inputs, "dtype", type(inputs).__name__))
        self._check_channels(inputs.shape)
        values = inputs if inputs.dtype == torch.float32 else inputs.float()
        quantized = self.quantize(values, self.training if training is None else bool(training))
        return quantized if quantized.dtype == inputs.dtype else quantized.to(inputs.dtype)

    def _check_channels(self, shape: torch.Size) -> None:
        axis = self._axis
        if axis is not None:
            channels = self.structure.shape[0]
            if not -len(shape) <= axis < len(shape) or shape[axis] != channels:
                raise ShapeMismatchError(
                    self.subject, f"{channels} channels along axis {axis}", f"shape {tuple(shape)}"
                )

    def grid(self, ndim: int, width: int | None = None) -> Grid:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        width = width or self.structure.width or self.selected_width
        form: grids.Form
        if torch.compiler.is_compiling():
            form, shape, names = self._form(ndim, width)
            return form.grid(tuple([getattr(self, name) for name in names]), shape)
        key = ndim, width, self._signed
        form, shape, names = self._forms.get(key) or self._forms.setdefault(key, self._form(ndim, width))
        variables = tuple([getattr(self, name) for name in names])
        if native.compiled() is not None or not cache.is_plain(*variables):  # the loops are as fast as looking it up
            return form.grid(variables, shape)
        if torch.is_grad_enabled() and any(variable.requires_grad for variable in variables):
            return form.grid(variables, shape)
        made: Grid = cache.unlearned(self, key, variables, lambda: form.grid(variables, shape))
        return made

    def _form(self, ndim: int, width: int) -> tuple[grids.Form, tuple[int, ...], tuple[str, ...]]:
        """Return what makes one width's grid, the shape of its scale, and the names of its variables."""
        config = self.quantization_config
        method, axis = config.quantization_method, config.channels_axis
        names, shape = self.structure.names[width], self.structure.shape
        if axis is not None:
            shape = tuple([shape[0] if index == axis % ndim else 1 for index in range(ndim)])
        return grids.form(method, width, signed=self.signed, min_threshold=config.min_threshold), shape, names

    def convert2inferable(self) -> inferable.InferableQuantizer:
        """Return mctq's inferable quantizer, mended, with the trained numbers; this quantizer goes on as it is.

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the config switches quantization off.
        """
        config = self.quantization_config
        if not config.enabled:
            raise QuantizerStateError(self.subject, "its config switches quantization off; there is nothing to deploy")
        self.require_calibrated()
        width = self.selected_width
        qparams = self.current_qparams(width)
        device = next(iter(self.grid_variables(width).values())).device
        built = inferable.build(config.target, config.quantization_method, width, qparams, self.tensor_ndim)
        return built.to(device).train(self.training)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen
        for name in self.variable_names:
            variable = self.get_quantizer_variable(name)
            if isinstance(variable, nn.Parameter):
                variable.requires_grad_(not frozen)
                if frozen:
                    variable.grad = None

    # ---- the primitives core asks for -------------------------------------------------------------------------------

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 tensor: as a parameter when it is trained, else as a buffer; see core's base class."""
        value = torch.as_tensor(variable).detach().to(torch.float32)
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
        if SIGNED in self._buffers:
            self.get_buffer(SIGNED).fill_(self._signed)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts from."""
        return {**self.__dict__, "_forms": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> BasePytorchTrainableQuantizer:  # noqa: FBT001, FBT002 - torch's signature
        """Move the variables; they stay float32 whatever dtype the model is cast to."""
        super()._apply(lambda tensor: inferable.keep_float32(fn, tensor), recurse)  # type: ignore[no-untyped-call] # torch leaves it so
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        sign = state_dict.get(prefix + SIGNED) if self.stores_sign else None
        if sign is not None and not sign.is_meta:
            self._signed = bool(sign)
        variables = (
            [v for width in self.widths for v in self.grid_variables(width).values()] if self.variable_names else []
        )
        if variables and not any(variable.is_meta for variable in variables):
            self.calibrated = not any(bool(variable.isnan().all()) for variable in variables)

    def extra_repr(self) -> str:
        """Return grid and state in a few words."""
        config = self.quantization_config
        axis = "" if config.channels_axis is None else f", channels_axis={config.channels_axis}"
        state = "" if self.calibrated else ", not calibrated"
        return f"{self.training_method}, {config.quantization_method}, n_bits={config.n_bits}{axis}{state}"
