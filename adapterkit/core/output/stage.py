"""Write an output so that it is complete or absent.

Files are built in a hidden folder, the stage, each as `name.part` (`writer.py`), and get their
final names together. The kind of output determines how: a folder (`folder_output.py`) by one
rename, or by an exchange with an older output, so that the final name is always a complete old
output, a complete new one, or absent; one file (`file_output.py`); a folder on the Hub
(`bases/hub/output/hub_output.py`). A journal next to the stage lists the finished files, so
`resume.py` knows how far an earlier run got."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

from adapterkit.core.checkpoint import disk
from adapterkit.core.checkpoint.disk import storage_errors, sync_folder, sync_folders, write_all
from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.checkpoint.strict import MAX_JSON
from adapterkit.core.errors import Refused, shown
from adapterkit.core.output.journal import entries_of, line_of, read_lines
from adapterkit.core.output.lock import LOCK, Lock
from adapterkit.core.output.writer import unfinished_name
from adapterkit.core.records import Json
from adapterkit.core.system import system

JOURNAL = "journal.jsonl"
RANKS = "ranks"  # the folder of `many/workers/stage.py`
RECEIPT = "adapterkit.json"
SUFFIX = f".{RECEIPT}"  # suffix of the receipt of an output that is one file
WORK = "work"  # the folder of intermediate files, next to the files
HANDOFF = ".handoff"  # suffix of the file with tensors for later files
NAME_MAX = 255  # bytes


def receipt_name_of(name: str) -> str:
    """Return the name of the receipt of a file."""
    return name + SUFFIX


def control_of(out: Path) -> str:
    """Return the name of the folder in which an output is built."""
    return f".{out.resolve().name}.adapterkit"


def check_name(out: Path, files: Iterable[str]) -> None:
    """Refuse an `out` for which it, the folder in which it is built, or a file there has too long a
    name or path."""
    path, control = out.resolve(), control_of(out)
    longest = max(len(os.fsencode(name)) for name in (*path.parts, control))
    stage = path.parent / control / "out"
    excess, name = max(
        (system.path_overflow(stage / unfinished_name(name)), name) for name in files
    )
    if longest > NAME_MAX:
        problem = f"the name is too long: {len(os.fsencode(path.name))} bytes"
        expected = f"names of at most {NAME_MAX - len(control_of(Path('/')))} bytes"
    elif excess > 0:
        problem = f"the path of {shown(name)} there would be too long by {excess}"
        expected = system.path_limit
    else:
        return
    hint = "choose a shorter --out"
    raise Refused(problem, expected=expected, where="--out", hint=hint, code="AK601")


def parse_receipt(data: bytes) -> Json:
    """Return the content of a receipt; empty if the bytes are not a receipt with a list of
    files."""
    try:
        receipt = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else {}


def receipt_bytes(path: Path) -> bytes:
    """Return a receipt's bytes; empty if there is none."""
    try:
        return read_small(path, MAX_JSON)
    except (OSError, ValueError):
        return b""


class Workspace(Protocol):
    """A folder for the files that engines write: a `Stage`, or a worker's share of it
    (`many/workers/stage.py`)."""

    attempt: str  # distinguishes unfinished files from those of other processes

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    def journal(self) -> list[dict]:
        """Return the journal's entries; those of finished files have a `shard`."""
        ...

    def wanted(self, name: str) -> bool:
        """Return whether a file is still missing."""
        ...


def work_folder(stage: Workspace) -> Path:
    """Return the folder for intermediate files, and create it."""
    work = stage.path.parent / WORK
    with storage_errors(work):
        disk.check_folder(work.parent, work)
        work.mkdir(exist_ok=True)
    return work


