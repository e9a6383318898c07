"""Files of LoRA adapters as llama.cpp reads and writes them: metadata and tensors.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from adapterkit.bases.gguf.header import (
    ARRAY,
    FLOAT32,
    MAGIC,
    MAX_RANK,
    STRING,
    TYPES,
    UINT32,
    VERSIONS,
    GgufHeader,
    aligned,
    info_bytes,
    read_gguf,
    text_bytes,
)
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, shown
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {name: TYPES[name][0] for name in ("F32", "F16", "BF16")}  # ggml's type ids of floats
# Q8_0: a 16-bit scale, then 32 integers of 8 bits
Q8_0, _, BLOCK_BYTES = TYPES["Q8_0"]
SIZES = {TYPES[name][0]: TYPES[name][1:] for name in (*KINDS, "Q8_0")}
MAX_NAME = 63  # bytes of a tensor's name in ggml
EXPECTED = {"general.type": "adapter", "adapter.type": "lora"}

Value = str | float | int | tuple[int, ...]  # of metadata: texts, f32, u32, arrays of u32


@dataclass(frozen=True, slots=True)
class BlockSpec(TensorSpec):
    """A tensor in blocks of Q8_0: its shape, and the `F32` that decodes it exactly."""

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The shape of its bytes: (blocks, bytes per block)."""
        shape = (self.nbytes // BLOCK_BYTES, BLOCK_BYTES)
        own = TensorSpec(self.key, "U8", shape, self.file, self.start, self.stop, self.folder)
        return (own,)

    def decode(
        self,
        stored: "Tensor",  # (blocks, 34) uint8
    ) -> "Tensor":
        """scale · integer, in float32: 11 and 8 bits, so exact."""
        import torch

        scales = stored[:, :2].contiguous().view(torch.float16).float()
        integers = stored[:, 2:].contiguous().view(torch.int8).float()
        return (scales * integers).view(self.shape)


class AdapterFile(NamedTuple):
    """A parsed adapter file; the shapes of its tensors are in torch's order."""

    header: GgufHeader
    metadata: Json
    tensors: dict[str, TensorSpec]


def is_gguf(folder: Folder, name: str) -> bool:
    """Return whether a file begins with GGUF's magic bytes."""
    return folder.read(name, 0, len(MAGIC)) == MAGIC


def read_adapter(folder: Folder, name: str, number: int = 0) -> AdapterFile:
    """Parse the header of a LoRA adapter; `Damaged` or `Refused` unless llama.cpp accepts the file
    and its types. `number`: the index of the folder among the job's inputs."""
    hint = "give an adapter of f32, f16, bf16 or q8_0"
    header = read_gguf(folder, name, SIZES, hint)
    errors = Problems(
        [
            Refused(
                f"{key} is {shown(repr(header.metadata.get(key)))}",
                expected=repr(value),
                where=name,
                hint="give a LoRA adapter; a model goes where a base is expected",
                code="AK207",
            )
            for key, value in EXPECTED.items()
            if header.metadata.get(key) != value
        ],
        where=name,
        code="AK207",
    )
    end, size = max((entry.stop for entry in header.tensors), default=0), folder.files()[name]
    if size not in (end, aligned(end)):
        errors.add(
            f"{size} bytes: the data is followed by other bytes",
            f"{end} bytes, as the header says",
            "download or copy the file again",
            kind=Damaged,
        )
    errors.raise_all()
    names = {kind: dtype for dtype, kind in KINDS.items()}
    tensors = {}
    for entry in header.tensors:
        spec = BlockSpec if entry.kind == Q8_0 else TensorSpec
        dtype = names.get(entry.kind, "F32")
        tensors[entry.name] = spec(
            entry.name, dtype, entry.shape, name, entry.start, entry.stop, number
        )
    return AdapterFile(header, header.metadata | header.arrays, tensors)


def gguf_layout(
    file: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, Value]
) -> ShardLayout:
    """The layout of a file with these tensors in this order; equal arguments give the same bytes.
    `Refused` for tensors that ggml cannot store."""
    Problems(_errors(file, tensors)).raise_all()
    infos, offset, offsets = bytearray(), 0, []
    for tensor in tensors:
        offsets.append(offset)
        infos += info_bytes(tensor.key, tensor.shape, KINDS[tensor.dtype], offset)
        offset = aligned(offset + tensor.nbytes)
    raw = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))
    for key, value in metadata.items():
        raw += text_bytes(key) + _value(value)
    raw += infos
    raw += bytes(aligned(len(raw)) - len(raw))
    return ShardLayout(file, raw, tuple(tensors), tuple(len(raw) + at for at in offsets))


def _errors(file: str, tensors: Sequence[TensorPlan]) -> list[AdapterkitError]:
    """List tensors that ggml cannot store."""
    errors = Problems(where=file, code="AK207")
    for tensor in tensors:
        problem = f"{shown(tensor.key)} {tensor.dtype} {tensor.shape}"
        hint = "leave that module out, or convert to another format"
        if len(tensor.key.encode()) > MAX_NAME:
            expected = f"a name of at most {MAX_NAME} bytes"
        elif not 0 < len(tensor.shape) <= MAX_RANK or not math.prod(tensor.shape):
            expected = f"1 to {MAX_RANK} dimensions, none of them 0"
        elif tensor.dtype not in KINDS:
            expected, hint = f"one of {', '.join(KINDS)}", "give --dtype fp32, fp16 or bf16"
        else:
            continue
        errors.add(problem, expected, hint)
    return errors


def _value(value: Value) -> bytes:
    """A metadata value, after its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text_bytes(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    numbers = [value] if isinstance(value, int) else value
    if not all(0 <= number < 1 << 32 for number in numbers):
        problem, where = f"a number of the config is {max(numbers)}", "adapter_config.json"
        raise Refused(
            problem,
            expected="32 bits, as in GGUF",
            where=where,
            hint="fix the config",
            code="AK207",
        )
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack(f"<IIQ{len(value)}I", ARRAY, UINT32, len(value), *value)
