"""Parse GGUF headers, and check the offsets of tensors against the file's size before anything else
reads the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As strict as llama.cpp's own
loader, and stricter than the reader of the `gguf` package, which trusts offsets and counts.
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from adapterkit.core.checkpoint.folder import Folder, SingleFile
from adapterkit.core.checkpoint.header import MAX_NAME, Header, TensorSpec
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, listed, shown
from adapterkit.core.records import Json

ENDING = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"  # llama.cpp's names
ALIGNMENT = 32  # unless general.alignment says otherwise
FIRST_READ = 4 << 20  # bytes; enough for a small vocabulary
MAX_HEADER = 512 << 20
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_RANK = 4  # ggml's
MAX_AXES = 5  # in files: of kernels of video models in ComfyUI-GGUF's
MAX_ERRORS = 20  # reported at once
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)")
SPLIT_TENSORS = "split.tensors.count"  # in all files of a model
MAX_ITEMS = 1 << 16  # the longest array whose numbers are kept
# struct codes of the scalar types of metadata, by their id
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY, UINT32 = 8, 9, 4
TENSOR_COUNT, KEY_COUNT = 8, 16  # positions of the two counts in a header
# ggml's types that files have: name -> (id, values of a block, bytes of one)
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32")
FLOAT32 = 6  # a scalar type of metadata
SIZES = {number: (values, width) for number, values, width in TYPES.values()}
NAMES = {number: name for name, (number, _, _) in TYPES.items()}


def text_bytes(text: str) -> bytes:
    """A string as GGUF stores it, after its length."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def info_bytes(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """The header entry of a tensor, from its type id and its offset in the data."""
    rank = len(shape)
    return text_bytes(name) + struct.pack(f"<I{rank}QIQ", rank, *reversed(shape), kind, offset)


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


class Length(int):
    """The length of an array, which is stored instead of its items."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file, its shape in torch's order."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml's type id
    start: int  # absolute position in the file
    stop: int
    file: str
    at: int  # position in the header of its type's id, and of its offset behind that

    @property
    def type(self) -> str:
        """ggml's name of its type."""
        return NAMES[self.kind]

    def stored(self, folder: int = 0) -> TensorSpec:
        """Its stored bytes, as rows."""
        rows = math.prod(self.shape[:-1])
        shape = (rows, (self.stop - self.start) // rows)
        return TensorSpec(self.name, "U8", shape, self.file, self.start, self.stop, folder)


@dataclass(frozen=True)
class GgufHeader:
    """A parsed header: its exact bytes, its metadata (arrays as lengths), its tensors."""

    raw: bytes = field(repr=False)
    metadata: Json  # an array: its length
    tensors: tuple[Entry, ...]
    arrays: dict[str, tuple] = field(default_factory=dict)  # those of at most MAX_ITEMS numbers
    file: str = ""
    size: int = 0  # of the whole file
    # where each key of the metadata begins and ends
    spans: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def without(self, prefix: str) -> bytes:
        """The header without arrays whose keys begin with the prefix."""
        left_out = [
            span
            for key, span in self.spans.items()
            if key.startswith(prefix) and type(self.metadata[key]) is Length
        ]
        raw, at = bytearray(), 0
        for start, stop in left_out:
            raw += self.raw[at:start]
            at = stop
        raw += self.raw[at:]
        struct.pack_into("<Q", raw, KEY_COUNT, len(self.metadata) - len(left_out))
        return bytes(raw)

    def counting(self, total: int) -> "GgufHeader":
        """The header of one file of a split model with so many tensors in all its files."""
        if type(self.metadata.get(SPLIT_TENSORS)) is not int:
            return self
        start, stop = self.spans[SPLIT_TENSORS]
        at = start + 12 + len(SPLIT_TENSORS)  # behind the length of the key, and the type
        new = total.to_bytes(8, "little")[: stop - at]
        return replace(self, raw=self.raw[:at] + new + self.raw[stop:])

    @property
    def alignment(self) -> int:
        return self.metadata.get("general.alignment", ALIGNMENT)

    @property
    def architecture(self) -> str:
        """The architecture; empty in files of stable-diffusion.cpp, which have no metadata."""
        return self.metadata.get("general.architecture", "")

    @property
    def header(self) -> Header:
        """The header in the form that plans use to identify a file by its header's hash."""
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
    at: int  # position of `kind` in the header


class GgufFiles(NamedTuple):
    """A folder, and the files in it that form one model: one, or all of a split one."""

    folder: Folder
    names: list[str]


def find_gguf(folder: Folder) -> GgufFiles | None:
    """The GGUF files of a folder, or of its one file's split model; None if there are none, or if
    the folder has safetensors too. `Refused` for several models or missing files."""
    single = getattr(folder, "single", None)
    if single and NUMBERED.fullmatch(single):
        folder = cast(SingleFile, folder).containing_folder()
    names = [name for name in folder.files() if "/" not in name]
    files = sorted(name for name in names if name.lower().endswith(ENDING))
    if single and NUMBERED.fullmatch(single):
        files = [name for name in files if model_of(name) == model_of(single)]
    elif any(name.endswith(".safetensors") for name in names):
        return None
    if not files:
        return None
    models = sorted({model_of(name) for name in files})
    if len(models) > 1:
        raise Refused(
            f"the folder has {len(models)} GGUF models: {', '.join(map(shown, models[:6]))}",
            expected="one",
            where=folder.name,
            hint="give the path of the file itself, or of the first file of a split model",
            code="AK207",
        )
    expected = _parts_of(files[0])
    if missing := [name for name in expected if name not in files]:
        raise Refused(
            f"{len(missing)} of {len(expected)} parts are missing: {listed(missing)}",
            expected="all parts of the split model",
            where=folder.name,
            hint="download them",
            code="AK207",
        )
    return GgufFiles(folder, expected)


def is_gguf_adapter(files: GgufFiles) -> bool:
    """Return whether the metadata declares the file an adapter."""
    try:
        metadata = read_gguf(files.folder, files.names[0]).metadata
    except AdapterkitError:
        return False
    return metadata.get("general.type") == "adapter"


def _parts_of(name: str) -> list[str]:
    """The files of the model that a file belongs to."""
    match = NUMBERED.fullmatch(name)
    if match is None:
        return [name]
    start, _, count, ending = match.groups()
    return [f"{start}-{number:05d}-of-{count}{ending}" for number in range(1, int(count) + 1)]


def model_of(name: str) -> str:
    """A file's name without its number in a split model."""
    match = NUMBERED.fullmatch(name)
    return f"{match[1]}-of-{match[3]}" if match else name


def read_model(files: GgufFiles) -> tuple[GgufHeader, dict[str, GgufHeader]]:
    """The header of a model with the tensors of all its files, and each file's own header."""
    headers = {name: read_gguf(files.folder, name) for name in files.names}
    errors = _damage(files.names[0])
    for number, (name, header) in enumerate(headers.items()):
        declared = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0)
        if declared != (number, len(headers)) and (
            len(headers) > 1 or declared not in ((0, 0), (0, 1))
        ):
            errors.add(
                f"{shown(name)} is file {shown(declared[0])} of {shown(declared[1])}, from 0 on",
                f"{number} of {len(headers)} of a split model",
                "give a folder with all files, named as llama.cpp names them, or join them: "
                "llama-gguf-split --merge FIRST OUT",
                kind=Refused,
                code="AK207",
            )
    errors.raise_all()
    first, *others = headers.values()
    tensors = [entry for header in headers.values() for entry in header.tensors]
    stated = first.metadata.get(SPLIT_TENSORS, len(tensors))
    if others and stated != len(tensors):
        errors.add(
            f"{len(tensors)} tensors in all files",
            f"{shown(stated)}, as the first one says",
            code="AK207",
        )
    twice = len(tensors) - len({entry.name for entry in tensors})
    if twice:
        errors.add(f"{twice} tensors are in two files", "each tensor once", code="AK207")
    errors.raise_all()
    return replace(first, tensors=tuple(tensors)), headers


