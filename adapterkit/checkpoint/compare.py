"""Comparing stored tensors byte by byte."""

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec

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
