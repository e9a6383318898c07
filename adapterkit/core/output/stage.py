"""Writing a folder so that it appears whole or not at all.

Files are built in a hidden folder beside the final one, the stage, each as `name.part`
(`writer.py`). The stage becomes the output by one rename of the folder, or an exchange where an
older output is replaced: at every moment the final name is a whole old output, a whole new one, or
nothing. A journal beside the stage lists the finished files.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

from adapterkit.core.checkpoint import disk
from adapterkit.core.checkpoint.disk import storage_errors, sync_folder, sync_folders, write_all
from adapterkit.core.checkpoint.folder import is_plain_path
from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.output.earlier_output import incomplete, lacking, receipt_at, size_at
from adapterkit.core.output.file_result import ShardResult
from adapterkit.core.output.journal import entries_of, line_of, read_lines
from adapterkit.core.output.lock import LOCK, Lock
from adapterkit.core.output.writer import unfinished_name
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
    path = out.resolve()
    longest = max(len(os.fsencode(name)) for name in (*path.parts, control_of(out)))
    room = NAME_MAX - len(control_of(Path("/")))
    if longest > NAME_MAX:
        raise Refused(
            f"the name is too long: {len(os.fsencode(path.name))} bytes",
            expected=f"names of at most {room} bytes",
            where="--out",
            hint="choose a shorter --out",
            code="AK601",
        )
    stage = path.parent / control_of(out) / "out"
    excess, name = max((system.excess(stage / unfinished_name(name)), name) for name in files)
    if excess > 0:
        raise Refused(
            f"the path of {shown(name)} there would be too long by {excess}",
            expected=system.room_for_paths,
            where="--out",
            hint="choose a shorter --out",
            code="AK601",
        )


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


class Stage:
    """The hidden folder in which an output is built; a context that holds its lock.

    `out` is the final folder; the control folder `.NAME.adapterkit/` beside it holds `out/` (the
    stage), `journal.jsonl` and `lock`. Where `out` exists and no rename can replace it (a mount
    point, or a parent that is not writable) the control folder lies inside `out` and the files move
    one by one: weights, index, config, receipt last.

    The journal's first entry is the job, then come the finished shards, and once all is written
    `{"publish": sha256 of the receipt}`: from then on only the names are missing, and whether the
    stage or `out` has that receipt tells how far publishing got.
    """

    attempt = ""  # one process writes here

    @property
    def path(self) -> Path:
        return self.control / "out"

    @cached_property
    def lock(self) -> Lock:
        return Lock(self.control)

    def __init__(self, out: Path):
        self.out = self.final = out  # `final`: the folder in which the files get their names
        parent = out.resolve().parent
        self.inside = out.is_dir() and (
            system.is_mount(out.resolve()) or not os.access(parent, os.W_OK)
        )
        self.control = out / ".adapterkit" if self.inside else parent / control_of(out)
        self.receipt = out / RECEIPT
        self.replaces = False  # an older output
        self._journal = -1

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
        return not any(map(os.path.lexists, (self.out, self.receipt, self.control)))

    def state(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        """'fresh', 'resume', 'publish' (only the final names are missing) or 'finished'.

        `Refused` where the output or an interrupted run is in the way, or another run is at work.
        """
        if not resume:
            self.lock.check()
        self._check_kind()
        entries = self.journal()
        head = entries[0] if entries else None
        published = self.published().get("fingerprint")
        receipt = publish_of(entries)
        is_its = receipt is not None and _sha256(self.receipt) == receipt
        is_its = is_its or (head is None and published == fingerprint)
        # of another job it is refused by who asks
        is_others = head is None and published not in (None, fingerprint) and not overwrite
        if resume and (is_others or (is_its and self._is_finished(overwrite))):
            return "finished"
        complete = resume and receipt is not None and _sha256(self.path / RECEIPT) == receipt
        self.replaces = overwrite or bool(resume and head is not None and head.get("overwrite"))
        if not (complete and self.inside):  # else the output is half moved
            self._check_output()
        if head is not None and not resume and not overwrite:
            self.lock.check()
            if self.journal():  # else a run has just ended
                raise Refused(
                    "an earlier run to this --out was interrupted",
                    expected="an output that no other run has begun",
                    where=str(self.control),
                    hint="give --resume to continue it, or --overwrite to begin again",
                    code="AK602",
                )
        if head is None or not resume:
            return "fresh"
        return "publish" if complete and head.get("fingerprint") == fingerprint else "resume"

    def _check_kind(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise Refused(
                "a file of this name exists",
                expected="a new folder",
                where=str(self.out),
                hint="choose another --out",
                code="AK601",
            )

    def is_published(self, recipe: dict) -> bool:
        """Whether the output is there and is of this very job, of the same input files: its journal
        is there still."""
        entries = self.journal()
        receipt = publish_of(entries)
        is_there = receipt is not None and _sha256(self.receipt) == receipt
        return is_there and entries[0].get("recipe") == recipe

    def published(self) -> dict:
        """The receipt of the output that is there; empty without one."""
        return receipt_at(self.receipt)

    def size_there(self, name: str) -> int | None:
        """Bytes of a file of the output that is there."""
        return size_at(self.final / name)

    def _is_finished(self, overwrite: bool) -> bool:
        """Whether the output that is there has all of its files; `Damaged` where it lacks some,
        unless it is to be made again."""
        receipt = self.published()
        lacks = lacking(receipt, self.size_there) if receipt else []
        if lacks and not overwrite:
            raise incomplete(lacks, str(self.out))
        return not lacks

    def head(self) -> dict:
        """What the journal's first entry holds besides the job."""
        return {}

    def holds(self, result: ShardResult) -> bool:
        """Whether a finished shard is there."""
        return disk.size_below(self.path, result.file) == result.size

    def is_whole(self, files: Mapping[str, dict]) -> bool:
        """Whether the files of a receipt are there, to be published."""
        # where files are moved one by one, some may have been
        moved = {name for name in files if self.inside and not os.path.lexists(self.path / name)}
        root = lambda name: self.final if name in moved else self.path
        return all(disk.size_below(root(n), n) == entry["size"] for n, entry in files.items())

    def disk(self, size: int) -> int:
        """Bytes of disk that files of that size take, all together."""
        return size

    def _output_entries(self) -> list[Path]:
        """What the output folder holds, without our control folder."""
        if not self.out.is_dir():
            return []
        return [
            p
            for p in self.out.iterdir()
            if p.name != ".adapterkit" and not (self.inside and p.name == "lost+found")
        ]

    def _check_output(self) -> None:
        """`Refused` unless the output folder is empty or, with --overwrite, an older output
        only."""
        entries = self._output_entries()
        if entries and not self.replaces:
            raise Refused(
                f"the output folder holds {listed(sorted(p.name for p in entries))}",
                expected="an empty or new folder",
                where=str(self.out),
                hint="choose another --out, or give --overwrite to replace an older output",
                code="AK601",
            )
        files = self.published().get("files")
        if entries and files is None:
            raise Refused(
                "--overwrite would remove a folder that adapterkit did not write",
                expected="an older output (--overwrite replaces the whole folder)",
                where=str(self.out),
                hint="remove the folder yourself, or choose another --out",
                code="AK601",
            )
        written = {*(files or ()), RECEIPT}
        there = self._output_files()
        unlisted = sorted(n for n in there if n not in written or (self.out / n).is_symlink())
        if unlisted:
            raise Refused(
                "--overwrite would remove files that adapterkit did not write: "
                f"{', '.join(unlisted[:6])}",
                expected="only files that its receipt lists "
                "(--overwrite replaces the whole folder)",
                where=str(self.out),
                hint="move them away, or choose another --out",
                code="AK601",
            )

    def _output_files(self) -> list[str]:
        """Every file of the output folder, as a path in it."""
        files = []
        for top in self._output_entries():
            below = [top] if top.is_symlink() or not top.is_dir() else top.rglob("*")
            files += [
                p.relative_to(self.out).as_posix()
                for p in below
                if p.is_symlink() or not p.is_dir()
            ]
        return files

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
        """Append one entry to the journal, durably."""
        with storage_errors(self.control / JOURNAL):
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
        self._check_output()  # it may have changed since the start
        with storage_errors(self.path):
            sync_folders(self.path)
        self.note(
            {
                "publish": _sha256(self.path / RECEIPT),
                "old": self._output_files() if self.inside else [],
            }
        )

    def publish(self) -> None:
        """Give the finished stage its final name, and leave nothing else behind but the journal."""
        with storage_errors(self.out):
            if self.inside:
                self._move_into()
            else:
                self._swap()
                sync_folder(self.out.resolve().parent)
        self._close_journal()
        self._clean()

    def _swap(self) -> None:
        final = self.out.resolve()
        if not self._output_entries():
            system.replace_empty(self.path, final)
            return
        self._check_output()
        try:
            system.exchange(self.path, final)
        except OSError:
            # no exchange on this file system: for a moment there is no output, never a mixed one
            shutil.rmtree(self.control / "old", ignore_errors=True)
            system.replace_empty(final, self.control / "old")
            system.replace_empty(self.path, final)

    def _move_into(self) -> None:
        """Move the files one by one; called again after a crash it continues.

        An old index over new shards loads and is silently wrong: what makes a folder loadable is
        removed first and moved last.
        """
        staged = self.path / RECEIPT
        new = [*receipt_at(staged if staged.exists() else self.out / RECEIPT)["files"], RECEIPT]
        old = set(filter(is_plain_path, self.journal()[-1]["old"])).difference(new)
        for name in (*new, *old):
            disk.check_folder(self.out, (self.out / name).parent)
        for name in sorted({*new, *old}, key=_publish_order, reverse=True):
            if _publish_order(name) and (name in old or (self.path / name).exists()):
                (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)
        self._move(name for name in new if not _publish_order(name))
        for name in old:
            (self.out / name).unlink(missing_ok=True)
        sync_folders(self.out)
        for name in sorted(filter(_publish_order, new), key=_publish_order):
            self._move([name])
            sync_folder(self.out)

    def _move(self, names: Iterable[str]) -> None:
        for name in names:
            if disk.size_below(self.path, name) is not None:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                system.replace(self.path / name, self.out / name)

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


def publish_of(entries: Iterable[dict]) -> str | None:
    """The sha256 of the receipt with which the stage was complete; files may have been sent
    since."""
    found = [entry["publish"] for entry in entries if "publish" in entry]
    return found[-1] if found else None


def _publish_order(name: str) -> int:
    """Weights and the rest 0, index 1, config 2, receipt 3."""
    configs = {"config.json": 2, "model_index.json": 2}
    return (configs | {RECEIPT: 3}).get(name, int(name.endswith(".index.json")))


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
