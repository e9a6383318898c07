"""The one parser and the one writer of safetensors headers, strict in both directions.

Format: https://github.com/huggingface/safetensors#format. It is stricter than the reference reader
(0.8.0), which accepts duplicate keys (the last wins), unknown fields and any name: here each key is
unique, names are printable, and ranks are sane."""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, replace

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import Folder, parsed
from adapterkit.core.checkpoint.strict import strict_json
from adapterkit.core.errors import Damaged, shown

FIRST_READ = 65536  # bytes; the headers of most shards fit, so one read does
MAX_HEADER = 100_000_000  # the reference reader's cap
MAX_RANK = 64
MAX_NAME = 1000
MAX_KEYS = 2_500_000  # of all objects together: half a million tensors; parsed they take 0.5 GB
MAX_VALUES = 8_000_000
ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: the position of its bytes, its dtype and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str  # name inside its folder
    start: int  # absolute position in the file
    stop: int
    folder: int = 0  # which of the job's inputs holds it: 0 the base, 1.. the adapters

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def narrowed(self, shape: tuple[int, ...], first: int, last: int) -> "TensorSpec":
        """Return tensor.view(shape)[first:last] as a tensor of its own."""
        width = self.nbytes // shape[0]
        start, stop = (self.start + row * width for row in (first, last))
        return replace(self, shape=(last - first, *shape[1:]), start=start, stop=stop)


@dataclass(frozen=True)
class Header:
    """A parsed header: exact bytes (length prefix included), tensors in file order, metadata."""

    raw: bytes = field(repr=False)
    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()


def read_header(folder: Folder, name: str, number: int = 0) -> Header:
    """Return one safetensors file's header, in one read if it is short. `number`: the index of the
    folder among the job's inputs. Raises `Damaged`."""
    header = parsed(folder, ("header", name), lambda: _read_header(folder, name, number))
    if all(spec.folder == number for spec in header.tensors[:1]):
        return header
    return replace(header, tensors=tuple(replace(spec, folder=number) for spec in header.tensors))


