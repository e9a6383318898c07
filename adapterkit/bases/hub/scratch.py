"""A folder on the Hub whose large files come into a folder of the job, and go when the job is
through with them; the cache that programs share is read, and gets nothing."""

from collections.abc import Callable
from pathlib import Path

from adapterkit.bases.hub.download import download
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.core.checkpoint.folder import Folder


def in_scratch(folder: Folder, place: Path) -> Folder:
    """A folder of the Hub with its large files in a folder of the job; others as they are."""
    return ScratchFolder(folder, place) if isinstance(folder, HubFolder) else folder


class ScratchFolder:
    """A `Folder` of the Hub for a job on little disk; `download` before `path`, `drop` after.

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
        """Bytes that the file takes here once it is downloaded: none where it is cached, or git's
        own."""
        if name not in self.hashes or self.source.cached(name) is not None:
            return 0
        parts = self.parts.get(name)
        return self.files()[name] if parts is None else sum(stop - at for at, stop in parts)

    def download(self, name: str, stopped: Callable[[], bool]) -> None:
        """Fetch the file; raises what `bases.hub.download.download` does."""
        download(self.source, name, self.place / name, stopped)

    def path(self, name: str) -> Path:
        """The file, downloaded before; of one that takes no disk here, the one in the cache."""
        here = self.place / name
        if not here.is_file() and self.disk(name):
            raise AssertionError(f"{self.label}/{name} is read, and was not asked for")
        return here if here.is_file() else self.source.path(name)

    def drop(self, name: str) -> None:
        """Remove a file that was downloaded."""
        (self.place / name).unlink(missing_ok=True)