def read_gguf(
    folder: Folder,
    name: str,
    block_sizes: Mapping[int, tuple[int, int]] = SIZES,
    hint: str = "convert the file with llama.cpp's own tools",
) -> GgufHeader:
    """Parse the header of a GGUF file; `Damaged` or `Refused` unless it and the data are complete.

    `block_sizes`: (values, bytes) of a block of each type id; `hint`: for unknown types.
    """
    size = folder.files()[name]
    raw = folder.read(name, 0, min(FIRST_READ, size))
    while True:
        try:
            return _Parser(raw, size, name, block_sizes, hint).header()
        except _Incomplete as incomplete:
            if len(raw) >= min(size, MAX_HEADER):
                problem = f"the file ends inside its header: {incomplete}"
                _damage(name).fail(problem, "a whole header", code="AK207")
            raw += folder.read(name, len(raw), min(4 * len(raw), size, MAX_HEADER))


def stored_tensors(folder: Folder, name: str) -> list[TensorSpec]:
    """The tensors of a file that this package wrote."""
    return [entry.stored() for entry in read_gguf(folder, name).tensors]


class _Incomplete(Exception):
    """The bytes read so far end before the header does."""


def _damage(name: str) -> Problems:
    """A `Damaged` error for a file."""
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
        self.spans: dict[str, tuple[int, int]] = {}
        self.errors = _damage(name)

    def header(self) -> GgufHeader:
        if self.raw[:4] != MAGIC:
            self.errors.fail(f"a file that begins with {self.raw[:4]!r}", "GGUF", code="AK207")
        self.at = 4
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            big_endian = version & 0xFFFF == 0
            raise Refused(
                f"this is {'big-endian GGUF' if big_endian else f'GGUF version {version}'}",
                expected="GGUF version 2 or 3, little-endian",
                where=self.name,
                hint="convert the file with llama.cpp's own tools",
                code="AK207",
            )
        tensors, keys = self.unpack("QQ")
        if tensors > MAX_TENSORS or keys > MAX_KEYS or 24 * tensors + 13 * keys > self.size:
            self.errors.fail(f"{tensors} tensors and {keys} keys", self.capacity, code="AK207")
        metadata = self.metadata(keys)
        infos = [self.tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        valid = type(alignment) is int and 8 <= alignment <= 1 << 20
        if not valid or alignment & (alignment - 1):
            self.errors.fail(
                f"general.alignment {shown(alignment)}", "a power of 2 from 8 on", code="AK207"
            )
        raw, data_start = self.raw[: self.at], aligned(self.at, alignment)
        entries = self.entries(infos, data_start, alignment)
        return GgufHeader(raw, metadata, entries, self.arrays, self.name, self.size, self.spans)

    @property
    def capacity(self) -> str:
        return f"at most what fits into {self.size} bytes"

    def unpack(self, codes: str) -> tuple:
        """Read little-endian numbers by their struct codes."""
        size = struct.calcsize("<" + codes)
        return struct.unpack("<" + codes, self.read(size))

    def read(self, count: int) -> bytes:
        if count > self.size - self.at:
            self.errors.fail(f"{count} bytes at {self.at}", self.capacity, code="AK207")
        if count > len(self.raw) - self.at:
            raise _Incomplete(f"{count} bytes at {self.at}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def text(self, max_length: int | None = None) -> str:
        (length,) = self.unpack("Q")
        if max_length is not None and length > max_length:
            self.errors.fail(f"a name of {length} bytes", f"at most {max_length}", code="AK207")
        try:
            return self.read(length).decode()
        except UnicodeDecodeError:
            self.errors.fail(f"a text at {self.at} that is not UTF-8", "UTF-8", code="AK207")

    def metadata(self, count: int) -> Json:
        metadata: Json = {}
        for _ in range(count):
            start = self.at
            key = self.text(MAX_NAME)
            if not key.isprintable() or not key or key in metadata:
                self.errors.fail(
                    f"the key {shown(key)!r}", "printable keys, each once", code="AK207"
                )
            (kind,) = self.unpack("I")
            metadata[key] = self.array(key) if kind == ARRAY else self.value(kind)
            if key == "general.alignment" and kind != UINT32:
                self.errors.fail(
                    f"general.alignment of type {kind}", "a 32-bit number", code="AK207"
                )
            self.spans[key] = start, self.at
        name = metadata.get("general.architecture")
        if name is None and (metadata.get("split.no") or not metadata):
            return metadata  # only the first file has the model's metadata
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
            problem = f"general.architecture {shown(name)!r}"
            self.errors.fail(problem, "the name of an architecture", code="AK207")
        return metadata

    def value(self, kind: int) -> Any:
        """A metadata value that is not an array."""
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        self.errors.fail(f"a value of type {kind}", "one of 13 types", code="AK207")

    def array(self, key: str) -> Length:
        """The length of an array; its items are skipped, except for short arrays of numbers."""
        inner, count = self.unpack("IQ")
        if inner in SCALARS:
            code = SCALARS[inner]
            data = self.read(count * struct.calcsize("<" + code))
            if count <= MAX_ITEMS:
                self.arrays[key] = struct.unpack(f"<{count}{code}", data)
        elif inner == STRING:
            if 8 * count > self.size - self.at:
                self.errors.fail(f"an array of {count} texts", self.capacity, code="AK207")
            self.skip_texts(count)
        else:
            self.errors.fail(f"an array of type {inner}", "numbers or texts", code="AK207")
        return Length(count)

    def skip_texts(self, count: int) -> None:
        """Skip strings, most in a short loop because vocabularies have hundreds of thousands."""
        raw, at, length_at = self.raw, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                stop = at + 8 + length_at(raw, at)[0]
                raw[at + 8 : stop].decode()
                if stop > len(raw):
                    break
                count, at = count - 1, stop
        except (struct.error, UnicodeDecodeError):
            pass
        self.at = at
        for _ in range(count):  # raises for a string that is cut off or not UTF-8
            self.text()

    def tensor_info(self) -> _TensorInfo:
        name = self.text(MAX_NAME)
        if not name or not name.isprintable() or ".." in name.replace("\\", "/").split("/"):
            expected = f"1 to {MAX_NAME} printable characters"
            self.errors.fail(f"tensor name {shown(name)!r}", expected, code="AK207")
        (rank,) = self.unpack("I")
        if rank > MAX_AXES:
            self.errors.fail(
                f"{shown(name)} of {rank} dimensions", f"at most {MAX_AXES}", code="AK207"
            )
        shape = self.unpack(f"{rank}Q")[::-1]
        at = self.at
        kind, offset = self.unpack("IQ")
        return _TensorInfo(name, shape, kind, offset, at)

    def entries(
        self, infos: list[_TensorInfo], data_start: int, alignment: int
    ) -> tuple[Entry, ...]:
        """The tensors with their offsets; refused unless they fill the rest of the file, each
        aligned after the one before."""
        errors = self.errors
        entries, names = [], set()
        for name, shape, kind, offset, at in infos:
            if name in names:
                errors.add(f"{shown(name)} is there twice", "each tensor once", code="AK207")
            names.add(name)
            values, width = self.block_sizes.get(kind, (0, 0))
            count = math.prod(shape)
            if not values:
                problem = f"{shown(name)} is of type {kind}"
                errors.add(problem, "types it knows", self.hint, kind=Refused, code="AK207")
            elif not shape or not 0 < count < 2**62 or shape[-1] % values:
                problem = f"{shown(name)} of shape {shape}"[:200]
                errors.add(problem, f"rows of whole blocks of {values} values", code="AK207")
            else:
                start = data_start + offset
                stop = start + count // values * width
                entries.append(Entry(name, shape, kind, start, stop, self.name, at))
        Problems(errors[:MAX_ERRORS]).raise_all()
        at = data_start
        for entry in sorted(entries, key=lambda entry: entry.start):
            if entry.start != at or entry.stop > self.size:
                problem = f"{shown(entry.name)} at bytes {entry.start} to {entry.stop}"[:300]
                errors.add(problem, f"from {at} on, in a file of {self.size} bytes", code="AK207")
            at = aligned(entry.stop, alignment)
        Problems(errors[:MAX_ERRORS]).raise_all()
        return tuple(entries)
