"""The stage of an output that several processes write, some files each.

No process waits for a lock. An attempt writes a file under a name of its own; its rename replaces
that of another attempt at the same file, which has the same bytes. Then a marker, NAME.json,
records that the file is done. Everything is in `ranks/<job>/` of the control folder, so late writes
of an older job have no effect. `adopt` turns it into the stage from which `Stage.publish` makes the
output; after that no process finds its folder.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path

from adapterkit.core.checkpoint import disk
from adapterkit.core.checkpoint.disk import replace_file, storage_errors, sync_folder, sync_folders
from adapterkit.core.output.journal import ShardResult, line_of, read_entry, read_result
from adapterkit.core.output.lock import may_run, process_record
from adapterkit.core.output.stage import HANDOFF, RANKS, Stage
from adapterkit.core.output.writer import UNFINISHED, part_of, unfinished_name
from adapterkit.core.records import Json
from adapterkit.core.system import system

FILES, MARKS, FAILED = "out", "marks", "FAILED"
ATTEMPT = re.compile(r"\.(\d+-\d+-[0-9a-f]{8})\.part$")
MARKER = {"attempt", "device", "torch", "seconds"}
HEARTBEAT = ".heartbeat"  # suffix of a file: a process says that it lives, and how far it is


def prepare(stage: Stage, job: str, names: Iterable[str], head: Json) -> None:
    """Make the folders of the workers; the journal's only entry is `head`. The caller owns the
    stage's lock."""
    stage.reset()
    root = _root(stage.control, job)
    folders = {Path(), *(Path(name).parent for name in names)}
    with storage_errors(root):
        for folder in [top / folder for top in (FILES, MARKS) for folder in folders]:
            (root / folder).mkdir(parents=True, exist_ok=True)
        sync_folders(stage.control)
    stage.begin()
    stage.note(head)


def _root(control: Path, job: str) -> Path:
    return control / RANKS / job[:16]


