"""Assign tensors to files and positions: pure arithmetic on names, dtypes and shapes."""

import json
import math
from dataclasses import dataclass, field
from typing import TypeVar

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import Header, build_header

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of an output, as its header describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    varies: bool = False  # its size depends on values: the planned one is an estimate

    @property
    def nbytes(self) -> int:
        return dtypes.size(self.dtype, math.prod(self.shape))


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its header bytes and each tensor's absolute position, in file order."""

    file: str
    header: bytes = field(repr=False)
    tensors: tuple[TensorPlan, ...]
    starts: tuple[int, ...]
    padding: int = 0  # zeros behind the last tensor

    @property
    def size(self) -> int:
        last = self.starts[-1] + self.tensors[-1].nbytes if self.tensors else len(self.header)
        return last + self.padding


def like_base(file: str, tensors: list[TensorPlan], base: Header | None) -> ShardLayout:
    """Return a file in the base's order, with the base's header bytes, if there are any and no key,
    dtype or shape changes."""
    if base is not None and base.raw:
        before = [(t.key, t.dtype, t.shape) for t in base.tensors]
        if before == [(t.key, t.dtype, t.shape) for t in tensors]:
            return ShardLayout(file, base.raw, tuple(tensors), tuple(t.start for t in base.tensors))
    return laid_out(file, tensors, base.metadata if base is not None else {"format": "pt"})


def laid_out(
    file: str,
    tensors: list[TensorPlan],
    metadata: dict[str, str],
    *,
    ordered: bool = False,
    header_size: int = 0,
) -> ShardLayout:
    """Return a file with a new header of at least `header_size` bytes. Unless `ordered`, wider
    dtypes come first if a tensor would be misaligned."""
    at = 0
    for tensor in [] if ordered else tensors:
        if at % max(dtypes.BITS[tensor.dtype] // 8, 1):
            tensors = sorted(tensors, key=lambda t: -dtypes.BITS[t.dtype])
            break
        at += tensor.nbytes
    header, starts = build_header(
        [(t.key, t.dtype, t.shape) for t in tensors], metadata, header_size
    )
    return ShardLayout(file, header, tuple(tensors), tuple(starts))


def resharded(
    tensors: list[TensorPlan], limit: int, metadata: dict[str, str], stem: str
) -> list[ShardLayout]:
    """Return files of at most `limit` bytes of data each, in this order; a larger tensor has its
    own file."""
    groups = grouped(tensors, [tensor.nbytes for tensor in tensors], limit, stem)
    return [laid_out(name, group, metadata) for name, group in groups.items()]


def grouped(items: list[T], sizes: list[int], limit: int, stem: str) -> dict[str, list[T]]:
    """Return items by file name, in this order, for files of at most `limit` bytes, called
    `stem`."""
    groups: list[list[T]] = [[]]
    left = limit
    for item, size in zip(items, sizes, strict=True):
        if groups[-1] and size > left:
            groups.append([])
            left = limit
        groups[-1].append(item)
        left -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return dict(zip(names, groups, strict=True))


def index(shards: list[ShardLayout], old: dict | None, grown: int = 0) -> bytes:
    """Return the index file of these shards: the old one's metadata, with new totals. `grown`:
    bytes of data beyond the layouts."""
    metadata = dict((old or {}).get("metadata") or {})
    metadata["total_size"] = sum(t.nbytes for s in shards for t in s.tensors) + grown
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for s in shards for t in s.tensors)
    where = {t.key: s.file for s in shards for t in s.tensors}
    order = [k for k in (old or {}).get("weight_map", {}) if k in where]
    known = set(order)
    order += [k for k in where if k not in known]
    return (
        json.dumps({"metadata": metadata, "weight_map": {k: where[k] for k in order}}, indent=2)
        + "\n"
    ).encode()