class StagedOutput(ABC):
    """The output that a stage becomes, as the stage sees it. The defaults are right for a folder on
    this machine."""

    out: Path  # its name, for messages; on the Hub that of the local work folder
    final: Path  # the folder in which files get their names
    control: Path  # the folder in which it is built, with journal and lock
    moves = False  # files get their names one by one, so some may already have theirs
    has_history = False  # keeps the output of another job after this one replaces it

    @abstractmethod
    def exists(self) -> bool:
        """Return whether anything has the output's name."""

    @abstractmethod
    def receipt(self) -> bytes:
        """Return the receipt of the existing output; empty without one."""

    @abstractmethod
    def size_of(self, name: str) -> int | None:
        """Return the bytes of a file of the existing output."""

    @abstractmethod
    def check(self, *, replaces: bool) -> None:
        """Refuse unless there is nothing or, if this output replaces it, only an older output."""

    @abstractmethod
    def publish(self, stage: "Stage") -> None:
        """Give the finished stage its final name; called again after a crash it continues."""

    def check_kind(self) -> None:
        """Refuse an existing file or folder that no output can replace."""
        return  # a name on the Hub has one kind

    def head(self) -> Json:
        """Return the journal's first entry, besides the job."""
        return {}

    def resume_from(self, head: Json) -> None:
        """Record that an interrupted run, whose journal has this first entry, is resumed."""
        return  # the default: nothing to record

    def begin(self) -> None:
        """Prepare for the first file."""
        return  # nothing

    def has(self, stage: "Stage", name: str, sha256: str | None) -> bool:
        """Return whether a file has left the stage before the others."""
        return False

    def disk(self, size: int) -> int:
        """Return the bytes of disk that files of that total size need."""
        return size

    def old_files(self) -> list[str]:
        """Return files to remove one by one when the new ones get their names."""
        return []


