"""The one parser of GGUF headers: what is stored where, checked against the file's size before anything else reads the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As strict as llama.cpp's own loader, and stricter than the `gguf`
package's reader, which takes offsets and counts for granted.
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import MAX_NAME, Header
from adapterkit.errors import AdapterkitError, Damaged, Refused, refuse_all, shown

ENDING = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file does not say another
FIRST_READ = 4 << 20  # a small vocabulary fits
MAX_HEADER = 512 << 20
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_RANK = 4  # ggml's
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY, UINT32 = 8, 9, 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file, in torch's order of dimensions."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml's type id
    start: int  # absolute position in the file
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """A parsed header: its exact bytes, its scalar and text metadata, what its arrays hold is left to others; its tensors."""

    raw: bytes = field(repr=False)
    metadata: dict[str, Any]  # an array: its length
    tensors: tuple[Entry, ...]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def header(self) -> Header:
        """For plans, which know a file by its header's hash."""
        return Header(self.raw, (), {})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()


def gguf_file(folder: Folder) -> str | None:
    """The GGUF file that a folder, or a file taken as one, is; None where it holds safetensors or no GGUF file."""
    here = [name for name in folder.files() if "/" not in name]
    files = sorted(name for name in here if name.lower().endswith(ENDING))
    if not files or any(name.endswith(".safetensors") for name in here):
        return None
    if len(files) > 1:
        found = f"{len(files)} GGUF files: {', '.join(map(shown, files[:6]))}"
        raise Refused(
            found, expected="one", where=folder.name, hint="give the path of the file itself"
        )
    return files[0]


