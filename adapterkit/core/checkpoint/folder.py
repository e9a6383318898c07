"""Sources of files: the interface of a folder, and the folder on local disk. The remote one is in
`bases/hub/folder.py`."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from adapterkit.core.errors import (
    AdapterkitError,
    Damaged,
    Failed,
    MultipleErrors,
    Problems,
    Refused,
    shown,
)
from adapterkit.core.system import system

T = TypeVar("T")
WEIGHTS = (".safetensors", ".gguf")  # suffixes by which a name is taken for a file's
OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json")


class Folder(Protocol):
    """A folder of files, local or remote; names are relative POSIX paths."""

    name: str  # last path component or repository id, for receipts
    label: str  # the path or the Hub id as the user typed it, for messages; never written to a file
    origin: dict  # for the receipt: never an absolute path, never a token
    hashes: dict[str, str]  # sha256 by file name, where known without reading the file

    def files(self) -> dict[str, int]:
        """Return every file's name and size in bytes."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of one file, fewer at its end; a remote folder reads only this
        range."""
        ...

    def path(self, name: str) -> Path:
        """Return the complete file on local disk; a remote folder downloads it first."""
        ...

    def prefetch(self, names: list[str]) -> None:
        """Announce the files that will be read, in this order; a remote folder starts to download
        them."""
        ...


class WithSubfolders(Folder, Protocol):
    """A local, remote or planned folder that has subfolders."""

    def subfolder(self, name: str) -> "WithSubfolders": ...

    def without(self, names: Collection[str]) -> Folder:
        """Return a view without these files."""
        ...


class SingleFile(Folder, Protocol):
    """One file, as a folder that holds nothing else."""

    single: str

    def containing_folder(self) -> Folder: ...
    def next_to(self) -> set[str]: ...
    def as_weights(self, name: str) -> Folder: ...


def original(folder: Folder) -> Folder:
    """Return the folder from which this one is made (a conversion, a rewritten pickle, copies of
    the Hub's files); the folder itself if it is not made from another."""
    while (source := getattr(folder, "source", None)) is not None:
        folder = source
    return folder


def place_of(folder: Folder, name: str) -> str:
    """Return the place of a folder's file for messages. If the folder is one file, or is made from
    one, the weights are that file."""
    single = getattr(original(folder), "single", None)
    if not single or not folder.label.endswith(single):
        return f"{folder.label}/{name}"
    is_weights = PurePosixPath(name).suffix in (PurePosixPath(single).suffix, *WEIGHTS)
    return folder.label if is_weights else folder.label.removesuffix(single) + name


MOST_PARSED = 1 << 20  # bytes of the files whose parsed content a folder keeps


def parsed(folder: Folder, key: tuple[str, str], parse: Callable[[], tuple[int, T]]) -> T:
    """Return the result of `parse` for a file, which comes with the file's size. A folder whose
    files do not change keeps small results (`parsed`), so nobody may change them; large files are
    only read once anyway."""
    kept = getattr(folder, "parsed", {})
    if key in kept:
        return kept[key][1]
    size, value = parse()
    if size + sum(size for size, _ in [*kept.values()]) <= MOST_PARSED:  # a thread may add
        kept[key] = size, value
    return value


class LocalFolder:
    """A folder on local disk, or a single file as a folder that holds nothing else."""

    outward = True  # whether links that lead out of it may be followed

    def __init__(self, path: str | os.PathLike[str]):
        self.label = shown(os.fspath(path))
        self.hashes: dict[str, str] = {}
        self.parsed: dict = {}  # see `parsed`
        path = Path(path)
        # printable, whatever a stranger called the folder
        self.name = shown(path.name or path.resolve().name)
        self.origin = {"name": self.name}
        self.single = path.name if path.is_file() else None
        self.renamed: dict[str, str] = {}  # names here -> different names on disk
        self.root = path.parent if self.single else path
        self._files: dict[str, int] | None = None  # cached
        if not (path.is_file() or path.is_dir()):
            problem = "neither a file nor a folder" if path.exists() else "no such file or folder"
            raise Refused(
                problem,
                expected="a folder of ordinary files",
                where=str(path),
                hint="check the path",
                code="AK201",
            )

    def __getstate__(self) -> Mapping[str, object]:
        """Return the state for pickle, with an absolute path: a copy may be read from elsewhere."""
        return vars(self) | {"root": self.root.absolute(), "parsed": {}}

    def files(self) -> dict[str, int]:
        if self._files is not None:
            return self._files
        if self.single:
            self._files = {self.single: (self.root / self.single).stat().st_size}
            return self._files
        sizes = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith(".") or not os.path.isfile(path):
                    continue
                relative = path.relative_to(self.root).as_posix()
                inside(relative, self.name)
                sizes[relative] = path.stat().st_size
        self._files = sizes
        return sizes

    def subfolder(self, name: str) -> "LocalFolder":
        """Return a folder inside this one."""
        folder = type(self)(self.root / name)
        self._check_links(folder.root)
        return folder

    def without(self, names: Collection[str]) -> "LocalFolder":
        """Return a view without these files."""
        folder = type(self)(self.root)
        folder._files = {name: size for name, size in self.files().items() if name not in names}
        return folder

    def containing_folder(self) -> "LocalFolder":
        """Return the folder that contains the file."""
        return type(self)(self.root)

    def next_to(self) -> set[str]:
        """Return the names of the files in the file's folder, its own included."""
        return {name for name in os.listdir(self.root) if os.path.isfile(self.root / name)}

    def as_weights(self, name: str) -> "LocalFolder":
        """Return a view of the file under this name, and of the files next to it except other
        weights and indexes."""
        assert self.single is not None
        folder = type(self)(self.root / self.single)
        folder.renamed = {name: self.single}
        next_to = sorted(
            n for n in self.next_to() if not (n[0] == "." or n.endswith(OTHER_WEIGHTS))
        )
        sizes = {str(inside(n, self.name)): (self.root / n).stat().st_size for n in next_to}
        folder._files = sizes | {name: self.files()[self.single]}
        if self.single == name:
            folder.name, folder.label = shown(self.root.resolve().name), shown(self.root)
            folder.origin = {"name": folder.name}
        return folder

    def read(self, name: str, start: int, stop: int) -> bytes:
        path = self.path(name)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise Failed(f"cannot read: {error.strerror}", where=str(path), code="AK209") from error

    def path(self, name: str) -> Path:
        path = self.root / inside(self.renamed.get(name, name), self.name)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise Damaged(
                f"cannot open: {error.strerror}", where=str(path), code="AK201"
            ) from error
        if not stat.S_ISREG(mode):
            raise Refused(
                "this is not a regular file",
                where=str(path),
                hint="give a folder of ordinary files",
                code="AK201",
            )
        self._check_links(path)
        return path

    def _check_links(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.root.resolve()):
            # here, because a plain job has no such link and does not load the rules
            from adapterkit.core.checkpoint.links import check_links

            check_links(path, self.root, self.outward)

    def prefetch(self, names: list[str]) -> None:
        pass


class FinishedFolder(LocalFolder):
    """An output, whose files may be uploaded: no link out of it is followed."""

    outward = False


def read_small(path: str | os.PathLike[str], most: int) -> bytes:
    """Return an ordinary file as a whole; `ValueError` for more than `most` bytes, OSError for a
    pipe."""
    with open(system.open(Path(path), "read"), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


@contextmanager
def belonging_to(folder: Folder) -> Iterator[None]:
    """Name the folder in errors of this block that are about a file."""
    try:
        yield
    except AdapterkitError as error:
        for one in error.errors if isinstance(error, MultipleErrors) else (error,):
            locate(one, folder)
        raise


def locate(error: AdapterkitError, folder: Folder) -> None:
    """Put the folder's label in front of the file in an error's `where`."""
    if error.where.startswith(folder.label):
        return
    if error.where == folder.name or error.where.startswith(f"{folder.name}/"):
        error.where = folder.label + error.where.removeprefix(folder.name)
    elif (name := error.where.partition(":")[0]) in folder.files():
        error.where = place_of(folder, name) + error.where.removeprefix(name)


def inside(name: str, where: str) -> PurePosixPath:
    """Return a file name from a file, as a path inside its folder on any system; `Refused`
    otherwise."""
    if not is_plain_path(name):
        raise Refused(
            f"file name {shown(name)!r}",
            expected="a plain name inside the folder",
            where=where,
            hint="rename or remove it",
            code="AK601",
        )
    return PurePosixPath(name)


def is_plain_path(name: str) -> bool:
    """Return whether a file name is a path inside its folder on any system."""
    # an absolute path has an empty first part
    upwards = any(part in ("", ".", "..") for part in name.split("/"))
    elsewhere = "\\" in name or name[1:2] == ":"
    if upwards or elsewhere or not name.isprintable() or len(name) > 1000:
        return False
    return all(len(part.encode()) <= 255 for part in name.split("/"))  # the limit of file systems


SHARE = re.compile(r'"(\d+:|[^"]*\+)?(/|\\\\)(/|\\\\|\?\?)[^"]*')  # in JSON


def refuse_shares(document: object, where: str) -> None:
    """Refuse a document with a path on another machine: on Windows even a check of `//host/share`
    connects to that host and signs in there."""
    problem, hint = "", "copy it here first"
    try:
        if found := SHARE.search(json.dumps(document, default=str)):
            problem = f"a path on another machine: {shown(found[0][1:])}"
    except (ValueError, RecursionError):
        problem, hint = "nested too deeply, or a number of too many digits", "simplify the file"
    if problem:
        raise Refused(
            problem, expected="paths on this machine", where=where, hint=hint, code="AK201"
        )


RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.I | re.S
)


def check_names(names: Iterable[str]) -> None:
    """Refuse file names that cannot be in one folder on every system."""
    problems, everywhere = (
        Problems(hint="rename it where it comes from", code="AK601"),
        "names for any system",
    )
    seen: dict[str, str] = {}
    for name in names:
        if reason := unportable(name):
            problems.add(f"an output file {shown(name)!r}: {reason}", everywhere)
        # folders of macOS and Windows ignore case and the composition of accents
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            problem = f"output files {shown(twin)!r} and {shown(name)!r} differ in case only"
            problems.add(problem, everywhere)
    problems.raise_all()


def unportable(name: str) -> str:
    """Return why some system cannot store a file of that name; empty if all can."""
    for part in name.split("/"):
        if RESERVED.fullmatch(part):
            return f"{part!r} is a device of Windows"
        if part != part.rstrip(". "):
            return "Windows drops dots and spaces at the end of names"
        if any(letter in '<>:"|?*\\' for letter in part):
            return 'Windows has no < > : " | ? * and \\ in names'
    return ""


def temporary_folder(owner: object) -> Path:
    """Return a new folder that is removed with its owner."""
    home = tempfile.mkdtemp(prefix="adapterkit-")
    weakref.finalize(owner, shutil.rmtree, home, ignore_errors=True)
    return Path(home)
