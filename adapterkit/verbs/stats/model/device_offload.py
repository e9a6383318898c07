"""Tensors on their way between the host, where batches wait, and the device of the units."""

from dataclasses import dataclass
from typing import TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from adapterkit.core.engine.device import begin_copy_to_host

T = TypeVar("T")
TABLES = 256 << 20  # bytes on the device for what passes hand to several units


@dataclass
class _Kept:
    """A copy on the device of a tensor that a pass has handed to a unit."""

    source: ReferenceType[Tensor]
    version: int
    copy: Tensor
    copy_version: int  # a unit may change it

    def is_of(self, leaf: Tensor) -> bool:
        unchanged = self.version == leaf._version and self.copy_version == self.copy._version
        return unchanged and self.source() is leaf


class BatchOffloader:
    """Copies both ways that do not block where the host's memory is page-locked, as that of outputs
    is: they are done when a `Mark` that follows them is.

    What a pass hands to several units, as it does tables of positions and masks, goes there once:
    copies stay while the tensor does that they are of, up to TABLES bytes.
    """

    def __init__(self, device: torch.device):
        self.device, self.used = device, 0
        self._kept: dict[int, _Kept] = {}  # by the tensor's id

    def to_device(self, arguments: T) -> tuple[T, dict[int, Tensor]]:
        """Arguments there, and the copies by the ids of what they are of."""
        copies: dict[int, Tensor] = {}

        def move(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or leaf.device == self.device:
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = self._copied(leaf)
            return copies[id(leaf)]

        return (arguments if self.device.type == "cpu" else tree_map(move, arguments)), copies

    def to_host(self, output: T) -> T:
        """An output of a unit, whose copies have begun."""
        copies: dict[int, Tensor] = {}

        def move(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = begin_copy_to_host(leaf)
            return copies[id(leaf)]

        return output if self.device.type == "cpu" else tree_map(move, output)

    def _copied(self, leaf: Tensor) -> Tensor:
        kept = self._kept.get(id(leaf))
        if kept is not None and kept.is_of(leaf):
            return kept.copy
        self._drop(id(leaf))
        copy = leaf.to(self.device, non_blocking=True)
        # with gradients it is a part of one unit's graph
        if not torch.is_grad_enabled() and self.used + copy.nbytes <= TABLES:
            key = id(leaf)
            source = ref(leaf, lambda _: self._drop(key))
            self._kept[key] = _Kept(source, leaf._version, copy, copy._version)
            self.used += copy.nbytes
        return copy

    def _drop(self, key: int) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.used -= kept.copy.nbytes
