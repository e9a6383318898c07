"""Hashes of files: sha256, of a whole file, or running as its bytes come, with a mark at each
tensor's end."""

import hashlib
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.layout import ShardLayout

MARK = 16  # hexadecimal digits of a mark


class RunningHash:
    """The sha256 of a file whose bytes come in order, and marks: its first digits up to each
    tensor's end. From the marks `verify` finds the damaged tensor of a file."""

    def __init__(self, ends: Iterable[tuple[str, int]] = ()):
        """`ends`: each tensor's key and the position behind its last byte, in file order."""
        self.marks: dict[str, str] = {}
        self._ends = deque(ends)
        self._digest = hashlib.sha256()
        self._position = 0

    def update(self, data: memoryview | bytes) -> None:
        """Add the file's next bytes."""
        view, done = memoryview(data), 0
        while self._ends and self._ends[0][1] <= self._position + len(view):
            key, end = self._ends.popleft()
            self._digest.update(view[done : end - self._position])
            done = end - self._position
            self.marks[key] = self._digest.hexdigest()[:MARK]
        self._digest.update(view[done:])
        self._position += len(view)

    def hexdigest(self) -> str:
        """Return the sha256 of all bytes so far."""
        self.update(b"")  # tensors without bytes at the end
        return self._digest.hexdigest()


def tensor_ends(layout: ShardLayout) -> list[tuple[str, int]]:
    """Return each tensor's key and the position behind its last byte, in file order."""
    pairs = zip(layout.tensors, layout.starts, strict=True)
    return [(tensor.key, start + tensor.nbytes) for tensor, start in pairs]


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file on local disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_small_file(folder: Folder, name: str) -> str:
    """Return the sha256 of a small file of a folder, local or remote."""
    return hashlib.sha256(folder.read(name, 0, folder.files()[name])).hexdigest()
