"""A folder whose weights are a pickle, as one with a safetensors file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from adapterkit.adapters.formats.files.pickles import pickles_of, rewrite, rewritten_name
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, SingleFile
from adapterkit.core.checkpoint.overlay import Copied, Overlay, identities_of
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.errors import Refused, listed


def without_pickles(folder: Folder) -> Folder:
    """The folder itself where it holds safetensors files or no pickle; else one that has its pickle
    rewritten, a single file with the configs beside it. `Refused` where there are several."""
    names = pickles_of(folder)
    if not names:
        return folder
    if single := getattr(folder, "single", None):
        folder = cast(SingleFile, folder).as_weights(single)
    if len(names) > 1:
        raise Refused(
            f"{len(names)} pickles: {listed(names)}",
            expected="one that holds the adapter",
            where=folder.label,
            hint="give the file instead of the folder",
            code="AK205",
        )
    origin, maker = {**folder.origin, "pickle": names[0]}, Unpickling(folder, names[0])
    return Overlay(folder.name, folder.label, origin, None, maker, folder, folder.hashes)


@dataclass(frozen=True)
class Unpickling:
    """Writes the tensors of a folder's pickle into a safetensors file beside its other files."""

    source: Folder
    pickle: str
    left_out: list[str] = field(default_factory=list)  # what it holds besides the state dict

    @property
    def weights(self) -> str:
        return rewritten_name(self.pickle)

    def make(self, place: Path) -> Mapping[str, Copied]:
        self.left_out[:] = rewrite(self.source.path(self.pickle), place / self.weights)
        others = (name for name in self.source.files() if name != self.pickle)
        files = {name: Copied(self.source, name) for name in others}
        own = LocalFolder(place / self.weights)
        return files | {self.weights: Copied(own, self.weights)}

    def identities(self, name: str) -> dict[str, Identity]:
        if name != self.weights:
            return identities_of(self.source, name)
        found = identities_of(self.source, self.pickle)
        return {f"source/{name}": one for name, one in found.items()}
