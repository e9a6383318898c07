"""Writing an output so that it appears whole or not at all.

Files are built in a hidden folder, the stage, each as `name.part` (`writer.py`), and get their
final names together. How is said by the kind of output: a folder (`folder_output.py`) by one rename
or, where there is an older output, an exchange, so that the final name is at every moment a whole
old output, a whole new one, or nothing; one file (`file_output.py`); a folder on the Hub
(`bases/hub/output/hub_output.py`). A journal beside the stage lists the finished files; from it
`resume.py` tells how far an earlier run got.
"""

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
SUFFIX = f".{RECEIPT}"  # of the receipt of an output that is one file, after its name
WORK = "work"  # the folder beside the files, of what they are made of
HANDOFF = ".handoff"  # suffix of the file with tensors for later files
NAME_MAX = 255  # bytes


def receipt_beside(name: str) -> str:
    """The name of the receipt of a file of that name."""
    return name + SUFFIX


def control_of(out: Path) -> str:
    """The name of the folder in which an output is built."""
    return f".{out.resolve().name}.adapterkit"


def check_name(out: Path, files: Iterable[str]) -> None:
    """`Refused` where `out`, the folder in which it is built or one of its files there has too long
    a name or path."""
    path, control = out.resolve(), control_of(out)
    longest = max(len(os.fsencode(name)) for name in (*path.parts, control))
    stage = path.parent / control / "out"
    excess, name = max((system.excess(stage / unfinished_name(name)), name) for name in files)
    if longest > NAME_MAX:
        problem = f"the name is too long: {len(os.fsencode(path.name))} bytes"
        expected = f"names of at most {NAME_MAX - len(control_of(Path('/')))} bytes"
    elif excess > 0:
        problem = f"the path of {shown(name)} there would be too long by {excess}"
        expected = system.room_for_paths
    else:
        return
    hint = "choose a shorter --out"
    raise Refused(problem, expected=expected, where="--out", hint=hint, code="AK601")


def parse_receipt(data: bytes) -> Json:
    """What a receipt says; empty for bytes that are none, without a list of files."""
    try:
        receipt = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else {}


def receipt_bytes(path: Path) -> bytes:
    """A receipt's file; empty where there is none."""
    try:
        return read_small(path, MAX_JSON)
    except (OSError, ValueError):
        return b""


class Workspace(Protocol):
    """Where engines put files: a `Stage`, or a worker's share of it (`many/workers/stage.py`)."""

    attempt: str  # what tells files in the making from those of other processes

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    def journal(self) -> list[dict]:
        """Entries, `shard` in those of finished files."""
        ...

    def wanted(self, name: str) -> bool:
        """Whether a file is still to be made."""
        ...


def work_folder(stage: Workspace) -> Path:
    """The folder of what its files are made of, which is there."""
    work = stage.path.parent / WORK
    with storage_errors(work):
        disk.check_folder(work.parent, work)
        work.mkdir(exist_ok=True)
    return work


class StagedOutput(ABC):
    """What a stage asks of the output that it becomes. What is not abstract is so of a folder on
    this machine, the usual one."""

    out: Path  # its name, for messages; on the Hub that of the work for it
    final: Path  # the folder in which files get their names
    control: Path  # the folder in which it is built, with journal and lock
    moves = False  # files get their names one by one, so some may have them already
    has_history = False  # an output of another job stays in it when this one replaces that

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything of its name."""

    @abstractmethod
    def receipt(self) -> bytes:
        """The receipt of the output that is there; empty without one."""

    @abstractmethod
    def size_of(self, name: str) -> int | None:
        """Bytes of a file of the output that is there."""

    @abstractmethod
    def check(self, *, replaces: bool) -> None:
        """`Refused` unless there is nothing or, where this replaces it, an older output only."""

    @abstractmethod
    def publish(self, stage: "Stage") -> None:
        """Give the finished stage its final name; called again after a crash it continues."""

    def check_kind(self) -> None:
        """`Refused` for what no output can replace."""
        return  # a name on the Hub has one kind

    def head(self) -> Json:
        """What the journal's first entry holds besides the job."""
        return {}

    def go_on(self, head: Json) -> None:
        """Note that an interrupted run, whose journal begins so, is continued."""
        return  # nothing depends on it

    def begin(self) -> None:
        """Make ready what the first file needs."""
        return  # nothing

    def has(self, stage: "Stage", name: str, sha256: str | None) -> bool:
        """Whether a file has left the stage before the others."""
        return False

    def disk(self, size: int) -> int:
        """Bytes of disk that files of that size take, all together."""
        return size

    def old_files(self) -> list[str]:
        """Files that are removed one by one when the new ones get their names."""
        return []


