"""The layout of a GGUF file with new values: as it was, or laid out anew where tensors get another
type or are added."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adapterkit.bases.gguf.header import TENSOR_COUNT, TYPES, GgufHeader
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.core.records import Json


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is added to a file."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return nbytes(self.type, self.shape)


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type."""
    _, values, width = TYPES[kind]
    return math.prod(shape) // values * width


@dataclass(frozen=True)
class FileLayout:
    """Where each tensor of a file lies; the `LayOut` of its output."""

    header: bytes = field(repr=False)  # up to the first tensor
    starts: Mapping[str, int]
    size: int

    def __call__(
        self, file: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, Json]
    ) -> ShardLayout:
        ordered = sorted(tensors, key=lambda tensor: self.starts[tensor.key])
        starts = tuple(self.starts[tensor.key] for tensor in ordered)
        end = starts[-1] + ordered[-1].nbytes if ordered else len(self.header)
        return ShardLayout(file, self.header, tuple(ordered), starts, self.size - end)


def as_it_was(header: GgufHeader, head: bytes) -> FileLayout:
    """The layout of the file itself; `head`: its bytes up to the first tensor."""
    starts = {entry.name: entry.start for entry in header.tensors}
    return FileLayout(head, starts, header.size)


def laid_out_anew(
    header: GgufHeader, types: Mapping[str, str], added: Sequence[NewTensor]
) -> FileLayout:
    """The layout of the file with other types of some tensors, by name, and with more of them at
    its end; the order of the others stays."""
    raw = bytearray(header.raw)
    raw[TENSOR_COUNT : TENSOR_COUNT + 8] = struct.pack("<Q", len(header.tensors) + len(added))
    places, offset, offsets = {}, 0, {}
    for entry in sorted(header.tensors, key=lambda entry: entry.start):
        kind = types.get(entry.name, entry.type)
        struct.pack_into("<IQ", raw, entry.at, TYPES[kind][0], offset)
        offsets[entry.name] = offset
        offset = _aligned(offset + nbytes(kind, entry.shape), header.alignment)
    for tensor in added:
        name, rank = tensor.name.encode(), len(tensor.shape)
        raw += struct.pack("<Q", len(name)) + name
        raw += struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape))
        raw += struct.pack("<IQ", TYPES[tensor.type][0], offset)
        offsets[tensor.name] = offset
        offset = _aligned(offset + tensor.nbytes, header.alignment)
    raw += bytes(-len(raw) % header.alignment)
    places = {name: len(raw) + at for name, at in offsets.items()}
    return FileLayout(bytes(raw), places, len(raw) + offset)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
