"""A large file of a folder on the Hub, downloaded into a folder of a job by ranges of it, several
at a time, and checked against the Hub's sha256 as it comes."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterkit.bases.hub.errors import location
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.disk import storage_errors, write_all
from adapterkit.core.errors import Failed
from adapterkit.core.output.writer import unfinished_name
from adapterkit.core.system import system
from adapterkit.core.system.interface import MINE

PIECES = (8 << 20, 64 << 20)  # bytes of one request, at least and at most: the Hub counts them
STREAMS = 4  # requests at a time
BLOCK = 4 << 20  # bytes that are hashed at a time


class Stopped(Failed):
    """The job has ended, and does not want the file any more."""

    code = "AK704"

    def __init__(self):
        super().__init__("the job has ended")


def download(
    folder: HubFolder, name: str, file: Path, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Download one large file; under its name it is whole and has the Hub's sha256, or has those
    `parts` of it that the folder's job reads, and holes.

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
    """The ranges of a file that are asked for one by one."""
    length = min(max(PIECES[0], -(-size // STREAMS)), PIECES[1])
    return [(at, min(at + length, size)) for at in range(0, size, length)]


def _fetched(
    folder: HubFolder,
    name: str,
    descriptor: int,
    ranges: list[tuple[int, int]],
    stopped: Callable[[], bool],
) -> str:
    """Fetch these ranges; the sha256 of their bytes, taken in their order while later ones come."""
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
    """Write bytes [start, stop); a try goes on where the one before it broke off."""
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
