"""A folder whose weights are a pickle, as one with a safetensors file."""

from functools import cached_property
from pathlib import Path

from adapterkit.checkpoint.folder import Folder, LocalFolder, temporary_folder
from adapterkit.errors import Refused, listed
from adapterkit.formats.files.pickles import pickles_of, rewrite, rewritten_name
from adapterkit.hub.folder import HubFolder
from adapterkit.records import Json


def without_pickles(folder: Folder) -> Folder:
    """The folder itself where it holds safetensors files or no pickle; else one that has its pickle
    rewritten, a single file with the configs beside it. `Refused` where there are several."""
    names = pickles_of(folder)
    if not names:
        return folder
    if isinstance(folder, LocalFolder | HubFolder) and folder.single:
        folder = folder.as_weights(folder.single)
    if len(names) > 1:
        raise Refused(
            f"{len(names)} pickles: {listed(names)}",
            expected="one that holds the adapter",
            where=folder.label,
            hint="give the file instead of the folder",
        )
    return UnpickledFolder(folder, names[0])


class UnpickledFolder:
    """A folder with the tensors of one of its pickles in a safetensors file, which is written to a
    temporary folder when it is first asked for."""

    def __init__(self, source: Folder, pickle: str):
        self.source, self.pickle, self.weights = source, pickle, rewritten_name(pickle)
        self.name, self.label = source.name, source.label
        self.origin: Json = {**source.origin, "pickle": pickle}
        self.hashes = source.hashes

    def __reduce__(self) -> tuple:
        return UnpickledFolder, (self.source, self.pickle)

    @cached_property
    def _rewritten(self) -> tuple[LocalFolder, list[str]]:
        place = temporary_folder(self) / self.weights
        left_out = rewrite(self.source.path(self.pickle), place)
        return LocalFolder(place), left_out

    @property
    def left_out(self) -> list[str]:
        """The names of what the pickle holds besides the state dict."""
        return self._rewritten[1]

    def _owner(self, name: str) -> Folder:
        return self._rewritten[0] if name == self.weights else self.source

    def files(self) -> dict[str, int]:
        others = {name: size for name, size in self.source.files().items() if name != self.pickle}
        return others | self._rewritten[0].files()

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self._owner(name).read(name, start, stop)

    def path(self, name: str) -> Path:
        return self._owner(name).path(name)

    def prefetch(self, names: list[str]) -> None:
        self.source.prefetch([name for name in names if name != self.weights])