def read_gguf(folder: Folder, name: str, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """The header of a GGUF file; `sizes`: values and bytes of a block of each type. `Damaged` or `Refused` if it is not whole."""
    size = folder.files()[name]
    raw = folder.read(name, 0, min(FIRST_READ, size))
    while True:
        try:
            return _Parser(raw, size, name, sizes).header()
        except _Short as short:
            if len(raw) >= min(size, MAX_HEADER):
                raise _damaged(
                    name, f"the file ends inside its header: {short}", "a whole header"
                ) from None
            raw += folder.read(name, len(raw), min(4 * len(raw), size, MAX_HEADER))


class _Short(Exception):
    """The bytes at hand end before what is to be read."""


def _damaged(name: str, found: str, expected: str) -> Damaged:
    return Damaged(found, expected=expected, where=name, hint="download or copy the file again")


class _Parser:
    def __init__(self, raw: bytes, size: int, name: str, sizes: Mapping[int, tuple[int, int]]):
        self.raw, self.size, self.name, self.sizes, self.at = raw, size, name, sizes, 0

    def header(self) -> GgufHeader:
        if self.raw[:4] != MAGIC:
            raise _damaged(self.name, f"a file that begins with {self.raw[:4]!r}", "GGUF")
        self.at = 4
        (version,) = self.take("I")
        if version not in VERSIONS:
            found = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
            hint = "convert the file with llama.cpp's own tools"
            raise Refused(
                found, expected="GGUF version 2 or 3, little-endian", where=self.name, hint=hint
            )
        tensors, keys = self.take("QQ")
        if tensors > MAX_TENSORS or keys > MAX_KEYS or 24 * tensors + 13 * keys > self.size:
            raise _damaged(
                self.name, f"{tensors} tensors and {keys} keys", f"what fits into {self.size} bytes"
            )
        metadata = self.metadata(keys)
        entries = [self.entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if (
            type(alignment) is not int
            or alignment < 8
            or alignment & (alignment - 1)
            or alignment > 1 << 20
        ):
            raise _damaged(
                self.name, f"general.alignment {shown(alignment)}", "a power of 2 from 8 on"
            )
        raw, begin = self.raw[: self.at], -(-self.at // alignment) * alignment
        return GgufHeader(raw, metadata, self.placed(entries, begin, alignment))

    def take(self, form: str) -> tuple:
        size = struct.calcsize("<" + form)
        return struct.unpack("<" + form, self.read(size))

    def read(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _damaged(
                self.name, f"{count} bytes at {self.at}", f"what fits into {self.size} bytes"
            )
        if count > len(self.raw) - self.at:
            raise _Short(f"{count} bytes at {self.at}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def text(self, most: int | None = None) -> str:
        (length,) = self.take("Q")
        if most is not None and length > most:
            raise _damaged(self.name, f"a name of {length} bytes", f"at most {most}")
        try:
            return self.read(length).decode()
        except UnicodeDecodeError:
            raise _damaged(self.name, f"a text at {self.at} that is not UTF-8", "UTF-8") from None

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(MAX_NAME)
            if not key.isprintable() or not key or key in found:
                raise _damaged(self.name, f"the key {shown(key)!r}", "printable keys, each once")
            (kind,) = self.take("I")
            found[key] = self.value(kind)
            if key == "general.alignment" and kind != UINT32:
                raise _damaged(self.name, f"general.alignment of type {kind}", "a 32-bit number")
        named = found.get("general.architecture")
        if not isinstance(named, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", named):
            raise _damaged(
                self.name, f"general.architecture {shown(named)!r}", "the name of an architecture"
            )
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise _damaged(self.name, f"a value of type {kind}", "one of 13 types")
        inner, count = self.take("IQ")
        if inner in SCALARS:
            self.read(count * struct.calcsize("<" + SCALARS[inner]))
        elif inner == STRING:
            if 8 * count > self.size - self.at:
                raise _damaged(
                    self.name, f"an array of {count} texts", f"what fits into {self.size} bytes"
                )
            for _ in range(count):
                self.text()
        else:
            raise _damaged(self.name, f"an array of type {inner}", "numbers or texts")
        return count

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.text(MAX_NAME)
        if not name or not name.isprintable() or ".." in name.replace("\\", "/").split("/"):
            raise _damaged(
                self.name, f"tensor name {shown(name)!r}", f"1 to {MAX_NAME} printable characters"
            )
        (rank,) = self.take("I")
        if rank > MAX_RANK:
            raise _damaged(self.name, f"{shown(name)} of {rank} dimensions", f"at most {MAX_RANK}")
        shape = self.take(f"{rank}Q")[::-1]
        return name, shape, *self.take("IQ")

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> tuple[Entry, ...]:
        """The tensors with their places, if they tile the rest of the file: each begins where the one before it ends, aligned."""
        errors: list[AdapterkitError] = []
        found, seen = [], set()
        for name, shape, kind, offset in entries:
            if name in seen:
                errors.append(_damaged(self.name, f"{shown(name)} twice", "each tensor once"))
            seen.add(name)
            values, width = self.sizes.get(kind, (0, 0))
            count = math.prod(shape)
            if not values:
                hint = "update the gguf package: pip install -U gguf"
                errors.append(
                    Refused(
                        f"{shown(name)} of type {kind}",
                        expected="types it knows",
                        where=self.name,
                        hint=hint,
                    )
                )
            elif not shape or not 0 < count < 2**62 or shape[-1] % values:
                expected = f"rows of whole blocks of {values} values"
                errors.append(
                    _damaged(self.name, f"{shown(name)} of shape {shape}"[:200], expected)
                )
            else:
                start = begin + offset
                found.append(Entry(name, shape, kind, start, start + count // values * width))
        refuse_all(errors[:20])
        at = begin
        for one in sorted(found, key=lambda one: one.start):
            if one.start != at or one.stop > self.size:
                found_at = f"{shown(one.name)} at bytes {one.start} to {one.stop}"[:300]
                errors.append(
                    _damaged(self.name, found_at, f"from {at} on, in a file of {self.size} bytes")
                )
            at = -(-one.stop // alignment) * alignment
        refuse_all(errors[:20])
        return tuple(found)
