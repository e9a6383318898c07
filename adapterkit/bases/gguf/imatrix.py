"""Read importance matrices of llama.cpp's `llama-imatrix`: for each tensor the sums of the squares
of its inputs, in a GGUF file or in the older binary one.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/imatrix.cpp and
https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/quantize.cpp.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.bases.gguf.header import MAGIC, read_gguf
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.errors import Damaged, Problems, Refused, shown
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import StrPath

SUMS = ".in_sum2"  # behind a tensor's name
MOST = 1 << 20  # entries, and bytes of a name

Importance = dict[str, Tensor]  # (matrices, columns) float32 by the name of a tensor


@dataclass(frozen=True)
class ImportanceFile:
    """An importance matrix and the hash of its file."""

    sums: Importance
    sha256: str


def read_importance(text: StrPath) -> ImportanceFile:
    """Read an importance matrix; `Refused` or `Damaged` for other files."""
    folder = open_source(text)
    names = [name for name in folder.files() if "/" not in name]
    if len(names) != 1:
        raise Refused(
            f"a folder of {len(names)} files",
            expected="one file of llama-imatrix",
            where=folder.label,
            hint="give the path of the file itself",
            code="AK106",
        )
    return ImportanceFile(read_imatrix(folder, names[0]), sha256_of_file(folder.path(names[0])))


def read_imatrix(folder: Folder, name: str) -> Importance:
    """The weights of the columns of each tensor; a factor common to a matrix does not matter.
    `Refused` or `Damaged` for other files, and for sums that cannot be weights."""
    is_gguf = folder.read(name, 0, len(MAGIC)) == MAGIC
    found = dict(_of_gguf(folder, name) if is_gguf else _of_binary(folder, name))
    errors = Problems(
        where=name, hint="make it again with llama-imatrix", kind=Damaged, code="AK106"
    )
    for key, sums in found.items():
        if not bool((sums.isfinite() & (sums >= 0)).all()):
            errors.add(f"{shown(key)} has sums below 0, or that are not finite", "sums of squares")
    if not found:
        errors.add("no sums of inputs", "an importance matrix", kind=Refused)
    errors.raise_all()
    return found


def _of_gguf(folder: Folder, name: str) -> Iterator[tuple[str, Tensor]]:
    header = read_gguf(folder, name)
    for entry in header.tensors:
        if entry.name.endswith(SUMS) and entry.type == "F32":
            data = bytearray(folder.read(name, entry.start, entry.stop))
            sums = torch.frombuffer(data, dtype=torch.float32)
            yield entry.name.removesuffix(SUMS), sums.view(-1, entry.shape[-1])


def _of_binary(folder: Folder, name: str) -> Iterator[tuple[str, Tensor]]:
    data, at = folder.read(name, 0, folder.files()[name]), 0

    def take(count: int) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise Refused(
                f"this is no importance matrix: {count} bytes at {at} of {len(data)}",
                expected="a file of llama-imatrix",
                where=name,
                hint="give its .gguf or .dat file",
                code="AK106",
            )
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    count = number()
    for _ in range(count if 0 < count <= MOST else -1):
        key = take(number()).decode(errors="replace")
        number()  # of calls
        values = take(4 * number()) or take(-1)
        yield key, torch.frombuffer(bytearray(values), dtype=torch.float32)[None]
    if not 0 < count <= MOST:
        take(-1)
