"""Rows in which two stored tensors differ."""

import math

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec

BLOCK = 4 << 20  # elements compared at a time


def rows_apart(one: tuple[Folder, TensorSpec], other: tuple[Folder, TensorSpec]) -> int:
    """In how many rows two stored tensors of one shape differ, once the wider is rounded to the other's dtype."""
    shape = one[1].shape
    width = math.prod(shape[1:])
    if not width:
        return 0
    step = max(1, BLOCK // width)
    apart = [0, 0]
    for first in range(0, shape[0], step):
        a, b = (
            _rows(folder, spec, first, min(first + step, shape[0]), width)
            for folder, spec in (one, other)
        )
        for i, unequal in enumerate((a != b.to(a.dtype), b != a.to(b.dtype))):
            apart[i] += int(unequal.any(1).sum())
    return min(apart)


def _rows(folder: Folder, spec: TensorSpec, first: int, stop: int, width: int):
    import torch

    size = dtypes.size(spec.dtype, width)
    data = folder.read(spec.file, spec.start + first * size, spec.start + stop * size)
    return torch.frombuffer(bytearray(data), dtype=dtypes.torch_dtype(spec.dtype)).view(
        stop - first, width
    )
