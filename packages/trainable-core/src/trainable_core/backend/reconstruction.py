"""What `reconstruct` of every backend returns, and the checks before it begins."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainable_core.calibration.batches import check_batches
from trainable_core.enums import TrainingMethod
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError, nearest

SUBJECT = "reconstruct"


@dataclass(frozen=True)
class ReconstructedLayer:
    """How far the outputs of a layer, or of a block of layers, are from those of the float model.

    Parameters
    ----------
    layer : str
        Name of the layer or block.
    nearest : float
        Mean squared distance with each weight rounded to the nearest code.
    learned : float
        With the roundings that were learned; not larger, because the nearest codes are kept where they are better.
    """

    layer: str
    nearest: float
    learned: float


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did, layer by layer or block by block."""

    rows: tuple[ReconstructedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-clean document."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the report as a table."""
        width = max([len("layer"), *(len(row.layer) for row in self.rows)])
        lines = [f"{'layer':<{width}}  {'nearest':>10}  {'learned':>10}"]
        lines += [f"{row.layer:<{width}}  {row.nearest:>10.4g}  {row.learned:>10.4g}" for row in self.rows]
        return "\n".join(lines)


def check_request(layers: Collection[Any], batches: Any, forward: object) -> list[Any]:
    """Return the batches as a list, which is read several times.

    Raises
    ------
    ModelError
        When no layer learns its roundings.
    CalibrationError
        When there are no batches, or they are one batch.
    """
    if not layers:
        problem = f"no weights have the training method {TrainingMethod.ADAROUND}"
        raise ModelError(problem, "name it in the recipe: its roundings are what is learned.")
    if batches is None:
        raise CalibrationError(SUBJECT, "it needs batches, and none were given")
    check_batches(batches, forward, 0, subject=SUBJECT)
    listed = list(batches)
    if not listed:
        raise CalibrationError(SUBJECT, "the batches are empty", "a generator can be read only once; pass a fresh one.")
    return listed


def check_blocks(blocks: Any, learning: Mapping[str, Collection[Hashable]]) -> list[str]:
    """Return the names of the blocks whose layers learn together, after a look at all of them.

    Parameters
    ----------
    blocks : collection of str or None
        As users give it.
    learning : mapping of str to collection
        The layers that learn in each part of the model, by the part's name.

    Raises
    ------
    InvalidArgumentError
        When these are no names of parts, or no layer learns in a block, or one learns in two of them.
    """
    if blocks is None:
        return []
    if not isinstance(blocks, Collection) or isinstance(blocks, str | bytes | Mapping):
        raise InvalidArgumentError(SUBJECT, f"blocks must be a list of names, got {blocks!r}")
    owners: dict[Hashable, str] = {}
    for name in blocks:
        if not isinstance(name, str) or name not in learning:
            problem = f"blocks: the model has no part {name!r}" + nearest(name, learning)
            raise InvalidArgumentError(SUBJECT, problem)
        if not learning[name]:
            problem = f"blocks: no layer in {name!r} has weights of training method {TrainingMethod.ADAROUND}"
            raise InvalidArgumentError(SUBJECT, problem)
        for layer in learning[name]:
            if layer in owners:
                problem = f"blocks: {owners[layer]!r} and {name!r} have a layer in common"
                raise InvalidArgumentError(SUBJECT, problem, "name each layer's block once.")
        owners |= dict.fromkeys(learning[name], name)
    return list(blocks)
