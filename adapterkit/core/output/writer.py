"""One output file: preallocated, written at offsets in any order, fsynced, renamed.

Sizes prove nothing after a power cut: preallocated and renamed without fsync, a file can be all
zeros.
"""

import contextlib
import errno
import os
import re
from pathlib import Path

from adapterkit.core.checkpoint import disk
from adapterkit.core.checkpoint.disk import check_folder, storage_errors, write_all
from adapterkit.core.system import system

UNFINISHED = ".part"
PART_NAME = re.compile(r"(.+)@(\d+)-(\d+)")
FLUSH = 32 << 20  # bytes after which write-back is started: the fsync at the end finds little to do


def unfinished_name(name: str, attempt: str = "") -> str:
    """Return the name of a file while it is written."""
    return f"{name}.{attempt}{UNFINISHED}" if attempt else name + UNFINISHED


def part_name(file: str, start: int, stop: int) -> str:
    """Return the name of the file for bytes [start, stop) of an output file."""
    return f"{file}@{start}-{stop}"


def part_of(name: str) -> tuple[str, int, int] | None:
    """Return the output file and the bytes [start, stop) of a range's file name; None for another
    name."""
    match = PART_NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None


class ShardFile:
    """One output file while it is written: `name.part`, of its final size from the start.

    With an `attempt` it is `name.<attempt>.part`, because other processes may write the same file:
    the last rename wins. Then the folder must exist; if it does not, the output is finished.
    `kept`: the file exists, and grows after that many bytes."""

    def __init__(
        self, folder: Path, name: str, size: int, attempt: str = "", *, kept: int | None = None
    ):
        self.final, self.size, self.descriptor = folder / name, size, -1
        self.path = folder / unfinished_name(name, attempt)
        with storage_errors(self.path):
            check_folder(folder, self.path.parent)
            if not attempt:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            if kept is None:
                self.path.unlink(missing_ok=True)
            self.descriptor = system.open(self.path, "create" if kept is None else "keep")
            try:
                if kept is None:
                    self._allocate(size)
                else:
                    os.ftruncate(self.descriptor, kept)
            except BaseException:
                self.abandon()
                raise

    def _allocate(self, size: int) -> None:
        try:
            system.allocate(self.descriptor, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        os.ftruncate(self.descriptor, size)

    def write(self, data: memoryview | bytes, position: int) -> None:
        """Write all of `data` at `position`, through short writes."""
        with storage_errors(self.path):
            write_all(data, lambda rest, at: system.write_at(self.descriptor, rest, position + at))

    def read(self, buffer: memoryview, position: int) -> None:
        """Fill the buffer with the bytes written at `position`."""
        with storage_errors(self.path):
            done = 0
            while done < len(buffer):
                n = system.read_at(self.descriptor, buffer[done:], position + done)
                if n == 0:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                done += n

    def truncate(self, size: int) -> None:
        """Set the final size, if that of the start was an upper bound."""
        with storage_errors(self.path):
            os.ftruncate(self.descriptor, size)

    def copy_from(self, source: int, start: int, position: int, length: int) -> bool:
        """Copy a byte range of an open file inside the kernel, as a reflink if possible; return
        False if not."""
        done = 0
        while done < length:
            try:
                n = system.copy_range(
                    source, self.descriptor, length - done, start + done, position + done
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    with storage_errors(self.path):
                        raise
                # EXDEV, ENOSYS, EINVAL, EIO ...: the caller reads and writes, which reports a real
                # error
                return False
            if n == 0:
                return False
            done += n
        return True

    def start_writeback(self, position: int, length: int) -> None:
        """Start writing this range to disk. Errors appear at `sync`."""
        if disk.DURABLE:
            with contextlib.suppress(OSError):
                system.start_writeback(self.descriptor, position, length)

    def sync(self) -> None:
        """Make the bytes durable and close the file. A failed fsync is final and never retried,
        because the kernel reports an error only once."""
        descriptor, self.descriptor = self.descriptor, -1
        with storage_errors(self.path):
            try:
                disk.sync(descriptor)
            finally:
                os.close(descriptor)

    def publish(self) -> None:
        """Give the synced file its name."""
        with storage_errors(self.path):
            system.replace(self.path, self.final)

    def abandon(self) -> None:
        """Close the file as it is; a later run writes it again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
