"""The parser of GGUF headers: which tensor lies where, checked against the file's size before
anything else reads the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As strict as llama.cpp's own
loader, and stricter than the reader of the `gguf` package, which trusts offsets and counts.
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import MAX_NAME, Header
from adapterkit.errors import Damaged, Problems, Refused, shown
from adapterkit.records import Json

ENDING = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # unless general.alignment says otherwise
FIRST_READ = 4 << 20  # bytes; enough for a small vocabulary
MAX_HEADER = 512 << 20
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_RANK = 4  # ggml's
MAX_ERRORS = 20  # reported at once
MAX_ITEMS = 1 << 16  # of an array whose numbers are kept
# struct codes of the scalar types of metadata, by their id
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
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
    """A parsed header: its exact bytes, its metadata (of arrays only the length), its tensors."""

    raw: bytes = field(repr=False)
    metadata: Json  # an array: its length
    tensors: tuple[Entry, ...]
    arrays: dict[str, tuple] = field(default_factory=dict)  # those of at most MAX_ITEMS numbers

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def header(self) -> Header:
        """The header in the form that plans use, which identify a file by its header's hash."""
        return Header(self.raw, (), {})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()


class _TensorInfo(NamedTuple):
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the beginning of the data


def gguf_file(folder: Folder) -> str | None:
    """Name of a folder's only GGUF file; None if there is none, or safetensors beside it."""
    names = [name for name in folder.files() if "/" not in name]
    files = sorted(name for name in names if name.lower().endswith(ENDING))
    if not files or any(name.endswith(".safetensors") for name in names):
        return None
    if len(files) > 1:
        raise Refused(
            f"the folder has {len(files)} GGUF files: {', '.join(map(shown, files[:6]))}",
            expected="one file",
            where=folder.name,
            hint="give the path of the file itself",
        )
    return files[0]


def read_gguf(
    folder: Folder,
    name: str,
    block_sizes: Mapping[int, tuple[int, int]],
    hint: str = "update the gguf package: pip install -U gguf",
) -> GgufHeader:
    """Parse the header of a GGUF file; `Damaged` or `Refused` unless it and the data are complete.

    `block_sizes`: (values, bytes) of a block of each type id; `hint`: for a type without one.
    """
    size = folder.files()[name]
    raw = folder.read(name, 0, min(FIRST_READ, size))
    while True:
        try:
            return _Parser(raw, size, name, block_sizes, hint).header()
        except _Incomplete as incomplete:
            if len(raw) >= min(size, MAX_HEADER):
                problem = f"the file ends inside its header: {incomplete}"
                _damage(name).fail(problem, "a whole header")
            raw += folder.read(name, len(raw), min(4 * len(raw), size, MAX_HEADER))


class _Incomplete(Exception):
    """The bytes read so far end before the header does."""


def _damage(name: str) -> Problems:
    """What shows that a file is damaged."""
    return Problems(where=name, hint="download or copy the file again", kind=Damaged)


