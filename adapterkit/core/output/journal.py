"""The journal of an unfinished output: one JSON object per line, with a checksum as its last value.

A line that is torn or damaged, or whose values have wrong types, counts as absent. Anyone who can
write these files can write the output too, so nothing here is checked against forgery."""

import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.core import records
from adapterkit.core.records import COUNT, FINITE, TABLE, TEXT, Json, list_of, optional
from adapterkit.core.system import system

_SUM = b',"crc32":"'  # starts the end of a line; an entry is never empty

MOST = 256 << 20  # the largest file in bytes
WORDS = {
    "fingerprint": TEXT, "recipe": TABLE, "publish": TEXT, "old": list_of(TEXT),
    "attempt": TEXT, "device": TEXT, "torch": TEXT, "seconds": FINITE, "joined": COUNT,
    "process": TEXT, "number": COUNT, "done": COUNT, "pins": TABLE,
}  # fmt: skip

Entry = Json


def line_of(entry: Entry) -> bytes:
    """Return an entry as a line."""
    text = json.dumps(entry, separators=(",", ":")).encode().removesuffix(b"}")
    return text + _end(text)


def entries_of(lines: bytes) -> Iterator[tuple[bytes, Entry]]:
    """Yield the lines with their entries, up to the first damaged one."""
    for line in lines.splitlines(keepends=True):
        text, _, _ = line.rpartition(_SUM)
        if not text or line != text + _end(text):
            return
        if (entry := _parsed(text + b"}")) is None:
            return
        yield line, entry


def _parsed(text: bytes) -> Entry | None:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    fits = all(check.fits(entry[word]) for word, check in WORDS.items() if word in entry)
    return entry if fits else None


def read_entry(path: Path) -> Entry:
    """Return the only entry of a file; empty if there is none."""
    return next((entry for _, entry in entries_of(read_lines(path))), {})


def read_lines(path: Path) -> bytes:
    """Return the bytes of an ordinary file; empty for a link, a pipe or more than `MOST` bytes."""
    try:
        with open(system.open(path, "own"), "rb") as file:
            status = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= MOST else b""
    except OSError:
        return b""


def _end(text: bytes) -> bytes:
    return _SUM + b'%08x"}\n' % zlib.crc32(text)


@dataclass
class ShardResult:
    """One written shard: its hash, the hash of its bytes up to each tensor's end, and metrics."""

    file: str
    size: int
    sha256: str | None
    # key -> first 16 hex digits of the sha256 of the file up to that tensor's end; None for a file
    # whose bytes never came here
    marks: dict[str, str] | None
    metrics: dict[str, dict]
    grown: int = 0  # bytes by which tensors are larger than planned, all together
    tensors: int | None = None  # their number, if the plan only knows an upper bound
    # key -> dtype, shape, position in the handoff's file
    handoffs: dict[str, list] = field(default_factory=dict)


def read_result(entry: Entry) -> ShardResult | None:
    """Return the result that an entry records, not yet checked against the plan; None for another
    entry."""
    return ShardResult(**entry["shard"]) if RESULT.fits(entry.get("shard")) else None


POSITION = records.test("a place", lambda v: [*map(type, v)] == [str, list, int])
RESULT_WORDS = {
    "file": TEXT, "size": COUNT, "sha256": optional(TEXT), "marks": optional(TABLE),
    "metrics": records.table_of(TEXT, TABLE), "grown": records.INTEGER,
    "tensors": optional(COUNT), "handoffs": records.table_of(TEXT, POSITION),
}  # fmt: skip
RESULT = records.also(
    records.entries(RESULT_WORDS), "a result", lambda v: v.keys() == RESULT_WORDS.keys()
)
