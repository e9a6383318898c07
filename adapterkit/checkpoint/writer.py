"""Writing a folder so that it appears whole or not at all.

Files are built in a hidden stage folder beside the final one, as `name.part`, preallocated, written at their offsets in any order,
fsynced and renamed; the stage becomes the output by one rename of the folder (an exchange where an older output is replaced, so
that at every moment the final name is a whole old output, a whole new one, or nothing). A journal in the stage says which files
are done. Sizes prove nothing after a power cut: preallocated and renamed without fsync, a file can be all zeros.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from adapterkit.checkpoint import system
from adapterkit.checkpoint.lock import LOCK, Lock
from adapterkit.errors import Failed, Refused

PART = ".part"
JOURNAL = "journal.jsonl"
RECEIPT = "adapterkit.json"
NAME_MAX, PATH_MAX = 255, 4000  # bytes; of a path with room for the files in it, of 4096
FLUSH = (
    32 << 20
)  # bytes after which write-back is started, so that the fsync at the end finds little to do
# for measuring only: what durability costs
DURABLE = os.environ.get("ADAPTERKIT_FSYNC", "1") != "0"


class ShardFile:
    """One output file while it is written: `name.part` in the stage, of its final size from the start."""

    def __init__(self, stage: Path, name: str, size: int):
        self.path, self.name, self.size = stage / (name + PART), name, size
        self.descriptor = -1
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.path, flags, 0o666)  # the umask decides, as for any file
            try:
                self._allocate(size)
            except BaseException:
                self.abandon()
                raise

    def _allocate(self, size: int) -> None:
        try:
            system.fallocate(self.descriptor, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        os.ftruncate(self.descriptor, size)

    def write(self, data: memoryview | bytes, position: int) -> None:
        """All of `data` at `position`, through short writes."""
        with storage_errors(self.path):
            write_all(data, lambda rest, at: os.pwrite(self.descriptor, rest, position + at))

    def read(self, buffer: memoryview, position: int) -> None:
        """Fill the buffer with what was written at `position`."""
        with storage_errors(self.path):
            done = 0
            while done < len(buffer):
                n = os.preadv(self.descriptor, [buffer[done:]], position + done)
                if n == 0:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                done += n

    def cut(self, size: int) -> None:
        """Make the file that small: its size was an upper bound."""
        with storage_errors(self.path):
            os.ftruncate(self.descriptor, size)

    def copy_from(self, source: int, start: int, position: int, length: int) -> bool:
        """Copy a byte range file to file inside the kernel (a reflink where it can be); False where that is not possible."""
        done = 0
        while done < length:
            try:
                n = os.copy_file_range(
                    source, self.descriptor, length - done, start + done, position + done
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    with storage_errors(self.path):
                        raise
                return False  # EXDEV, ENOSYS, EINVAL, EIO ...: the caller reads and writes, which names a real error
            if n == 0:
                return False
            done += n
        return True

    def start_writeback(self, position: int, length: int) -> None:
        """Ask the kernel to begin writing this range to disk. Only a hint: errors appear at `sync`."""
        if DURABLE:
            with contextlib.suppress(OSError):
                system.start_writeback(self.descriptor, position, length)

    def sync(self) -> None:
        """Make the bytes durable. An fsync that fails is final, never tried again: the kernel forgets after one report."""
        descriptor, self.descriptor = self.descriptor, -1
        with storage_errors(self.path):
            try:
                if DURABLE:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def publish(self) -> None:
        """Give the synced file its name."""
        with storage_errors(self.path):
            os.rename(self.path, self.path.with_name(self.path.name.removesuffix(PART)))

    def abandon(self) -> None:
        """Close the file as it is; a later run begins it again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def control_of(out: Path) -> str:
    """The name of the folder in which an output is built."""
    return f".{out.resolve().name}.adapterkit"


