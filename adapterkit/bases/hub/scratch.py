"""Download large Hub files into a folder of the job, by ranges in parallel, checked against the
Hub's sha256, and remove them after use. The shared cache is read but never written.

A bounded folder takes a fixed number of bytes: files are downloaded when they are read, and the
least recently used ones are removed to make space.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from adapterkit.bases.hub.errors import location
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.disk import storage_errors, write_all
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.interruptible import run_stoppable
from adapterkit.core.errors import Failed
from adapterkit.core.output.writer import unfinished_name
from adapterkit.core.system import system
from adapterkit.core.system.interface import MINE

PIECES = (8 << 20, 64 << 20)  # bytes of one request, at least and at most: the Hub counts them
STREAMS = 4  # requests at a time
BLOCK = 4 << 20  # bytes that are hashed at a time


def in_scratch(folder: Folder, place: Path) -> Folder:
    """A Hub folder with its large files in a folder of the job; other folders unchanged."""
    return ScratchFolder(folder, place) if isinstance(folder, HubFolder) else folder


class ScratchFolder:
    """A Hub `Folder` for a job with little disk; `download` before `path`, `drop` after.

    Small files that the Hub keeps in git are read through the shared cache.
    """

    def __init__(self, source: HubFolder, place: Path):
        self.source, self.place = source, place
        self.name, self.label = source.name, source.label
        self.origin, self.hashes, self.parts = source.origin, source.hashes, source.parts

    def files(self) -> dict[str, int]:
        return self.source.files()

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self.source.read(name, start, stop)

    def prefetch(self, names: list[str]) -> None:
        pass

    def disk(self, name: str) -> int:
        """Bytes of disk that the downloaded file takes: 0 if it is cached, or stored in git."""
        if name not in self.hashes or self.source.cached(name) is not None:
            return 0
        parts = self.parts.get(name)
        return self.files()[name] if parts is None else sum(stop - at for at, stop in parts)

    def download(self, name: str, stopped: Callable[[], bool]) -> None:
        """Download the file; raises the errors of `download`."""
        download(self.source, name, self.place / name, stopped)

    def path(self, name: str) -> Path:
        """The downloaded file; the cached one if it takes no disk here."""
        here = self.place / name
        if not here.is_file() and self.disk(name):
            raise AssertionError(f"{self.label}/{name} is read but was not requested")
        return here if here.is_file() else self.source.path(name)

    def drop(self, name: str) -> None:
        """Remove a file that was downloaded."""
        (self.place / name).unlink(missing_ok=True)


class BoundedFolder(ScratchFolder):
    """A `ScratchFolder` whose files take at most `capacity` bytes, or the largest one's."""

    def __init__(self, source: HubFolder, place: Path, capacity: int):
        super().__init__(source, place)
        self.capacity = capacity


class ShardCache:
    """An LRU list of the files on disk; `sizes` in bytes."""

    def __init__(self, sizes: Mapping[str, int], capacity: int):
        self.sizes, self.capacity = sizes, capacity
        self._here: dict[str, None] = {}

    def read(self, name: str) -> list[str] | None:
        """Record that a file is read: return the files to remove for it; None if it was on disk."""
        is_here = name in self._here
        self._here.pop(name, None)
        gone = []
        if not is_here:
            used = sum(self.sizes[other] for other in self._here)
            for other in list(self._here):
                if used + self.sizes[name] <= self.capacity:
                    break
                used -= self.sizes[other]
                gone.append(other)
                del self._here[other]
        self._here[name] = None
        return None if is_here else gone


class BoundedSources(Sources):
    """The `Sources` of a job that reads one `BoundedFolder` in one thread and then removes its
    files."""

    def __init__(self, folder: BoundedFolder):
        super().__init__((folder,), {})
        self.folder = folder
        sizes = {name: folder.disk(name) for name in folder.files()}
        self._kept = ShardCache(sizes, folder.capacity)
        shutil.rmtree(folder.place, ignore_errors=True)  # of a run that was killed

    def acquire(self, which: tuple[int, str]) -> int:
        _, name = which
        if self._kept.sizes[name]:
            gone = self._kept.read(name)
            for other in gone or ():
                self.close_removed((0, other))
                self.folder.drop(other)
            if gone is not None:
                run_stoppable(partial(self.folder.download, name))
        return super().acquire(which)

    def close(self) -> None:
        try:
            super().close()
        finally:
            shutil.rmtree(self.folder.place, ignore_errors=True)


class Stopped(Failed):
    """The job has ended and no longer needs the file."""

    code = "AK704"

    def __init__(self):
        super().__init__("the job has ended")


def download(
    folder: HubFolder, name: str, file: Path, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Download one large file. Under its final name it is complete and matches the Hub's sha256, or
    has only the `parts` that the folder's job reads, and holes.

    Raises `Failed` without right bytes, and `Stopped`.
    """
    size, part = folder.files()[name], file.with_name(unfinished_name(file.name))
    with storage_errors(file):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        descriptor = system.open(part, "create", MINE)
    try:
        parts = folder.parts.get(name)
        try:
            if parts is not None:
                os.ftruncate(descriptor, size)
            sha256 = _fetched(folder, name, descriptor, parts or pieces_of(size), stopped)
        finally:
            os.close(descriptor)
        if parts is None and sha256 != folder.hashes[name]:
            raise Failed(
                "the sha256 of the download is not the one that the Hub lists",
                expected=folder.hashes[name],
                where=location(folder.pinned, name),
                hint="run again with --resume; check proxies on the way",
                code="AK704",
            )
        with storage_errors(file):
            system.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def pieces_of(size: int) -> list[tuple[int, int]]:
    """The ranges of a file, one per request."""
    length = min(max(PIECES[0], -(-size // STREAMS)), PIECES[1])
    return [(at, min(at + length, size)) for at in range(0, size, length)]


def _fetched(
    folder: HubFolder,
    name: str,
    descriptor: int,
    ranges: list[tuple[int, int]],
    stopped: Callable[[], bool],
) -> str:
    """Fetch these ranges; return the sha256 of their bytes, computed in order during later
    downloads."""
    digest, pool = hashlib.sha256(), ThreadPoolExecutor(STREAMS, "download")
    block = memoryview(bytearray(BLOCK))
    try:
        pieces = [
            pool.submit(_fetch, folder, name, descriptor, start, stop, stopped)
            for start, stop in ranges
        ]
        for piece, (start, stop) in zip(pieces, ranges, strict=True):
            piece.result()
            for at in range(start, stop, BLOCK):
                part = block[: min(BLOCK, stop - at)]
                digest.update(part[: system.read_at(descriptor, part, at)])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return digest.hexdigest()


def _fetch(
    folder: HubFolder,
    name: str,
    descriptor: int,
    start: int,
    stop: int,
    stopped: Callable[[], bool],
) -> None:
    """Write bytes [start, stop); a retry resumes at the last byte received."""
    at = start

    def request() -> None:
        nonlocal at
        if stopped():
            raise Stopped
        if at < stop:
            for data in folder.pieces(name, at, stop):
                if stopped():
                    raise Stopped
                _write(name, descriptor, data, at)
                at += len(data)

    retry(request, folder.pinned, name)


def _write(name: str, descriptor: int, data: bytes, at: int) -> None:
    with storage_errors(Path(name)):
        write_all(data, lambda rest, done: system.write_at(descriptor, rest, at + done))
