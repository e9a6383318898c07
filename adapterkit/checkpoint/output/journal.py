"""What is noted of an output in the making, a line for each entry: a JSON object whose last value
is a checksum, so that a line that is torn or damaged is known and counts as not there.

Who may write these files may write the output too: nothing here is checked against forgery.
"""

import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from adapterkit.checkpoint.system import system
from adapterkit.records import Json

_SUM = b',"crc32":"'  # begins the end of a line; an entry is never empty

Entry = Json


def line_of(entry: Entry) -> bytes:
    """An entry as a line."""
    text = json.dumps(entry, separators=(",", ":")).encode().removesuffix(b"}")
    return text + _end(text)


def entries_of(lines: bytes) -> Iterator[tuple[bytes, Entry]]:
    """The lines with their entries, up to the first one that is not as it was written."""
    for line in lines.splitlines(keepends=True):
        text, _, _ = line.rpartition(_SUM)
        if not text or line != text + _end(text):
            return
        yield line, json.loads(text + b"}")


def read_entry(path: Path) -> Entry:
    """The only entry of a file; empty where there is none."""
    return next((entry for _, entry in entries_of(read_lines(path))), {})


def read_lines(path: Path) -> bytes:
    """The bytes of an ordinary file; none of a link or a pipe, and where there is none."""
    try:
        with open(system.open(path, "own"), "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError:
        return b""


def _end(text: bytes) -> bytes:
    return _SUM + b'%08x"}\n' % zlib.crc32(text)