class _Parser:
    def __init__(
        self,
        raw: bytes,
        size: int,
        name: str,
        block_sizes: Mapping[int, tuple[int, int]],
        hint: str,
    ):
        self.raw, self.size, self.name, self.at = raw, size, name, 0
        self.block_sizes, self.hint = block_sizes, hint
        self.arrays: dict[str, tuple] = {}
        self.errors = _damage(name)

    def header(self) -> GgufHeader:
        if self.raw[:4] != MAGIC:
            self.errors.fail(f"a file that begins with {self.raw[:4]!r}", "GGUF")
        self.at = 4
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            big_endian = version & 0xFFFF == 0
            raise Refused(
                f"this is {'big-endian GGUF' if big_endian else f'GGUF version {version}'}",
                expected="GGUF version 2 or 3, little-endian",
                where=self.name,
                hint="convert the file with llama.cpp's own tools",
            )
        tensors, keys = self.unpack("QQ")
        if tensors > MAX_TENSORS or keys > MAX_KEYS or 24 * tensors + 13 * keys > self.size:
            self.errors.fail(f"{tensors} tensors and {keys} keys", self.capacity)
        metadata = self.metadata(keys)
        infos = [self.tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        valid = type(alignment) is int and 8 <= alignment <= 1 << 20
        if not valid or alignment & (alignment - 1):
            self.errors.fail(f"general.alignment {shown(alignment)}", "a power of 2 from 8 on")
        raw, data_start = self.raw[: self.at], -(-self.at // alignment) * alignment
        entries = self.entries(infos, data_start, alignment)
        return GgufHeader(raw, metadata, entries, self.arrays)

    @property
    def capacity(self) -> str:
        return f"what fits into {self.size} bytes"

    def unpack(self, codes: str) -> tuple:
        """Read little-endian numbers by their struct codes."""
        size = struct.calcsize("<" + codes)
        return struct.unpack("<" + codes, self.read(size))

    def read(self, count: int) -> bytes:
        if count > self.size - self.at:
            self.errors.fail(f"{count} bytes at {self.at}", self.capacity)
        if count > len(self.raw) - self.at:
            raise _Incomplete(f"{count} bytes at {self.at}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def text(self, max_length: int | None = None) -> str:
        (length,) = self.unpack("Q")
        if max_length is not None and length > max_length:
            self.errors.fail(f"a name of {length} bytes", f"at most {max_length}")
        try:
            return self.read(length).decode()
        except UnicodeDecodeError:
            self.errors.fail(f"a text at {self.at} that is not UTF-8", "UTF-8")

    def metadata(self, count: int) -> Json:
        metadata: Json = {}
        for _ in range(count):
            key = self.text(MAX_NAME)
            if not key.isprintable() or not key or key in metadata:
                self.errors.fail(f"the key {shown(key)!r}", "printable keys, each once")
            (kind,) = self.unpack("I")
            metadata[key] = self.array(key) if kind == ARRAY else self.value(kind)
            if key == "general.alignment" and kind != UINT32:
                self.errors.fail(f"general.alignment of type {kind}", "a 32-bit number")
        name = metadata.get("general.architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
            problem = f"general.architecture {shown(name)!r}"
            self.errors.fail(problem, "the name of an architecture")
        return metadata

    def value(self, kind: int) -> Any:
        """A value of metadata that is no array."""
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        self.errors.fail(f"a value of type {kind}", "one of 13 types")

    def array(self, key: str) -> int:
        """The length of an array; its items are skipped, but for a few numbers."""
        inner, count = self.unpack("IQ")
        if inner in SCALARS:
            code = SCALARS[inner]
            data = self.read(count * struct.calcsize("<" + code))
            if count <= MAX_ITEMS:
                self.arrays[key] = struct.unpack(f"<{count}{code}", data)
        elif inner == STRING:
            if 8 * count > self.size - self.at:
                self.errors.fail(f"an array of {count} texts", self.capacity)
            for _ in range(count):
                self.text()
        else:
            self.errors.fail(f"an array of type {inner}", "numbers or texts")
        return count

    def tensor_info(self) -> _TensorInfo:
        name = self.text(MAX_NAME)
        if not name or not name.isprintable() or ".." in name.replace("\\", "/").split("/"):
            expected = f"1 to {MAX_NAME} printable characters"
            self.errors.fail(f"tensor name {shown(name)!r}", expected)
        (rank,) = self.unpack("I")
        if rank > MAX_RANK:
            self.errors.fail(f"{shown(name)} of {rank} dimensions", f"at most {MAX_RANK}")
        shape = self.unpack(f"{rank}Q")[::-1]
        return _TensorInfo(name, shape, *self.unpack("IQ"))

    def entries(
        self, infos: list[_TensorInfo], data_start: int, alignment: int
    ) -> tuple[Entry, ...]:
        """The tensors with their positions; refused unless they tile the rest of the file, each
        aligned behind the one before."""
        errors = self.errors
        entries, names = [], set()
        for name, shape, kind, offset in infos:
            if name in names:
                errors.add(f"{shown(name)} is there twice", "each tensor once")
            names.add(name)
            values, width = self.block_sizes.get(kind, (0, 0))
            count = math.prod(shape)
            if not values:
                problem = f"{shown(name)} is of type {kind}"
                errors.add(problem, "types it knows", self.hint, kind=Refused)
            elif not shape or not 0 < count < 2**62 or shape[-1] % values:
                problem = f"{shown(name)} of shape {shape}"[:200]
                errors.add(problem, f"rows of whole blocks of {values} values")
            else:
                start = data_start + offset
                entries.append(Entry(name, shape, kind, start, start + count // values * width))
        Problems(errors[:MAX_ERRORS]).raise_all()
        at = data_start
        for entry in sorted(entries, key=lambda entry: entry.start):
            if entry.start != at or entry.stop > self.size:
                problem = f"{shown(entry.name)} at bytes {entry.start} to {entry.stop}"[:300]
                errors.add(problem, f"from {at} on, in a file of {self.size} bytes")
            at = -(-entry.stop // alignment) * alignment
        Problems(errors[:MAX_ERRORS]).raise_all()
        return tuple(entries)
