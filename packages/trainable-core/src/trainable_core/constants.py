"""Keys of the quantization parameter dictionaries and the default lower bound of a threshold."""

from typing import Final

THRESHOLD: Final = "threshold"
"""Clipping bound in real units; a positive number, or one per channel."""

SIGNED: Final = "is_signed"
"""Whether a symmetric grid reaches below zero."""

RANGE_MIN: Final = "range_min"
"""Lower end of a uniform range in real units."""

RANGE_MAX: Final = "range_max"
"""Upper end of a uniform range in real units."""

LUT_VALUES: Final = "lut_values"
"""Codes of a look-up-table grid, integers."""

MIN_THRESHOLD: Final = 2.0**-16
"""Default lower bound of every threshold and of every range's width."""