def _read_header(folder: Folder, name: str, number: int) -> tuple[int, Header]:
    """Return the header's length and the header."""
    if (size := folder.files().get(name)) is None:
        problem, where = f"no file {shown(name)}", folder.label
        raise Damaged(
            problem, expected="an ordinary file", where=where, hint="copy it again", code="AK202"
        )
    raw = folder.read(name, 0, min(FIRST_READ, size))
    length = header_length(raw[:64], size, name)
    if length > len(raw):
        raw += folder.read(name, len(raw), length)
    if len(raw) < length:
        raise Damaged(
            f"the file has {len(raw)} bytes of a header of {length}",
            where=name,
            hint="copy the file again",
            code="AK202",
        )
    return length, parse_header(raw[:length], size, name, number)


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Return the header's length (8-byte prefix included) in a file of `file_size` bytes; `Damaged`
    if it has none."""
    other = hint = ""
    if prefix.startswith(b"version https://git-lfs"):
        other, hint = "a Git LFS pointer", "run `git lfs pull`"
    elif prefix.lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml")):
        other, hint = "an HTML page", "download it again"
    if other:
        raise Damaged(
            f"this is {other}, not the weights",
            expected="a safetensors file",
            where=where,
            hint=hint,
            code="AK202",
        )
    length = int.from_bytes(prefix[:8], "little")
    limit = min(MAX_HEADER, file_size - 8)
    if len(prefix) < 8 or not 2 <= length <= limit:
        found = f"header length {length}" if len(prefix) >= 8 else f"a file of {file_size} bytes"
        raise Damaged(
            f"{found}: this is not a safetensors file, or it is cut off",
            expected="a safetensors file"
            + f", whose first 8 bytes are a length of at most {limit}" * (limit >= 2),
            where=where,
            hint="download or copy the file again",
            code="AK202",
        )
    return 8 + length


def parse_header(raw: bytes, file_size: int, file: str, folder: int = 0) -> Header:
    """Return the tensors and metadata of header bytes `raw`; `Damaged` with the first error in
    them."""

    def damaged(problem: str, expected: str) -> Damaged:
        return Damaged(
            problem,
            expected=expected,
            where=file,
            hint="download or copy the file again",
            code="AK202",
        )

    if raw[8:9] != b"{":
        raise damaged("a header that does not start with '{'", "a JSON object")
    if raw.count(b":") > MAX_KEYS or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise damaged(
            "a header of too many keys or values", f"at most {MAX_KEYS // 5:,} tensors in a file"
        )
    try:
        table = strict_json(raw[8:])
    except ValueError as error:
        raise damaged(
            f"a header that is not strict JSON: {shown(error)}", "UTF-8 JSON, each key once"
        ) from error
    metadata = table.pop("__metadata__", None)
    if metadata is None:  # null means no metadata, as for mlx and the reference reader
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("__metadata__ that is not text to text", "a map of strings")
    base = len(raw)
    shapes: dict[tuple, tuple] = {}  # one object for each shape: a large model has few of them
    tensors = [
        _tensor(key, entry, base, file, folder, shapes, damaged) for key, entry in table.items()
    ]
    tensors.sort(key=lambda t: (t.start, t.stop))
    at = base
    for tensor in tensors:
        if tensor.start != at:
            word = (
                "overlaps the one before"
                if tensor.start < at
                else f"leaves a gap of {tensor.start - at} bytes"
            )
            raise damaged(
                f"tensor {shown(tensor.key)!r} {word}", "tensors that tile the data exactly"
            )
        at = tensor.stop
    if at != file_size:
        word = "cut off" if at > file_size else "followed by other bytes"
        raise damaged(f"{file_size} bytes: the data is {word}", f"{at} bytes, as the header says")
    return Header(raw, tuple(tensors), metadata)


def _tensor(
    key: str, entry, base: int, file: str, folder: int, shapes: dict[tuple, tuple], damaged
) -> TensorSpec:
    if (
        not key
        or len(key) > MAX_NAME
        or not key.isprintable()
        or (".." in key and ".." in key.replace("\\", "/").split("/"))
    ):
        raise damaged(
            f"tensor name {shown(key)!r}", f"1 to {MAX_NAME} printable characters, no path upwards"
        )
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise damaged(f"the entry of {shown(key)!r}", "dtype, shape and data_offsets")
    dtype, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise damaged(
            f"dtype {shown(dtype)!r} of {shown(key)!r}", "one of " + " ".join(dtypes.BITS)
        )
    if not _naturals(sizes) or len(sizes) > MAX_RANK:
        raise damaged(f"the shape of {shown(key)!r}", f"at most {MAX_RANK} whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise damaged(f"the data_offsets of {shown(key)!r}", "two whole numbers")
    if 0 in sizes and math.prod(filter(None, sizes)) >= 2**63:
        raise damaged(f"the shape of {shown(key)!r}", "a product of its other numbers below 2^63")
    shape = tuple(sizes)
    shape = shapes.setdefault(shape, shape)
    bits = math.prod(shape) * dtypes.BITS[dtype]
    start, stop = offsets
    if bits % 8 or stop - start != bits // 8:
        raise damaged(
            f"{stop - start} bytes for {shown(key)!r}",
            f"{bits // 8} bytes for {dtype} {shape}"[:200],
        )
    return TensorSpec(key, sys.intern(dtype), shape, file, base + start, base + stop, folder)


def _naturals(value) -> bool:
    # bool is an int in Python; a header that says `true` is still damaged
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def build_header(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], size: int = 0
) -> tuple[bytes, list[int]]:
    """Return header bytes, at least `size` of them, for tensors (key, dtype, shape) in this order,
    and each one's position."""
    table: dict = {"__metadata__": metadata} if metadata else {}
    at, starts = 0, []
    for key, dtype, shape in tensors:
        stop = at + dtypes.size(dtype, math.prod(shape))
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        starts.append(at)
        at = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(size - 8)
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return raw, [len(raw) + start for start in starts]
