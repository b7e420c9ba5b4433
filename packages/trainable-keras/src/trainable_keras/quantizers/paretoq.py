"""ParetoQ's levels of 1 and 2 bits; defined by `trainable_core.reference.paretoq`."""

from __future__ import annotations

from trainable_core.backend.options import ParetoqOptions
from trainable_core.reference import paretoq
from trainable_keras.quantizers.table import TableQuantizer


class ParetoqQuantizer(ParetoqOptions, TableQuantizer):
    """Binary, ternary or stretched levels, the threshold learns; see `trainable_core.reference.paretoq`.

    Its arguments are those of `trainable_core.backend.options.ParetoqOptions`.
    """

    declaration = paretoq.METHOD
