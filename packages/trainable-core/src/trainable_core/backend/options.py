"""Constructors of the built-in methods that take options: what they accept is the same in every backend.

A backend's class inherits one of these before its own base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import VariableGroup
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.reference import adaround, apot, dkm, dqa, dynamic, pact, paretoq, rounding


class RoundingOptions(BaseTrainableQuantizer):
    """What passes back through rounding is chosen by the user.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    rounding : str
        ``ste``, ``ewgs``, ``fourier`` or ``dsq``; see `trainable_core.reference.rounding`.
    rounding_strength : float, optional
        The number of the chosen one; None takes its default.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        rounding: str = rounding.STE,
        rounding_strength: float | None = None,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.rounding = _checked_rounding(rounding, rounding_strength, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the options, where they are not the defaults."""
        return self.rounding.arguments


_checked_rounding = rounding.checked  # an argument has the module's name


class DqaOptions(BaseTrainableQuantizer):
    """Attention over bit widths; see `trainable_core.reference.dqa`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class. The config's candidates are the widths; without candidates n, 2n and 4n, at most 16.
    temperature : mapping, optional
        Arguments of `LinearAnnealingScheduler`; the target must be positive. Steps are counted by `advance`.
    bit_cost_weight : float
        Factor of the expected bit width in `regularization`.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        temperature: Mapping[str, Any] | None = None,
        bit_cost_weight: float = 0.0,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        name = type(self).__name__
        self.temperature = dqa.temperature_schedule(self.scheduler, temperature, name)
        self.bit_cost_weight = dqa.checked_bit_cost_weight(bit_cost_weight, name)

    @property
    def widths(self) -> tuple[int, ...]:
        """Candidate widths, ascending."""
        return dqa.candidate_widths(self.quantization_config)

    @property
    def chooses_width(self) -> bool:
        """Always, also where there is one candidate."""
        return True

    def get_arguments(self) -> dict[str, Any]:
        """Return temperature and bit cost weight."""
        return {"temperature": self.temperature.to_dict(), "bit_cost_weight": self.bit_cost_weight}


class AdaroundOptions(BaseTrainableQuantizer):
    """Adaptive rounding; see `trainable_core.reference.adaround`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    beta : mapping, optional
        Arguments of a schedule above 1: the regularizer's exponent. Before its first step there is no regularizer, and
        after its last one values in training are the deployed ones.
    regularization_weight : float
        Factor of the regularizer.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        beta: Mapping[str, Any] | None = None,
        regularization_weight: float = adaround.REGULARIZATION_WEIGHT,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.beta = adaround.checked_beta(beta, type(self).__name__)
        self.regularization_weight = adaround.checked_weight(regularization_weight, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the schedule and the factor of the regularizer."""
        return {"beta": self.beta.to_dict(), "regularization_weight": self.regularization_weight}


class PactOptions(BaseTrainableQuantizer):
    """Parameterized clipping; see `trainable_core.reference.pact`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    calibrated_gradient : bool
        Whether the rounding error inside the range counts too.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        calibrated_gradient: bool = False,  # noqa: FBT001, FBT002 - a recipe gives it by name
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.calibrated_gradient = pact.checked_option(calibrated_gradient, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"calibrated_gradient": self.calibrated_gradient}


class ApotOptions(BaseTrainableQuantizer):
    """Levels that are sums of powers of two; see `trainable_core.reference.apot`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    """

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        super().__init__(quantization_config, freeze_quant_params)
        apot.levels(quantization_config.n_bits, type(self).__name__)  # refuses the width

    @property
    def levels(self) -> tuple[int, ...]:
        """The table."""
        return apot.levels(self.quantization_config.n_bits, self.subject)


class ParetoqOptions(BaseTrainableQuantizer):
    """Binary, ternary or stretched levels; see `trainable_core.reference.paretoq`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    ternary : bool
        With 2 bits: three levels instead of four.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        ternary: bool = False,  # noqa: FBT001, FBT002 - a recipe gives it by name
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        paretoq.levels(quantization_config.n_bits, type(self).__name__, ternary=ternary)  # refuses what does not fit
        self.ternary = ternary

    @property
    def levels(self) -> tuple[int, ...]:
        """The table."""
        return paretoq.levels(self.quantization_config.n_bits, self.subject, ternary=self.ternary)

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"ternary": self.ternary}


class DkmOptions(BaseTrainableQuantizer):
    """Levels of a table that learn; see `trainable_core.reference.dkm`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    temperature : mapping, optional
        Arguments of `LinearAnnealingScheduler`, in squared mean gaps between levels; all positive.
    """

    centroids: Any

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        temperature: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        name = type(self).__name__
        dkm.count_of(quantization_config.n_bits, name)  # refuses the width
        self.temperature = dkm.temperature_schedule(temperature, name, self.scheduler)

    def get_arguments(self) -> dict[str, Any]:
        """Return the schedule."""
        return {"temperature": self.temperature.to_dict()}

    def add_variables(self) -> None:
        """Add the levels, with equal gaps."""
        initial = dkm.initial_centroids(self.quantization_config.n_bits)
        self.add_quantizer_variable("centroids", initial, VariableGroup.QPARAMS, trained=True)

    @property
    def levels(self) -> tuple[int, ...]:
        """The table as it would be deployed now."""
        return dkm.levels_of(self.to_numpy(self.centroids))

    def levels_as_variables(self, levels: tuple[int, ...]) -> list[tuple[Any, NDArray[Any]]]:
        """Return the centroids with the values that make these levels."""
        return [(self.centroids, dkm.centroids_of(levels, self.quantization_config.n_bits))]


class DynamicOptions(BaseTrainableQuantizer):
    """Scales that are computed from the tensor itself; see `trainable_core.reference.dynamic`.

    Parameters
    ----------
    quantization_config : TrainableQuantizerActivationConfig
        What to quantize and how, without a threshold or a range.
    freeze_quant_params : bool
        Accepted as by every quantizer; nothing is learned.
    granularity : {"token", "tensor"}
        Whether each vector along the last axis has a scale of its own, or the whole tensor has one.
    """

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        granularity: str = dynamic.TOKEN,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.granularity = dynamic.checked_granularity(granularity, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the granularity."""
        return {"granularity": self.granularity}