class Stage:
    """The hidden folder in which an output is built; a context that owns its lock.

    The control folder, `.NAME.adapterkit/` next to the output, contains `out/` (the stage),
    `journal.jsonl` and `lock`. The journal's first entry is the job, then come the finished shards,
    and at the end `{"publish": sha256 of the receipt}`. From then on only the names are missing:
    the receipt is in the stage before publishing, and in the output after."""

    attempt = ""  # one process writes here

    def __init__(self, output: StagedOutput):
        self.output, self.out, self.control = output, output.out, output.control
        self.path = self.control / "out"
        self.replaces = False  # an older output
        self._journal, self._noting = -1, threading.Lock()

    @cached_property
    def lock(self) -> Lock:
        return Lock(self.control)

    def __enter__(self) -> "Stage":
        """Lock the folder for this process; `Refused` while another one works in it."""
        with storage_errors(self.control):
            if self.control.is_symlink() or self.path.is_symlink():
                raise Refused(
                    "the work folder is a symbolic link",
                    expected="a folder",
                    where=str(self.control),
                    hint="remove the link",
                    code="AK601",
                )
            try:
                self._lock()
            except BaseException:
                with contextlib.suppress(OSError):
                    self.control.rmdir()
                raise
        return self

    def _lock(self) -> None:
        for last in (False, False, True):
            try:
                self.control.mkdir(parents=True, exist_ok=True)
                return self.lock.acquire()
            except FileNotFoundError:  # the process before us is removing the folder
                if last:
                    raise

    def __exit__(self, *_: object) -> None:
        """Release the lock; the files that a later --resume can use stay."""
        self._close_journal()
        with contextlib.suppress(OSError):
            self.lock.release()
            self.control.rmdir()

    @property
    def is_new(self) -> bool:
        """True if there is neither an output nor an earlier run's work."""
        return not (self.output.exists() or os.path.lexists(self.control))

    def holds(self, name: str, size: int, sha256: str | None) -> bool:
        """Return whether a finished file is there, or has left before the others."""
        is_here = disk.size_below(self.path, name) == size
        return is_here or self.output.has(self, name, sha256)

    def is_complete(self, files: Mapping[str, dict]) -> bool:
        """Return whether the files of a receipt are there to be published; if files move one by
        one, some may have moved."""
        return all(
            disk.size_below(self.output.final, name) == entry["size"]
            if self.output.moves and not os.path.lexists(self.path / name)
            else self.holds(name, entry["size"], entry["sha256"])
            for name, entry in files.items()
        )

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Empty the stage except finished shards: unfinished files take space that is needed."""
        finished = {self.path / name for name in keep}
        with storage_errors(self.path):
            for path in sorted(self.path.rglob("*"), reverse=True):  # files before their folder
                if path.is_symlink() or not path.is_dir():
                    if path not in finished:
                        path.unlink()
                else:
                    with contextlib.suppress(OSError):  # it holds finished shards
                        path.rmdir()

    def reset(self) -> None:
        """Remove an earlier run's stage and journal, so that the next run starts again."""
        self._close_journal()
        with storage_errors(self.control):
            (self.control / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.control)
            self.clear()
            for folder in (self.control / RANKS, self.control / WORK):
                if folder.is_symlink():  # not one of ours: its target stays
                    folder.unlink()
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def begin(self) -> None:
        """Prepare for the first file, the journal first."""
        self.open_journal()
        self.output.begin()

    def open_journal(self) -> None:
        """Create the stage and open the journal, without a last line that a crash tore."""
        with storage_errors(self.control):
            self.path.mkdir(exist_ok=True)
            self._journal = system.open(self.control / JOURNAL, "append")
            size = sum(len(line) for line, _ in entries_of(read_lines(self.control / JOURNAL)))
            if size != os.fstat(self._journal).st_size:
                os.ftruncate(self._journal, size)
            sync_folder(self.control)
            sync_folder(self.control.parent)

    def journal(self) -> list[dict]:
        """Return the journal's entries, up to the first that is torn or damaged; empty if no run
        was interrupted."""
        return [entry for _, entry in entries_of(read_lines(self.control / JOURNAL))]

    def wanted(self, name: str) -> bool:
        return True

    def note(self, entry: dict) -> None:
        """Append one entry to the journal, durably; thread-safe."""
        with self._noting, storage_errors(self.control / JOURNAL):
            write_all(line_of(entry), lambda rest, _: os.write(self._journal, rest))
            disk.sync(self._journal)

    def rewrite(self, entries: Iterable[dict]) -> None:
        """Replace the journal by these entries, atomically."""
        self._close_journal()
        temporary = self.control / unfinished_name(JOURNAL)
        disk.replace_file(self.control / JOURNAL, b"".join(map(line_of, entries)), temporary)

    def write_file(self, name: str, blocks: Iterable[bytes]) -> tuple[int, str]:
        """Write a small file durably; return its size and sha256."""
        path = self.path / name
        size, digest = 0, hashlib.sha256()
        with storage_errors(path):
            disk.check_folder(self.path, path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            descriptor = system.open(path, "create")
            try:
                for block in blocks:
                    write_all(block, lambda rest, _: os.write(descriptor, rest))
                    digest.update(block)
                    size += len(block)
                disk.sync(descriptor)
            finally:
                os.close(descriptor)
        return size, digest.hexdigest()

    def ready(self) -> None:
        """Record that the stage is complete: from here on a resumed run only publishes it."""
        self.output.check(replaces=self.replaces)  # it may have changed since the start
        with storage_errors(self.path):
            sync_folders(self.path)
        sha256 = hashlib.sha256((self.path / RECEIPT).read_bytes()).hexdigest()
        self.note({"publish": sha256, "old": self.output.old_files()})

    def publish(self) -> None:
        """Give the finished stage its final name, and leave nothing else behind except the
        journal."""
        self.output.publish(self)
        self._close_journal()
        self._clean()

    def discard(self) -> None:
        """Remove the stage and what an exchange put there, then the journal and the lock."""
        self._close_journal()
        self._clean()
        with contextlib.suppress(OSError):
            (self.control / JOURNAL).unlink(missing_ok=True)

    def _clean(self) -> None:
        with contextlib.suppress(OSError):
            for path in self.control.iterdir():
                if path.name not in (JOURNAL, LOCK):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                        missing_ok=True
                    )

    def _close_journal(self) -> None:
        descriptor, self._journal = self._journal, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
