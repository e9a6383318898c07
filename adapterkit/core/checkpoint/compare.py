"""Comparing stored tensors byte by byte."""

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint

BLOCK = 4 << 20  # bytes read at a time


def same_bytes(first: tuple[Folder, TensorSpec], *others: tuple[Folder, TensorSpec]) -> bool:
    """Whether stored tensors have one dtype, one shape and the same bytes."""
    spec = first[1]
    if any((other.dtype, other.shape) != (spec.dtype, spec.shape) for _, other in others):
        return False
    for start in range(0, spec.nbytes, BLOCK):
        stop = min(start + BLOCK, spec.nbytes)
        block = _read(first, start, stop)
        if any(_read(other, start, stop) != block for other in others):
            return False
    return True


def _read(tensor: tuple[Folder, TensorSpec], start: int, stop: int) -> bytes:
    folder, spec = tensor
    return folder.read(spec.file, spec.start + start, spec.start + stop)


def have_same_bytes(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors; reads them where no hashes of their files are
    known."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    for key, spec in one.tensors.items():
        twin = other.tensors[key]
        hashes = one.folder.hashes.get(spec.file), other.folder.hashes.get(twin.file)
        if None not in hashes and hashes[0] == hashes[1] and spec.start == twin.start:
            continue
        if not same_bytes((one.folder, spec), (other.folder, twin)):
            return False
    return True