def check_name(out: Path) -> None:
    """`Refused` where a name, that of the folder in which the output is built included, is longer than file systems take."""
    path = out.resolve()
    longest = max(len(os.fsencode(name)) for name in (*path.parts, control_of(out)))
    room = NAME_MAX - len(control_of(Path("/")))
    if longest > NAME_MAX:
        found, expected = (
            f"a name of {len(os.fsencode(path.name))} bytes",
            f"names of at most {room} bytes",
        )
        raise Refused(found, expected=expected, where="--out", hint="choose a shorter --out")
    if len(os.fsencode(path)) > PATH_MAX:
        found, expected = f"a path of {len(os.fsencode(path))} bytes", f"at most {PATH_MAX} bytes"
        raise Refused(found, expected=expected, where="--out", hint="choose a shorter --out")


class Stage:
    """The hidden folder in which an output is built, with its lock and its journal beside it; a context that holds the lock.

    `out` is the final folder; `.NAME.adapterkit/` beside it holds `out/` (the stage), `journal.jsonl` and `lock`. Where `out`
    exists and cannot be replaced by a rename (a mount point, or a parent that is not writable) that folder lies inside `out` and
    the files move one by one: weights, index, config, receipt last.

    The journal's first entry is the job, then come the finished shards, and once all is written `{"publish": sha256 of the
    receipt}`: from then on the job is done but for the names, and who has that receipt, the stage or `out`, says how far it got.
    """

    def __init__(self, out: Path):
        self.out = out
        parent = out.resolve().parent
        self.inner = out.is_dir() and (is_mount(out.resolve()) or not os.access(parent, os.W_OK))
        self.control = out / ".adapterkit" if self.inner else parent / control_of(out)
        self.path = self.control / "out"
        self.lock = Lock(self.control)
        self.replaces = False  # an older output
        self._journal = -1

    def __enter__(self) -> "Stage":
        """Take the folder for this process; `Refused` while another one works in it."""
        with storage_errors(self.control):
            if self.control.is_symlink() or self.path.is_symlink():
                raise Refused(
                    "a link",
                    expected="a folder of ours",
                    where=str(self.control),
                    hint="remove the link",
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
                return self.lock.take()
            except FileNotFoundError:  # the process before us is just clearing up
                if last:
                    raise

    def __exit__(self, *_: object) -> None:
        """Give the lock back; what a later --resume can use stays."""
        self._close_journal()
        with contextlib.suppress(OSError):
            self.lock.drop()
            self.control.rmdir()

    def state(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        """'fresh', 'resume', 'publish' (nothing is missing but the final names) or 'finished'; `Refused` where the output or an
        interrupted run is in the way."""
        if self.out.exists() and not self.out.is_dir():
            raise Refused(
                "a file of that name",
                expected="a folder to make",
                where=str(self.out),
                hint="choose another --out",
            )
        entries = self.journal()
        head = entries[0] if entries else None
        there = _receipt_of(self.out).get("fingerprint")
        if (
            resume
            and head is None
            and there is not None
            and (there == fingerprint or not overwrite)
        ):
            return "finished"
        receipt = entries[-1].get("publish") if entries else None
        if resume and receipt is not None and _sha256(self.out / RECEIPT) == receipt:
            return "finished"
        ready = resume and receipt is not None and _sha256(self.path / RECEIPT) == receipt
        self.replaces = overwrite or bool(resume and head is not None and head.get("overwrite"))
        if not (ready and self.inner):  # else the output is half moved
            self._check_output()
        if head is not None and not resume and not overwrite:
            raise Refused(
                "an interrupted run",
                expected="no unfinished output of that name",
                where=str(self.control),
                hint="give --resume to go on with it, or --overwrite to begin again",
            )
        if head is None or not resume:
            return "fresh"
        return "publish" if ready and head.get("fingerprint") == fingerprint else "resume"

    def _here(self) -> list[Path]:
        """What the output folder holds, but for what is not the user's."""
        if not self.out.is_dir():
            return []
        return [
            p
            for p in self.out.iterdir()
            if p.name != ".adapterkit" and not (self.inner and p.name == "lost+found")
        ]

    def _check_output(self) -> None:
        """`Refused` unless the output folder is empty or, where it is to be replaced, one older output and nothing else."""
        here = self._here()
        if here and not self.replaces:
            raise Refused(
                f"{len(here)} files in the output folder",
                expected="an empty or new folder",
                where=str(self.out),
                hint="choose another --out, or give --overwrite to replace an older output",
            )
        files = _receipt_of(self.out).get("files")
        if here and not isinstance(files, dict):
            raise Refused(
                "no receipt of adapterkit among its files",
                expected="an older output (--overwrite replaces the whole folder)",
                where=str(self.out),
                hint="remove the folder yourself, or choose another --out",
            )
        strange = sorted(set(self._files_here()) - {*(files or ()), RECEIPT})
        if strange:
            raise Refused(
                f"files that the older output did not write: {', '.join(strange[:6])}",
                expected="only files that its receipt lists (--overwrite replaces the whole folder)",
                where=str(self.out),
                hint="move them away, or choose another --out",
            )

    def _files_here(self) -> list[str]:
        """Every file of the output folder, as a path in it."""
        found = []
        for top in self._here():
            below = [top] if top.is_symlink() or not top.is_dir() else top.rglob("*")
            found += [
                p.relative_to(self.out).as_posix()
                for p in below
                if p.is_symlink() or not p.is_dir()
            ]
        return found

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Remove what the stage holds, but for finished shards: half-written files also hold the space that is needed."""
        kept = {self.path / name for name in keep}
        with storage_errors(self.path):
            for path in sorted(
                self.path.rglob("*"), reverse=True
            ):  # what is in a folder before the folder
                if path.is_symlink() or not path.is_dir():
                    if path not in kept:
                        path.unlink()
                else:
                    with contextlib.suppress(OSError):  # it holds what is kept
                        path.rmdir()

    def forget(self) -> None:
        """Remove an earlier run's stage and journal: the next run begins again."""
        self._close_journal()
        with storage_errors(self.control):
            (self.control / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.control)
            self.clear()

    def begin(self) -> None:
        """Make the stage and open the journal, cutting off a torn last line (a crash while it was written)."""
        with storage_errors(self.control):
            self.path.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._journal = os.open(self.control / JOURNAL, flags, 0o666)
            whole = sum(len(line) for line, _ in self._lines())
            if whole != os.fstat(self._journal).st_size:
                os.ftruncate(self._journal, whole)
            sync_folder(self.control)
            sync_folder(self.control.parent)

    def journal(self) -> list[dict]:
        """The journal's whole entries; none where there is no interrupted run."""
        return [entry for _, entry in self._lines()]

    def _lines(self) -> list[tuple[bytes, dict]]:
        try:
            lines = (self.control / JOURNAL).read_bytes().splitlines(keepends=True)
        except OSError:
            return []
        found: list[tuple[bytes, dict]] = []
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or ("fingerprint" in entry) != (not found):
                break
            found.append((line, entry))
        return found

    def note(self, entry: dict) -> None:
        """Append one entry to the journal, durably."""
        with storage_errors(self.control / JOURNAL):
            line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            write_all(line, lambda rest, _: os.write(self._journal, rest))
            if DURABLE:
                os.fsync(self._journal)

    def write_file(self, name: str, blocks: Iterable[bytes]) -> tuple[int, str]:
        """A small file, whole and durable; its size and sha256."""
        path = self.path / name
        size, digest = 0, hashlib.sha256()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            try:
                for block in blocks:
                    write_all(block, lambda rest, _: os.write(descriptor, rest))
                    digest.update(block)
                    size += len(block)
                if DURABLE:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return size, digest.hexdigest()

    def ready(self) -> None:
        """Note that the stage is complete, receipt included: from here on a resumed run only publishes it."""
        self._check_output()  # it may have changed since the start
        with storage_errors(self.path):
            sync_folders(self.path)
        self.note(
            {
                "publish": _sha256(self.path / RECEIPT),
                "old": self._files_here() if self.inner else [],
            }
        )

    def publish(self) -> None:
        """Give the finished stage its final name, and leave nothing else behind."""
        with storage_errors(self.out):
            if self.inner:
                self._move_into()
            else:
                self._swap()
                sync_folder(self.out.resolve().parent)
        self.discard()

    def _swap(self) -> None:
        final = self.out.resolve()
        if not self._here():
            os.rename(self.path, final)
            return
        self._check_output()
        try:
            system.exchange(self.path, final)
        except OSError:
            # no exchange on this file system: for a moment there is no output, never a mixed one
            shutil.rmtree(self.control / "old", ignore_errors=True)
            os.rename(final, self.control / "old")
            os.rename(self.path, final)

    def _move_into(self) -> None:
        """Move the files one by one; begun again after a crash it goes on. An old index over new shards loads and is silently
        wrong: what makes a folder loadable goes first and comes last."""
        new = [
            *_receipt_of(self.path if (self.path / RECEIPT).exists() else self.out)["files"],
            RECEIPT,
        ]
        old = {name for name in self.journal()[-1]["old"] if name not in new}
        for name in sorted({*new, *old}, key=_turn, reverse=True):
            if _turn(name) and (name in old or (self.path / name).exists()):
                (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)
        self._move(name for name in new if not _turn(name))
        for name in old:
            (self.out / name).unlink(missing_ok=True)
        sync_folders(self.out)
        for name in sorted(filter(_turn, new), key=_turn):
            self._move([name])
            sync_folder(self.out)

    def _move(self, names: Iterable[str]) -> None:
        for name in names:
            if (self.path / name).exists():
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.path / name, self.out / name)

    def discard(self) -> None:
        """Remove the stage and what an exchange put there, then the journal and the lock."""
        self._close_journal()
        with contextlib.suppress(OSError):
            for path in self.control.iterdir():
                if path.name not in (JOURNAL, LOCK):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                        missing_ok=True
                    )
            (self.control / JOURNAL).unlink(missing_ok=True)

    def _close_journal(self) -> None:
        descriptor, self._journal = self._journal, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _turn(name: str) -> int:
    """When a file of an output comes: weights and the rest, index, config, receipt."""
    return {RECEIPT: 3, "config.json": 2}.get(name, int(name.endswith(".index.json")))


