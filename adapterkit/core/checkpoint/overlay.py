"""A folder composed of bytes, files of other folders, and files that are made when anything beyond
their headers is read."""

import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from adapterkit.core.checkpoint.folder import Folder, LocalFolder, temporary_folder
from adapterkit.core.checkpoint.header import FIRST_READ
from adapterkit.core.checkpoint.reader import Identity, identity
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Json


@dataclass(frozen=True)
class Copied:
    """A file that another folder has."""

    folder: Folder
    name: str


@dataclass(frozen=True)
class Unmade:
    """A file of weights of which only the header is known."""

    header: bytes
    size: int


Content = bytes | Copied | Unmade


class Maker(Protocol):
    """A record that makes all files of an overlay together; it pickles."""

    def make(self, place: Path) -> Mapping[str, Content]:
        """Make all files in a new folder."""
        ...

    def identities(self, name: str) -> dict[str, Identity]:
        """Return the result of `identities_of` for the file."""
        ...


@dataclass(eq=False)
class Overlay:
    """A `Folder`, and a path for the options of verbs. Without a maker it is the output that a plan
    will write later: a read beyond a header is `Refused`, and `asked` keeps the file's name, even
    if the caller continues."""

    name: str
    label: str
    origin: Json
    known: Mapping[str, Content] | None  # None: unknown until it is made
    maker: Maker | None = None
    source: Folder | None = None  # the folder from which it is made
    hashes: dict[str, str] = field(default_factory=dict)
    place: str = ""  # where it will be
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._made: Mapping[str, Content] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return the state for pickle: a copy makes its own files."""
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __fspath__(self) -> str:
        return self.place

    def subfolder(self, name: str) -> "Overlay":
        """Return a folder inside this one."""
        start = f"{name}/"
        own = {f.removeprefix(start): Copied(self, f) for f in self.files() if f.startswith(start)}
        place, last = os.path.join(self.place, name), shown(Path(name).name)
        label = os.path.join(self.label, shown(name))
        return Overlay(last, label, {"name": last}, own, place=place, asked=self.asked)

    def without(self, names: Collection[str]) -> "Overlay":
        """Return a view without these files."""
        kept = {name: Copied(self, name) for name in self.files() if name not in names}
        own = self.name, self.label, self.origin
        return Overlay(*own, kept, place=self.place, asked=self.asked)

    def files(self) -> dict[str, int]:
        return self._sizes

    @cached_property
    def _sizes(self) -> dict[str, int]:
        contents = self.made() if self.known is None else self.known
        return {name: _size(content) for name, content in contents.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        content = (self._made or self.known or self.made())[name]
        if isinstance(content, Unmade):
            most = max(FIRST_READ, len(content.header))
            is_header = start == 0 and (self.maker is None or stop <= most)
            if is_header or stop <= len(content.header):
                return content.header[start:stop]
            content = self.made(name)[name]
        if isinstance(content, Copied):
            return content.folder.read(content.name, start, stop)
        assert isinstance(content, bytes)
        return content[start:stop]

    def path(self, name: str) -> Path:
        content = (self.known or {}).get(name) if self.maker is None else None
        content = content if isinstance(content, Copied) else self.made(name)[name]
        assert isinstance(content, Copied)
        return content.folder.path(content.name)

    def prefetch(self, names: list[str]) -> None:
        pass

    def made(self, name: str = "") -> Mapping[str, Content]:
        """Return all files, and make them if necessary; `name` is the file that is read."""
        if self.maker is None:
            self.asked.append(name)
            raise Refused(
                "the values are not written yet",
                expected="a plan from headers",
                where=f"{self.label}/{name}",
                hint="plan it when the step before is done",
                code="AK111",
            )
        with self._lock:
            if self._made is None:
                self._made = self.maker.make(temporary_folder(self))
            return self._made


def _size(content: Content) -> int:
    if isinstance(content, Copied):
        return content.folder.files()[content.name]
    return len(content) if isinstance(content, bytes) else content.size


def identities_of(folder: Folder, name: str) -> dict[str, Identity]:
    """Return the size and times of the local files that a folder's file is, or is made from: by its
    name, or by the names that the folder's maker gives them."""
    if isinstance(folder, Overlay):
        return {} if folder.maker is None else folder.maker.identities(name)
    is_local = isinstance(folder, LocalFolder)
    return {name: identity(os.stat(folder.path(name)))} if is_local else {}
