"""The closed vocabularies of the library: methods, targets, variable groups, tie rules."""

from enum import Enum


class TrainingMethod(str, Enum):
    """How a quantizer learns. Open: a plugin's method is any other string.

    The members are the built-in methods. A member equals its own string, so ``TrainingMethod.LSQ == "LSQ"``.
    """

    STE = "STE"
    """Straight-through estimator: fixed thresholds, identity gradient inside the range (Bengio et al., 2013)."""
    LSQ = "LSQ"
    """Learned step size quantization: thresholds learn with the weights (Esser et al., ICLR 2020)."""
    DQA = "DQA"
    """DNN quantization with attention: a softmax over bit widths anneals to one of them (Hacene et al., 2021)."""
    ADAROUND = "ADAROUND"
    """Adaptive rounding: whether each weight is rounded up or down learns (Nagel et al., ICML 2020)."""
    DYNAMIC = "DYNAMIC"
    """Dynamic activations: scales are computed from the tensor itself, per token or per tensor."""
    TQT = "TQT"
    """Trained quantization thresholds: their logarithms learn (Jain et al., MLSys 2020)."""
    LSQ_PLUS = "LSQ_PLUS"
    """LSQ with learned offsets: scale and offset of a range learn (Bhalgat et al., CVPR Workshops 2020)."""
    PACT = "PACT"
    """Parameterized clipping activation: the clipping bound learns (Choi et al., 2018)."""
    PARETOQ = "PARETOQ"
    """ParetoQ's binary, ternary and stretched 2-bit levels, with a learned threshold (Liu et al., 2025)."""
    APOT = "APOT"
    """Additive powers of two as levels, with a learned threshold (Li et al., ICLR 2020)."""
    DKM = "DKM"
    """Differentiable k-means: the levels of a table learn, by soft assignments (Cho et al., ICLR 2022)."""
    DOREFA = "DOREFA"
    """DoReFa-Net: weights are squashed into the range before they are rounded (Zhou et al., 2016)."""

    def __str__(self) -> str:
        return self.value


class _AsInMctq(Enum):
    """Base of the enums that `mct_quantizers` has too: members are equal to its members, so code may compare either."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum) and type(other).__name__ == type(self).__name__:
            return bool(self.name == other.name and self.value == other.value)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)  # as every enum's


class QuantizationMethod(_AsInMctq):
    """Which grid a tensor is quantized on; names and values are those of `mct_quantizers.QuantizationMethod`."""

    POWER_OF_TWO = 0
    LUT_POT_QUANTIZER = 1
    SYMMETRIC = 2
    UNIFORM = 3
    LUT_SYM_QUANTIZER = 4

    def __str__(self) -> str:
        return self.name


LUT_METHODS = (QuantizationMethod.LUT_POT_QUANTIZER, QuantizationMethod.LUT_SYM_QUANTIZER)
"""Grids that are look-up tables: thresholds times values of a list, without a scale."""

WEIGHTS_ONLY = (QuantizationMethod.LUT_SYM_QUANTIZER,)
"""Grids that activations don't have: no inferable quantizer deploys them there."""


class QuantizationTarget(_AsInMctq):
    """What is quantized; names and values are those of `mct_quantizers.QuantizationTarget`."""

    Activation = "Activation"
    Weights = "Weights"

    def __str__(self) -> str:
        return self.value


class VariableGroup(Enum):
    """Which optimizer group a trainable variable belongs to."""

    WEIGHTS = 0
    """The layer's own values."""
    QPARAMS = 1
    """What the quantizer learns: thresholds, range ends, attention logits."""


class TieRule(Enum):
    """Where a value exactly half way between two grid codes goes; each backend declares its own."""

    HALF_EVEN = "half_even"
    """To the even code (IEEE 754 ``roundTiesToEven``; PyTorch, NumPy, JAX)."""
    HALF_UP = "half_up"
    """Towards plus infinity, ``floor(v + 0.5)`` (TensorFlow's ``fake_quant`` kernels)."""


class CalibrationMethod(str, Enum):
    """How a threshold or a range is chosen from the values seen. A member equals its own lower-case string."""

    MINMAX = "minmax"
    """The extremes: nothing is clipped, up to the grid's last step."""
    PERCENTILE = "percentile"
    """The range that holds a given percentage of the values."""
    MSE = "mse"
    """Least mean squared error of the fake-quantized values."""
    MAE = "mae"
    """Least mean absolute error."""
    LP = "lp"
    """Least mean of the absolute error to the power p."""
    KL = "kl"
    """Least Kullback-Leibler divergence of the values' histogram from its quantized version (Migacz, 2017)."""
    LSQ = "lsq"
    """The initial scale of LSQ, ``2 mean|x| / sqrt(p)`` (Esser et al., 2020, section 2.1)."""
    LSQ_PLUS = "lsq_plus"
    """That of LSQ+: the mean and three standard deviations for weights, `MSE` for activations (Bhalgat et al.)."""
    SAWB = "sawb"
    """Statistics-aware weight binning: from the mean square and the mean magnitude (Choi et al., MLSys 2019)."""

    def __str__(self) -> str:
        """Return the value."""
        return self.value
