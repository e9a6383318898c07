"""An output file that grows out of its parts: the first becomes it, the others are copied behind.

Whoever joins removes each part once the file has its bytes: at most one of them is there twice.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

from adapterkit.core.checkpoint.disk import check_folder, storage_errors, sync_folder
from adapterkit.core.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.core.output.writer import ShardFile, unfinished_name
from adapterkit.core.plan import OutputFile
from adapterkit.core.system import system

BLOCK = 4 << 20


class JoinedFile:
    """An output file while it is joined: `NAME.part`, or `NAME.<attempt>.part`."""

    def __init__(self, folder: Path, shard: OutputFile, attempt: str = "", *, hashed: bool):
        self.folder, self.file, self.attempt = folder, shard.file, attempt
        self.path = folder / unfinished_name(shard.file, attempt)
        with storage_errors(self.path):
            check_folder(folder, self.path.parent)
        self.digest = RunningHash(tensor_ends(shard.layout)) if hashed else None

    def remove(self) -> None:
        """Remove what another join has left."""
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def begin(self, part: str) -> None:
        """Take the first part for the file's beginning."""
        with storage_errors(self.path):
            system.replace(self.folder / part, self.path)
            sync_folder(self.path.parent)

    def read(self, size: int) -> None:
        """Hash the file's beginning."""
        if self.digest is not None:
            for view in _blocks(self.path, size):
                self.digest.update(view)

    def append(self, part: str, start: int, stop: int) -> None:
        """Copy a part to [start, stop), durably; what the file has from `start` on is cut off."""
        file = ShardFile(self.folder, self.file, stop, self.attempt, kept=start)
        try:
            at = start
            for view in _blocks(self.folder / part, stop - start):
                file.write(view, at)
                file.start_writeback(at, len(view))
                at += len(view)
                if self.digest is not None:
                    self.digest.update(view)
            file.sync()
        except BaseException:
            file.abandon()
            raise

    def drop(self, part: str) -> None:
        """Remove a part whose bytes the file has."""
        path = self.folder / part
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def sums(self) -> tuple[str | None, dict[str, str]]:
        """The whole file's sha256 and the marks at its tensors' ends."""
        if self.digest is None:
            return None, {}
        return self.digest.hexdigest(), self.digest.marks

    def publish(self) -> None:
        """Give the whole file its name."""
        with storage_errors(self.path):
            system.replace(self.path, self.folder / self.file)


def _blocks(path: Path, size: int) -> Iterator[memoryview]:
    """The first bytes of a file; each block is gone when the next one comes."""
    block, left = memoryview(bytearray(min(BLOCK, size))), size
    with storage_errors(path), open(path, "rb", buffering=0) as file:
        while left:
            count = file.readinto(block[: min(BLOCK, left)])
            if not count:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            yield block[:count]
            left -= count
