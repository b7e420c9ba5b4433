"""Additive powers of two; defined by `trainable_core.reference.apot`."""

from __future__ import annotations

from trainable_core.backend.options import ApotOptions
from trainable_core.reference import apot
from trainable_keras.quantizers.table import TableQuantizer


class ApotQuantizer(ApotOptions, TableQuantizer):
    """Levels are sums of powers of two, the threshold learns; see `trainable_core.reference.apot`."""

    declaration = apot.METHOD
