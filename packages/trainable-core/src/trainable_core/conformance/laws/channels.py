"""Laws on channels: each has a scale of its own, along any axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.case import BESIDE, Case, Config, Subject, grid, variables, with_fields
from trainable_core.conformance.declared import channel_by_channel, treats_elements_alike
from trainable_core.conformance.law import law, same_bits
from trainable_core.conformance.strategies import Kind
from trainable_core.reference.oracle import EPSILON


def of_weights(subject: Subject) -> bool:
    """Say that a law is about weights: activations have one threshold per tensor."""
    return subject.weights


def takes_blocks(subject: Subject) -> bool:
    """Say that a law is about weights whose values follow from the elements of their block."""
    return channel_by_channel(subject) and subject.adapter.blocks and not subject.tables


def one_of(config: Config, channel: int) -> Config:
    """Return a config per tensor with the numbers of one channel."""
    params = {
        key: value[channel % len(value)] if isinstance(value, list) and key not in BESIDE else value
        for key, value in config.quantization_params.items()
    }
    return with_fields(
        config,
        weights_quantization_params=params,
        weights_per_channel_threshold=False,
        weights_channels_axis=None,
        weights_group_size=None,
        weights_group_axis=None,
        weights_expert_axis=None,
    )


def axis_of(config: Config, ndim: int) -> int:
    """Return the channel axis, counted from the front."""
    return 0 if config.channels_axis is None else config.channels_axis % ndim


def take_over(subject: Subject, quantizer: Any, case: Case, channel: int | slice) -> None:
    """Give a quantizer the variables that the case's quantizer has for one channel, or for all.

    It quantizes the channel alone, or all of them on the first axis; blocks are rows anyway.
    """
    source = subject.quantizer(case)
    of_elements = {own.name for own in subject.method.own if own.per_element}
    for name, value in variables(source).items():
        variable = quantizer.get_quantizer_variable(name)
        if name in of_elements:
            axis = 0 if case.config.blocks is not None else axis_of(case.config, value.ndim)
            quantizer.assign(variable, np.moveaxis(value, axis, 0)[channel])
            continue
        whole = tuple(variable.shape) == value.shape  # else it has a value for each channel
        quantizer.assign(variable, np.asarray(value if whole else value[channel], np.float32))
    for _ in range(case.steps):
        quantizer.advance()


def differ_by_last_bits(subject: Subject, together: Any, alone: Any, channel: int) -> bool:
    """Return whether a quantizer of many scales and one of a single scale differ by what an exponential is off.

    Where thresholds are computed from other variables, as by ``2**u``, the last bits of one can depend on how many
    there are: kernels treat the rest of a vector by other instructions. An exponential that is off by two units in the
    last place, twice, and a division: within 4 `EPSILON`.
    """
    if not subject.method.grid_parameters:
        return False
    scales = np.ravel(grid(together).scale)[channel], np.ravel(grid(alone).scale)[0]
    return bool(0 < abs(scales[0] - scales[1]) <= 4 * EPSILON * abs(scales[1]))


@law(
    "A channel that is quantized with another channel's scale is wrong by the ratio of the two scales.",
    kind=Kind(per_channel=True, least=1),
    about=channel_by_channel,
)
def per_channel(subject: Subject, case: Case) -> None:
    """Quantizing per channel gives what a quantizer for each channel gives."""
    x = np.moveaxis(case.x, axis_of(case.config, case.x.ndim), 0)
    together = subject.fresh(case, with_fields(case.config, weights_channels_axis=0), x.shape)
    take_over(subject, together, case, slice(None))
    got = subject.values(together, x)
    expected = got.copy()
    for channel, part in enumerate(x):
        alone = subject.fresh(case, one_of(case.config, channel), part.shape)
        take_over(subject, alone, case, channel)
        if not differ_by_last_bits(subject, together, alone, channel):
            expected[channel] = subject.values(alone, part)
    same_bits("a loop over the channels", got, expected)


@law(
    "A group that is quantized with its neighbour's scale is wrong by the ratio of the two, in every channel.",
    kind=Kind(blocks=True, least=2),
    about=takes_blocks,
)
def per_block(subject: Subject, case: Case) -> None:
    """Quantizing per group, and per expert, gives what a quantizer for each block gives."""
    blocks = case.config.blocks
    if blocks is None:  # a tensor without elements has none
        return
    together = subject.quantizer(case)
    got = subject.values(together, case.x)
    expected = np.array(blocks.rows(got))
    for block, part in enumerate(blocks.rows(case.x)):
        alone = subject.fresh(case, one_of(case.config, block), part.shape)
        take_over(subject, alone, case, block)
        if not differ_by_last_bits(subject, together, alone, block):
            expected[block] = subject.values(alone, part)
    same_bits("a loop over the blocks", got, blocks.tensor(expected, case.x.shape))


@law(
    "Layers keep their channels on different axes, and an axis may be counted from either end.",
    kind=Kind(per_channel=True, least=1),
    about=lambda subject: of_weights(subject) and treats_elements_alike(subject),
)
def channels_axis(subject: Subject, case: Case) -> None:
    """Values stay the same when the axis is counted from the other end, or the channels are moved to the front."""
    axis = axis_of(case.config, case.x.ndim)
    got = subject.values(subject.quantizer(case), case.x)
    for other in (axis, axis - case.x.ndim):
        counted = subject.fresh(case, with_fields(case.config, weights_channels_axis=other))
        take_over(subject, counted, case, slice(None))
        same_bits(f"channels on axis {other}", subject.values(counted, case.x), got)
    first = np.moveaxis(case.x, axis, 0)
    moved = subject.fresh(case, with_fields(case.config, weights_channels_axis=0), first.shape)
    take_over(subject, moved, case, slice(None))
    same_bits("channels moved to the front", np.moveaxis(subject.values(moved, first), 0, axis), got)