def _receipt_of(folder: Path) -> dict:
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
    except (OSError, ValueError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def is_mount(path: Path) -> bool:
    """Whether a folder is a mount point, bind mounts within one file system included: no rename can replace it."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = [
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        for line in lines
    ]
    return os.fsencode(path) in points


def write_all(data: memoryview | bytes, put: Callable[[memoryview, int], int]) -> None:
    """Hand all of `data` to `put(rest, done)`, which says how much of it it wrote: a write may be short."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        n = put(view[done:], done)
        if n == 0:
            raise OSError(errno.EIO, "nothing was written")
        done += n


def free_bytes(path: Path) -> int:
    """Bytes free for an unprivileged writer on the file system that holds `path` (or its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    if DURABLE:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(root: Path) -> None:
    for path in [*sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True), root]:
        sync_folder(path)


ADVICE = {
    errno.ENOSPC: "free some space, then run again with --resume",
    errno.EDQUOT: "free some space of your quota, then run again with --resume",
    errno.EFBIG: "give --max-shard-size a size that the file system, or the limit (ulimit -f), can hold",
    errno.EACCES: "choose another --out, or change its permissions",
    errno.EPERM: "choose another --out, or change its permissions",
    errno.EROFS: "choose another --out",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run again with --resume",
    errno.EXDEV: "move the older output away, or choose another --out",
    errno.EBUSY: "move the older output away, or choose another --out",
}


@contextlib.contextmanager
def storage_errors(path: Path):
    """Turn the system's errors into ours, naming the file and the way out."""
    try:
        yield
    except OSError as error:
        hint = ADVICE.get(error.errno or 0, "check the disk, then run again with --resume")
        raise Failed(
            f"cannot write: {error.strerror or error}", where=str(path), hint=hint
        ) from error