class Stage:
    """The hidden folder in which an output is built; a context that holds its lock.

    The control folder, `.NAME.adapterkit/` beside the output, holds `out/` (the stage),
    `journal.jsonl` and `lock`. The journal's first entry is the job, then come the finished shards,
    and once all is written `{"publish": sha256 of the receipt}`: from then on only the names are
    missing, and whether the stage or the output has that receipt tells how far publishing got.
    """

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
        """Release the lock; what a later --resume can use stays."""
        self._close_journal()
        with contextlib.suppress(OSError):
            self.lock.release()
            self.control.rmdir()

    @property
    def is_new(self) -> bool:
        """Whether neither an output nor a run's work is there."""
        return not (self.output.exists() or os.path.lexists(self.control))

    def holds(self, name: str, size: int, sha256: str | None) -> bool:
        """Whether a finished file is there, or has left before the others."""
        is_here = disk.size_below(self.path, name) == size
        return is_here or self.output.has(self, name, sha256)

    def is_whole(self, files: Mapping[str, dict]) -> bool:
        """Whether the files of a receipt are there, to be published; where files are moved one by
        one, some may have been."""
        return all(
            disk.size_below(self.output.final, name) == entry["size"]
            if self.output.moves and not os.path.lexists(self.path / name)
            else self.holds(name, entry["size"], entry["sha256"])
            for name, entry in files.items()
        )

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Empty the stage but for finished shards: half-written files take the space that is
        needed."""
        finished = {self.path / name for name in keep}
        with storage_errors(self.path):
            for path in sorted(self.path.rglob("*"), reverse=True):  # files before their folder
                if path.is_symlink() or not path.is_dir():
                    if path not in finished:
                        path.unlink()
                else:
                    with contextlib.suppress(OSError):  # it holds finished shards
                        path.rmdir()

    def forget(self) -> None:
        """Remove an earlier run's stage and journal: the next run begins again."""
        self._close_journal()
        with storage_errors(self.control):
            (self.control / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.control)
            self.clear()
            for folder in (self.control / RANKS, self.control / WORK):
                if folder.is_symlink():  # not one of ours: what it leads to stays
                    folder.unlink()
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def begin(self) -> None:
        """Make ready what the first file needs, the journal first."""
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
        """The journal's entries, up to the first that is torn or damaged; none where there is no
        interrupted run."""
        return [entry for _, entry in entries_of(read_lines(self.control / JOURNAL))]

    def wanted(self, name: str) -> bool:
        return True

    def note(self, entry: dict) -> None:
        """Append one entry to the journal, durably; of several threads."""
        with self._noting, storage_errors(self.control / JOURNAL):
            write_all(line_of(entry), lambda rest, _: os.write(self._journal, rest))
            disk.sync(self._journal)

    def rewrite(self, entries: Iterable[dict]) -> None:
        """Put these entries in the place of the journal's, all at once."""
        self._close_journal()
        temporary = self.control / unfinished_name(JOURNAL)
        disk.replace_file(self.control / JOURNAL, b"".join(map(line_of, entries)), temporary)

    def write_file(self, name: str, blocks: Iterable[bytes]) -> tuple[int, str]:
        """Write a small file durably; its size and sha256."""
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
        """Note that the stage is complete: from here on a resumed run only publishes it."""
        self.output.check(replaces=self.replaces)  # it may have changed since the start
        with storage_errors(self.path):
            sync_folders(self.path)
        sha256 = hashlib.sha256((self.path / RECEIPT).read_bytes()).hexdigest()
        self.note({"publish": sha256, "old": self.output.old_files()})

    def publish(self) -> None:
        """Give the finished stage its final name, and leave nothing else behind but the journal."""
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
