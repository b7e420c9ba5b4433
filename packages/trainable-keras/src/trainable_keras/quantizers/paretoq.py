"""ParetoQ's levels of 1 and 2 bits; defined by `trainable_core.reference.paretoq`."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.options import ParetoqOptions
from trainable_keras.quantizers.table import TableQuantizer


class ParetoqQuantizer(ParetoqOptions, TableQuantizer):
    """Binary, ternary or stretched levels, the threshold learns; see `trainable_core.reference.paretoq`.

    Its arguments are those of `trainable_core.backend.options.ParetoqOptions`.
    """

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"ternary": self.ternary}
