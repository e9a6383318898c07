"""Slots: where a parameter lies in the stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch

Positions = range | np.ndarray


def taken(tensor: torch.Tensor, positions: Positions | tuple[int, ...], axis: int) -> torch.Tensor:
    """The entries at these positions of an axis; a view where they are consecutive."""
    if isinstance(positions, range) and positions.step == 1:
        return tensor.narrow(axis, positions.start, len(positions))
    index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
    return tensor.index_select(axis, index.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a slot: parameter positions [at, at + len(of)) are positions `of` on axis `axis`
    of the stored tensor.

    `axis` None: the stored tensor has no such axis (it was stacked), and `of` has length 1.
    """

    at: int
    axis: int | None
    of: Positions

    @property
    def stop(self) -> int:
        return self.at + len(self.of)


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of a parameter as it is stored: parameter[axes.at] == stored[axes.of], the axes
    permuted as `axes` says."""

    key: str
    # the stored tensor's, as the slot's axes count it (a convolution may be seen as a matrix)
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]  # one per axis of the parameter

    @property
    def is_whole(self) -> bool:
        """Whether the slot is all of the stored tensor, in its own order, from the parameter's
        beginning on: all of the parameter if that has no other slot."""
        return len(self.shape) == len(self.axes) and all(
            a.axis == i and a.at == 0 and isinstance(a.of, range) and a.of == range(n)
            for i, (a, n) in enumerate(zip(self.axes, self.shape, strict=True))
        )


@dataclass(frozen=True)
class SlottedCheckpoint(Checkpoint):
    """A checkpoint that knows where parameters lie of which transformers' loader makes none."""

    slots: Mapping[str, tuple[Slot, ...]] = field(default_factory=dict)


def known_slots(checkpoint: Checkpoint) -> Mapping[str, tuple[Slot, ...]]:
    """The slots that the checkpoint itself knows."""
    return checkpoint.slots if isinstance(checkpoint, SlottedCheckpoint) else {}


def extent(slots: tuple[Slot, ...]) -> tuple[int, ...]:
    """The shape of the parameter that these slots make."""
    return tuple(
        max(axis.stop for axis in axes) for axes in zip(*(s.axes for s in slots), strict=True)
    )


def identity_slot(key: str, shape: tuple[int, ...]) -> Slot:
    """The slot of a parameter that is stored as it is."""
    return Slot(key, tuple(shape), tuple(Axis(0, i, range(n)) for i, n in enumerate(shape)))


class Unsupported(Refused):
    """A conversion that does more than move elements along axes."""

    code = "AK406"