class WorkerStage:
    """The stage of one process that writes its share of an output's files. `job` is the job's
    digest; `accepts` checks that a result belongs to one of the job's files."""

    def __init__(
        self, control: Path, job: str, worker: int = 0, *, accepts: Callable[[ShardResult], bool]
    ):
        self.accepts, self.worker, root = accepts, worker, _root(control, job)
        self.path, self.marks = root / FILES, root / MARKS
        self.attempt = f"{worker}-{os.getpid()}-{secrets.token_hex(4)}"

    def exists(self) -> bool:
        """True if the output is still being written; False if a link leads elsewhere."""
        above = self.path.parents[:3]  # up to the control folder
        folders = (*above, self.path, self.marks)
        return all(folder.is_dir() and not folder.is_symlink() for folder in folders)

    # -- markers -----------------------------------------------------------------------------------

    def marker(self, name: str) -> Json | None:
        """The marker of a finished file; None if it is not finished or no longer exists."""
        entry = self._read(name)
        result = read_result(entry)
        if result is None or result.file != name or not self.accepts(result):
            return None
        is_there = disk.size_below(self.path, name) == result.size or self._is_joined(name)
        handed_on = not result.handoffs or disk.size_below(self.path, name + HANDOFF) is not None
        return entry if is_there and handed_on and entry.keys() >= MARKER else None

    def _read(self, name: str) -> Json:
        path = self.marks / f"{name}.json"
        return {} if disk.is_linked(self.marks, path.parent) else read_entry(path)

    def _is_joined(self, name: str) -> bool:
        """True if a part's bytes are in the file that is being joined."""
        part = part_of(name)
        return part is not None and part[2] <= self.joined(part[0])

    def markers(self, names: Iterable[str]) -> dict[str, Json]:
        """The markers of those files that are done."""
        found = ((name, self.marker(name)) for name in names)
        return {name: entry for name, entry in found if entry is not None}

    def parts(self) -> dict[str, list[tuple[int, int]]]:
        """The finished parts of files: bytes [start, stop) by file."""
        found: dict[str, list[tuple[int, int]]] = {}
        for path in sorted(self.marks.rglob("*@*.json")):
            name = path.relative_to(self.marks).as_posix().removesuffix(".json")
            if (part := part_of(name)) and self.marker(name):
                found.setdefault(part[0], []).append(part[1:])
        return found

    def mark(self, name: str, entry: Json) -> None:
        """Record durably that a file, whose bytes are durable, is done."""
        self._write(f"{name}.json", {"attempt": self.attempt, **entry})

    def joined(self, file: str) -> int:
        """The number of bytes of its parts in a file that is being joined, `NAME.part`."""
        name = unfinished_name(file)
        count = self._read(name).get("joined", 0)
        return count if count <= (disk.size_below(self.path, name) or 0) else 0

    def mark_joined(self, file: str, count: int) -> None:
        """Record durably how many bytes of its parts a file has."""
        self._write(f"{unfinished_name(file)}.json", {"joined": count})

    def journal(self) -> list[Json]:
        """The finished files, in the form of a stage's journal."""
        paths = sorted(self.marks.rglob("*.json"))
        names = [path.relative_to(self.marks).as_posix().removesuffix(".json") for path in paths]
        return list(self.markers(names).values())

    def remove(self, name: str) -> None:
        """Remove a finished file, its marker first."""
        with storage_errors(self.path):
            for root, file in ((self.marks, f"{name}.json"), (self.path, name)):
                disk.check_folder(root, (root / file).parent)
                (root / file).unlink(missing_ok=True)

    def wanted(self, name: str) -> bool:
        """True if a file is not finished; another process may have made it meanwhile."""
        return self.marker(name) is None

    # -- facts for all workers ---------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """Record for all workers that the job failed."""
        self._write(FAILED, {"reason": reason})

    def failure(self) -> str | None:
        """The reason why the job failed, or None."""
        if not os.path.lexists(self.marks / FAILED):
            return None
        return str(read_entry(self.marks / FAILED).get("reason", "for an unreadable reason"))

    def heartbeat(self, number: int, done: int) -> None:
        """Record that this process lives, and its bytes of files without a marker."""
        entry = {"process": process_record(), "number": number, "done": done}
        self._write(self.attempt + HEARTBEAT, entry, durable=False)

    def heartbeats(self) -> dict[str, Json]:
        """The last heartbeats of the other processes, by their attempts' names."""
        paths = self.marks.glob("*" + HEARTBEAT)
        found = {path.name.removesuffix(HEARTBEAT): read_entry(path) for path in paths}
        return {k: one for k, one in found.items() if "process" in one and k != self.attempt}

    def attempts(self, name: str) -> set[str]:
        """Other processes that have started to write a file without finishing it."""
        path = self.path / name
        found = map(ATTEMPT.search, (p.name for p in path.parent.glob(f"{escape(path.name)}.*")))
        return {match[1] for match in found if match} - {self.attempt}

    def claim(self, name: str) -> None:
        """Announce that this process will write the file."""
        path = self.path / unfinished_name(name, self.attempt)
        with storage_errors(path):
            disk.check_folder(self.path, path.parent)
            os.close(system.open(path, "touch"))

    def leave(self) -> None:
        """Remove this process's unfinished files."""
        with contextlib.suppress(OSError):
            (self.marks / (self.attempt + HEARTBEAT)).unlink(missing_ok=True)
            for top in (self.path, self.marks):
                for path in top.rglob(f"*.{self.attempt}{UNFINISHED}"):
                    path.unlink(missing_ok=True)

    def _write(self, name: str, entry: Json, *, durable: bool = True) -> None:
        temporary = self.marks / unfinished_name(name, self.attempt)
        with storage_errors(temporary):
            disk.check_folder(self.marks, temporary.parent)
        replace_file(self.marks / name, line_of(entry), temporary, durable=durable)


def adopt(stage: Stage, workers: WorkerStage, entries: Iterable[Json]) -> None:
    """Make the workers' files the content of the stage, and these entries its journal. The caller
    owns the stage's lock."""
    stage.rewrite(entries)
    with storage_errors(stage.path):
        system.replace_empty(workers.path, stage.path)
        sync_folder(stage.control)


def has_ended(entry: Json) -> bool:
    """True if the process of this heartbeat is known to have ended."""
    return not may_run(entry["process"])
