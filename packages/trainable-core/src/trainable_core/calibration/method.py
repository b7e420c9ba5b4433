"""The ways of choosing a clipping range."""

from enum import Enum


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

    def __str__(self) -> str:
        """Return the value."""
        return self.value
