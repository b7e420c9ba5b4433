"""The base of every PyTorch quantizer: variables, bounds, freezing, conversion, serialization.

A training method subclasses it and writes `fake_quantize`. Everything else has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from torch import Tensor, nn
from trainable_core import qparams
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerConfig,
    TrainableQuantizerWeightsConfig,
    check_params,
)
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.errors import QuantizerStateError, ShapeMismatchError, UnsupportedConfigError
from trainable_core.quantizer import BaseTrainableQuantizer

from trainable_torch import grid as grids
from trainable_torch import inferable
from trainable_torch.grid import Grid

_CONFIGS = {"weights": TrainableQuantizerWeightsConfig, "activation": TrainableQuantizerActivationConfig}


class BasePytorchTrainableQuantizer(nn.Module, BaseTrainableQuantizer, BaseInferableQuantizer):  # type: ignore[misc]
    """Base class of trainable PyTorch quantizers: a module that owns its variables.

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

    A subclass may set `learns_grid` (thresholds and ranges become parameters of the group QPARAMS), override `widths`
    (several grids of different bit widths), `selected_width` (which of them is deployed), `add_variables` (variables of
    its own) and `regularization` (a term for the loss).
    """

    backend: ClassVar[str] = "torch"
    learns_grid: ClassVar[bool] = False

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        nn.Module.__init__(self)
        BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)
        self.signed = quantization_config.signed
        self.calibrated = False
        self.channels_axis = quantization_config.channels_axis
        self._ndim = 0
        self.subject = type(self).__name__

    # ---- what a method writes ---------------------------------------------------------------------------------------

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` on the grid, with this method's gradient.

        Parameters
        ----------
        x : Tensor, float32, any shape
            Real values.
        grid : Grid
            Its numbers, shaped to broadcast against `x`; gradients given to `grid.scale` and `grid.zero_point` reach the
            variables.
        training : bool
            Whether the model trains.

        Returns
        -------
        Tensor, float32, shape of `x`
            With values that equal ``ops.snap`` on the same grid, when training equals deployment.
        """
        raise NotImplementedError

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` fake-quantized on the selected width's grid; a method that mixes widths overrides it."""
        return self.fake_quantize(x, self.grid(x.dim()), training)

    def add_variables(self) -> None:
        """Add variables beyond the grid's own; called once, from `initialize_quantization`."""

    def regularization(self) -> Tensor | None:
        """Return a scalar term for the loss, or None when the method has none."""
        return None

    def advance(self) -> None:
        """Count one training step; for methods with a schedule."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bit widths that the quantizer keeps a grid for."""
        return (self.quantization_config.n_bits,)

    @property
    def selected_width(self) -> int:
        """Bit width that is deployed."""
        return self.widths[0]

    # ---- life -------------------------------------------------------------------------------------------------------

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:  # noqa: ARG002 - the seed's signature
        """Create the variables for a tensor.

        Parameters
        ----------
        tensor_shape : sequence of int or None
            Shape of the weights; activations may pass None.
        name : str
            What the tensor is called in errors.
        layer : object
            The wrapper or holder; not used, the quantizer owns its variables.

        Returns
        -------
        dict of str to Tensor
            The variables by name.

        Raises
        ------
        ShapeMismatchError
            When axis or number of channels don't fit the tensor. Nothing is created then.
        QuantizerStateError
            When called twice for another shape.
        """
        config = self.quantization_config
        shape = None if tensor_shape is None else tuple(tensor_shape)
        variable_shape = qparams.variable_shape(config, shape, f"{self.subject} {name!r}")
        if self.variable_names:
            first = next(iter(self.grid_variables(self.widths[0]).values()))
            if tuple(first.shape) != variable_shape:
                raise QuantizerStateError(f"{self.subject} {name!r}", "already initialized for another shape")
            return {name: self.get_quantizer_variable(name) for name in self.variable_names}
        self._ndim = 0 if shape is None else len(shape)
        for width in self.widths:
            for key in qparams.variable_names(config.quantization_method):
                empty = torch.full(variable_shape, torch.nan)
                self.add_quantizer_variable(self._variable(key, width), empty, VariableGroup.QPARAMS)
        self.add_variables()
        params = {width: self._config_params(width) for width in self.widths}
        if config.calibrated or all(set(given) - {SIGNED} for given in params.values()):
            self.set_quantization_params(params)
        return {name: self.get_quantizer_variable(name) for name in self.variable_names}

    def _config_params(self, width: int) -> dict[str, Any]:
        for candidate in self.quantization_config.candidates or []:
            if candidate.n_bits == width and candidate.quantization_params:
                return candidate.quantization_params
        return self.quantization_config.quantization_params

    def _variable(self, key: str, width: int) -> str:
        return key if len(self.widths) == 1 else f"{key}_{width}"

    def add_quantizer_variable(
        self, name: str, variable: Tensor, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 tensor: as a parameter when it is trained, else as a buffer.

        Parameters
        ----------
        name : str
            Attribute and state dict name.
        variable : Tensor
            Initial value.
        group : VariableGroup
            Which optimizer group it belongs to.
        trained : bool, optional
            Whether it learns; by default what `learns_grid` says.
        """
        learns = self.learns_grid if trained is None else trained
        value = variable.detach().to(torch.float32)
        if learns:
            self.register_parameter(name, nn.Parameter(value, requires_grad=not self.freeze_quant_params))
        else:
            self.register_buffer(name, value)
        self._variable_groups[name] = group

    def get_trainable_variables(self, group: VariableGroup) -> list[Tensor]:
        """Return the parameters of one group that an optimizer may change; none when frozen."""
        named = ((name, self.get_quantizer_variable(name)) for name, of in self._variable_groups.items() if of is group)
        return [variable for _, variable in named if isinstance(variable, nn.Parameter) and variable.requires_grad]

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen
        for name in self.variable_names:
            variable = self.get_quantizer_variable(name)
            if isinstance(variable, nn.Parameter):
                variable.requires_grad_(not frozen)
                if frozen:
                    variable.grad = None

    def grid_variables(self, width: int) -> dict[str, Tensor]:
        """Return the variables that one width's grid is made from, by their plain names."""
        keys = qparams.variable_names(self.quantization_config.quantization_method)
        return {key: self.get_quantizer_variable(self._variable(key, width)) for key in keys}

    def set_quantization_params(self, params: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over calibrated numbers.

        Parameters
        ----------
        params : mapping of int to mapping
            Quantization params, as in the configs, for each of `widths`.

        Raises
        ------
        UnsupportedConfigError, ShapeMismatchError
            When they are wrong or don't fit; nothing is changed then.
        """
        config = self.quantization_config
        if not self.variable_names:
            raise QuantizerStateError(self.subject, "initialize_quantization has not been called")
        if set(params) != set(self.widths):
            raise UnsupportedConfigError(self.subject, f"params for widths {sorted(params)}, needed {sorted(self.widths)}")
        new: list[tuple[Tensor, np.ndarray[Any, Any]]] = []
        signs = set()
        for width, given in params.items():
            try:
                check_params(given, config.quantization_method, width, config.target)
            except ValueError as error:
                raise UnsupportedConfigError(self.subject, str(error)) from None
            signs.add(bool(given.get(SIGNED, self.signed)))
            values = qparams.variables_from_params(given, config.quantization_method)
            for key, variable in self.grid_variables(width).items():
                value = values[key]
                shape = tuple(variable.shape)
                if value.size != 1 and value.shape != shape:
                    raise ShapeMismatchError(f"{self.subject}: {key}", f"shape {shape}", f"shape {value.shape}")
                new.append((variable, np.broadcast_to(value.reshape(-1) if shape else value.reshape(()), shape).copy()))
        if len(signs) != 1:
            raise UnsupportedConfigError(self.subject, f"{SIGNED!r} differs between widths")
        with torch.no_grad():
            for variable, value in new:
                variable.copy_(torch.from_numpy(value))
        (self.signed,) = signs
        self.calibrated = True

    def grid(self, ndim: int, width: int | None = None) -> Grid:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        config = self.quantization_config
        width = self.selected_width if width is None else width
        variables = self.grid_variables(width)
        if self.channels_axis is not None:
            shape = [1] * ndim
            shape[self.channels_axis] = -1
            variables = {key: variable.view(shape) for key, variable in variables.items()}
        if config.quantization_method is QuantizationMethod.UNIFORM:
            return grids.uniform(
                variables[RANGE_MIN], variables[RANGE_MAX], width, min_threshold=config.min_threshold
            )
        return grids.symmetric(
            variables[THRESHOLD],
            width,
            signed=self.signed,
            power_of_two=config.quantization_method is QuantizationMethod.POWER_OF_TWO,
            min_threshold=config.min_threshold,
        )

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
        """
        if not self.quantization_config.enabled:
            return inputs
        self._require_calibrated()
        training = self.training if training is None else bool(training)
        values = inputs if inputs.dtype == torch.float32 else inputs.float()
        quantized = self.quantize(values, training)
        return quantized if quantized.dtype == inputs.dtype else quantized.to(inputs.dtype)

    def _require_calibrated(self) -> None:
        if not self.calibrated:
            what = "not initialized" if not self.variable_names else "has no quantization params yet"
            raise QuantizerStateError(
                self.subject, what, "calibrate the model, or give the params in the config."
            )

    def current_qparams(self, width: int | None = None) -> qparams.QParams:
        """Return the numbers of one width's grid (default: the selected one), computed by core."""
        self._require_calibrated()
        config = self.quantization_config
        width = self.selected_width if width is None else width
        variables = {key: value.detach().cpu().numpy() for key, value in self.grid_variables(width).items()}
        return qparams.from_variables(
            variables,
            config.quantization_method,
            width,
            signed=self.signed,
            min_threshold=config.min_threshold,
            channels_axis=self.channels_axis,
        )

    def current_config(self) -> TrainableQuantizerConfig:
        """Return the config with the trained numbers and the selected width in it: the quantizer as it stands."""
        width = self.selected_width
        params = qparams.deployed_params(self.current_qparams(width), self.quantization_config.quantization_method)
        if self.quantization_config.target is QuantizationTarget.Weights:
            params.pop(SIGNED, None)
        fields = {name: getattr(self.quantization_config, name) for name in type(self.quantization_config).model_fields}
        prefix = self.quantization_config.prefix
        fields |= {f"{prefix}_n_bits": width, f"{prefix}_quantization_params": params, f"{prefix}_quantization_candidates": None}
        return type(self.quantization_config)(**fields)

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
        width = self.selected_width
        device = next(iter(self.grid_variables(width).values())).device
        built = inferable.build(config.target, config.quantization_method, width, self.current_qparams(width), self._ndim)
        return built.to(device).train(self.training)

    # ---- serialization ----------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from: JSON-clean, trained values included."""
        state = {name: self.get_quantizer_variable(name).detach().cpu().tolist() for name in self.variable_names}
        return {
            "quantization_config": {
                "target": self.quantization_config.prefix,
                **self.quantization_config.model_dump(mode="json"),
            },
            "freeze_quant_params": self.freeze_quant_params,
            "tensor_ndim": self._ndim,
            "signed": self.signed,
            "variables": state if self.calibrated else {},
            "arguments": self.get_arguments(),
        }

    def get_arguments(self) -> dict[str, Any]:
        """Return the constructor's further arguments, JSON-clean; a method with such arguments overrides it."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BasePytorchTrainableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on."""
        fields = dict(config["quantization_config"])
        quantization_config = _CONFIGS[fields.pop("target")].model_validate(fields)
        quantizer = cls(
            quantization_config, freeze_quant_params=config["freeze_quant_params"], **config.get("arguments", {})
        )
        variables = {name: torch.tensor(value) for name, value in config["variables"].items()}
        if variables:
            first = next(iter(variables.values()))
            axis, ndim = quantization_config.channels_axis, config["tensor_ndim"]
            shape = [1] * ndim
            if axis is not None:
                shape[axis] = first.numel()
            quantizer.initialize_quantization(shape if ndim else None, "restored", None)
            with torch.no_grad():
                for name, value in variables.items():
                    quantizer.get_quantizer_variable(name).copy_(value)
            quantizer.signed, quantizer.calibrated = config["signed"], True
        return quantizer

    def _apply(self, fn: Any, recurse: bool = True) -> BasePytorchTrainableQuantizer:  # noqa: FBT001, FBT002 - torch's signature
        """Move the variables; they stay float32 whatever dtype the model is cast to."""
        return super()._apply(lambda tensor: inferable.keep_float32(fn, tensor), recurse)  # type: ignore[return-value]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._has_sign:
            destination[prefix + SIGNED] = torch.tensor(self.signed)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        sign = state_dict.pop(prefix + SIGNED, None) if self._has_sign else None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if sign is not None:
            self.signed = bool(sign)
            state_dict[prefix + SIGNED] = sign
        variables = [v for width in self.widths for v in self.grid_variables(width).values()] if self.variable_names else []
        if variables and not any(variable.is_meta for variable in variables):
            self.calibrated = not any(bool(variable.isnan().all()) for variable in variables)

    @property
    def _has_sign(self) -> bool:
        """Whether calibration decides the sign, so that the state must tell it."""
        config = self.quantization_config
        return config.target is QuantizationTarget.Activation and config.quantization_method is not QuantizationMethod.UNIFORM

    def extra_repr(self) -> str:
        """Return grid and state in a few words."""
        config = self.quantization_config
        axis = "" if self.channels_axis is None else f", channels_axis={self.channels_axis}"
        state = "" if self.calibrated else ", not calibrated"
        return f"{self.training_method}, {config.quantization_method}, n_bits={config.n_bits}{axis}{state}"
