"""Store the activations of waiting batches, in memory up to a limit and else in a file, and copy
them to the device of the units and back."""

import ctypes
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from adapterkit.core.budget import pinned_size
from adapterkit.core.checkpoint.disk import storage_errors, write_all
from adapterkit.core.engine.device import begin_copy_to_host
from adapterkit.core.errors import Failed
from adapterkit.core.system import system

SMALL = 1 << 16  # bytes of a tensor that is never moved
TABLES = 256 << 20  # bytes on the device for tensors that passes give to several units
T = TypeVar("T")


class ActivationStore:
    """A memory budget for waiting activations, and a file for the rest.

    The file has no name, so that nothing is left of it however the process ends."""

    def __init__(self, folder: Path, limit: int, name: str = "activations"):
        self.limit, self.used = limit, 0
        self.path = folder / f"{name}.{secrets.token_hex(8)}"
        self._free: dict[int, list[int]] = {}  # offsets by size
        self._end = 0
        with storage_errors(self.path):
            self._descriptor = system.open_unnamed(self.path)

    def close(self) -> None:
        os.close(self._descriptor)

    def take(self, nbytes: int) -> bool:
        """Reserve these bytes in memory; False if they do not fit."""
        fits = self.used + nbytes <= self.limit
        self.used += nbytes * fits
        return fits

    def write(self, data: memoryview) -> int:
        """Write to a free range of the file; return its offset."""
        places = self._free.get(len(data))
        at = places.pop() if places else self._end
        self._end = max(self._end, at + len(data))
        with storage_errors(self.path):
            write_all(data, lambda rest, done: system.write_at(self._descriptor, rest, at + done))
        return at

    def read(self, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            count = system.read_at(self._descriptor, data[done:], at + done)
            if not count:
                raise Failed(
                    "activations that were written are gone", where=str(self.path), code="AK209"
                )
            done += count

    def free(self, nbytes: int, at: int) -> None:
        self._free.setdefault(nbytes, []).append(at)


class Copy:
    """The bytes of a storage, in memory or in the file, as long as this object lives."""

    def __init__(self, store: ActivationStore, storage: UntypedStorage, in_file: bool = False):
        self.store, self.nbytes = store, storage.nbytes()
        self.memory = self.at = None
        if not in_file and store.take(self.nbytes):
            self.memory = storage.clone()
        else:
            self.at = store.write(_bytes(storage))

    def fill(self, storage: UntypedStorage) -> None:
        """Copy these bytes into a storage."""
        storage.resize_(self.nbytes)
        if self.memory is not None:
            storage.copy_(self.memory)
        elif self.at is not None:
            self.store.read(_bytes(storage), self.at)

    def __del__(self) -> None:
        if self.memory is not None:
            self.store.used -= self.nbytes
        elif self.at is not None:
            self.store.free(self.nbytes, self.at)


@dataclass(frozen=True)
class Saved:
    """A tensor that can be restored."""

    copy: Copy
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def tensor(self) -> Tensor:
        storage = UntypedStorage(0)
        self.copy.fill(storage)
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass
class _Tracked:
    """A storage that leaves memory while its batch waits."""

    storage: StorageWeakRef
    nbytes: int  # of memory
    tensor: ReferenceType[Tensor]
    version: int | None = None  # of the tensor when the copy was made
    copy: Copy | None = None
    parks: bool = False
    is_out: bool = False
    taken: int = 0  # bytes reserved in memory


@dataclass
class Activations:
    """The large tensors of one batch's pass through the model.

    `park` empties their storages while the batch waits, and `restore` fills them again, so that all
    views see their values. Tracked are outputs of units, and tensors that look like a hidden state
    or a mask in their arguments and in autograd's saved tensors: a table that the model keeps for
    several batches must stay. `rows`: of the batch; `fixed`: storages that are never emptied, of
    parameters, buffers and data."""

    store: ActivationStore
    rows: int
    fixed: set[int]
    _tracked: dict[int, _Tracked] = field(default_factory=dict)

    def track(self, tree: object, is_output: bool = False) -> None:
        """Track the tensors in these arguments, or in this output."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and self._is_movable(tensor):
                known = self._known(tensor)
                known.parks = known.parks or is_output or self._is_state(tensor)

    def _known(self, tensor: Tensor) -> _Tracked:
        storage = tensor.untyped_storage()
        known = self._tracked.get(storage._cdata)
        if known is None or known.storage.expired():
            nbytes = storage.nbytes()
            taken = pinned_size(nbytes) if tensor.is_pinned() else nbytes
            known = _Tracked(StorageWeakRef(storage), taken, ref(tensor))
            self._tracked[storage._cdata] = known
        elif known.tensor() is not tensor:
            known.tensor, known.copy = ref(tensor), None
        return known

    def _is_state(self, tensor: Tensor) -> bool:
        is_batch = tensor.dim() > 1 and len(tensor) == self.rows
        return is_batch and (tensor.is_floating_point() or tensor.dtype == torch.bool)

    def _is_movable(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        is_large = storage.nbytes() >= SMALL and storage.resizable()
        return is_large and storage.data_ptr() not in self.fixed

    def save(self, tensor: Tensor) -> Saved | Tensor:
        """A copy of a tensor's current values; the tensor itself if it is small or fixed."""
        if not self._is_movable(tensor):
            return tensor.detach()
        copy = self._copy(self._known(tensor), tensor.untyped_storage())
        return Saved(copy, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _copy(self, known: _Tracked, storage: UntypedStorage, in_file: bool = False) -> Copy:
        """A copy of a storage: the existing one if nothing has changed since."""
        tensor = known.tensor()
        version = None if tensor is None or tensor.is_inference() else tensor._version
        is_same = known.copy is not None and version is not None and version == known.version
        if not is_same or (in_file and known.copy is not None and known.copy.at is None):
            with _disable_current_modes():  # bytes, no operation of the model
                known.copy, known.version = Copy(self.store, storage, in_file), version
        assert known.copy is not None
        return known.copy

    def _alive(self) -> Iterator[tuple[_Tracked, UntypedStorage]]:
        for key, known in list(self._tracked.items()):
            storage = UntypedStorage._new_with_weak_ptr(known.storage.cdata)
            if storage is None:
                self.store.used -= known.taken
                del self._tracked[key]
            else:
                yield known, storage

    def park(self) -> None:
        """Empty the storages while the batch waits."""
        for known, storage in self._alive():
            if not known.parks:
                continue
            if self.store.take(known.nbytes):
                known.taken = known.nbytes
            else:
                self._copy(known, storage, in_file=True)
                storage.resize_(0)
                known.is_out = True

    def restore(self) -> None:
        """Fill the storages before the batch continues."""
        for known, storage in self._alive():
            self.store.used -= known.taken
            known.taken = 0
            if known.is_out and known.copy is not None:
                known.copy.fill(storage)
                known.is_out = False

    def release(self) -> None:
        """Release the tensors of a finished batch."""
        for known in self._tracked.values():
            self.store.used -= known.taken
        self._tracked.clear()


def _bytes(storage: UntypedStorage) -> memoryview:
    """A view of a storage's memory. (One by numpy would keep it from being emptied.)"""
    array = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(array).cast("B")


@dataclass
class _DeviceCopy:
    """A copy on the device of a tensor that a pass has given to a unit."""

    source: ReferenceType[Tensor]
    version: int
    copy: Tensor
    copy_version: int  # a unit may change it

    def is_of(self, leaf: Tensor) -> bool:
        unchanged = self.version == leaf._version and self.copy_version == self.copy._version
        return unchanged and self.source() is leaf


class BatchOffloader:
    """Copies to the device and back, which do not block if the host's memory is page-locked, as
    that of outputs is: they are complete when a later `Mark` is.

    Tensors that a pass gives to several units, such as tables of positions and masks, are copied
    once: the copies live as long as the tensor, up to TABLES bytes."""

    def __init__(self, device: torch.device):
        self.device, self.used = device, 0
        self._device_copies: dict[int, _DeviceCopy] = {}  # by the tensor's id

    def to_device(self, arguments: T) -> tuple[T, dict[int, Tensor]]:
        """Arguments on the device, and the copies by the ids of their sources."""
        return self._moved(arguments, self.device, self._copied)

    def to_host(self, output: T) -> T:
        """An output of a unit on the host; its copies have started."""
        return self._moved(output, torch.device("cpu"), begin_copy_to_host)[0]

    def _moved(
        self, tree: T, there: torch.device, copied: Callable[[Tensor], Tensor]
    ) -> tuple[T, dict[int, Tensor]]:
        """The tree with its tensors on that device, each copied once, and the copies by ids."""
        copies: dict[int, Tensor] = {}

        def move(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or leaf.device == there:
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = copied(leaf)
            return copies[id(leaf)]

        return (tree if self.device.type == "cpu" else tree_map(move, tree)), copies

    def _copied(self, leaf: Tensor) -> Tensor:
        kept = self._device_copies.get(id(leaf))
        if kept is not None and kept.is_of(leaf):
            return kept.copy
        self._drop(id(leaf))
        copy = leaf.to(self.device, non_blocking=True)
        # with gradients it is a part of one unit's graph
        if not torch.is_grad_enabled() and self.used + copy.nbytes <= TABLES:
            key = id(leaf)
            source = ref(leaf, lambda _: self._drop(key))
            self._device_copies[key] = _DeviceCopy(source, leaf._version, copy, copy._version)
            self.used += copy.nbytes
        return copy

    def _drop(self, key: int) -> None:
        kept = self._device_copies.pop(key, None)
        if kept is not None:
            self.used -= kept.copy.nbytes
