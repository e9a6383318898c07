"""What the Hub on 127.0.0.1 keeps: bytes in memory or, where they are many, on disk; and the line
to it, whose speed may be limited."""

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IN_MEMORY = 4 << 20  # bytes; what is larger lies in a file
PIECE = 256 << 10  # bytes of one read or write


@dataclass(frozen=True)
class Blob:
    """The bytes of one version of a file."""

    size: int
    sha256: str
    held: bytes | Path

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size if stop is None else min(stop, self.size)
        if isinstance(self.held, bytes):
            yield self.held[start:stop]
            return
        with self.held.open("rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(PIECE, stop - start))
                assert piece, "a file of the Hub was cut"
                start += len(piece)
                yield piece

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(self.pieces(start, stop))


class Store:
    """Blobs by their sha256, in a folder of its own where they do not fit the memory."""

    def __init__(self, folder: Path | None = None):
        self._own = tempfile.mkdtemp(prefix="hub") if folder is None else None
        self.folder = Path(folder or str(self._own))
        self.blobs: dict[str, Blob] = {}

    def close(self) -> None:
        if self._own:
            shutil.rmtree(self._own)

    def keep(self, content: bytes | Path) -> Blob:
        """The blob of these bytes, or of a file, which stays where it is."""
        if isinstance(content, bytes):
            blob = Blob(len(content), hashlib.sha256(content).hexdigest(), content)
        else:
            with content.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            blob = Blob(content.stat().st_size, sha256, content)
        return self.blobs.setdefault(blob.sha256, blob)

    def receiver(self, size: int | None) -> "Receiver":
        return Receiver(self, size is None or size > IN_MEMORY)


class Receiver:
    """Takes the body of a request piece by piece and makes it a blob."""

    def __init__(self, store: Store, on_disk: bool):
        self.size, self.hash = 0, hashlib.sha256()
        self.pieces: list[bytes] = []
        self.path = None
        if on_disk:
            descriptor, name = tempfile.mkstemp(dir=store.folder, prefix="blob")
            self.file, self.path = os.fdopen(descriptor, "wb", buffering=0), Path(name)

    def take(self, piece: bytes) -> None:
        self.size += len(piece)
        self.hash.update(piece)
        if self.path is None:
            self.pieces.append(piece)
        else:
            self.file.write(piece)

    def blob(self) -> Blob:
        if self.path is not None:
            self.file.close()
        return Blob(self.size, self.hash.hexdigest(), self.path or b"".join(self.pieces))

    def drop(self) -> None:
        if self.path is not None:
            self.file.close()
            self.path.unlink()


class Line:
    """One direction of the line to the Hub: all requests together pass at most `rate` bytes in a
    second; None is no limit."""

    def __init__(self, rate: float | None = None):
        self.rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, size: int) -> None:
        if not self.rate:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + size / self.rate
            wait = self._free - now
        time.sleep(wait)
