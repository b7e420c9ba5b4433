"""From a quantizer's variables to the grid, on the tensors of Keras 2."""

from __future__ import annotations

from trainable_keras import grid
from trainable_keras.keras2.functions import FUNCTIONS


class Grid(grid.Grid):
    """The numbers a tensor is fake-quantized with; see `trainable_core.backend.grid.GridNumbers`."""

    functions = FUNCTIONS


GRIDS = grid.GridMaker(FUNCTIONS, Grid)
symmetric, uniform = GRIDS.symmetric, GRIDS.uniform
