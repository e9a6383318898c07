"""Writing a folder so that it appears whole or not at all.

Files are built in a hidden stage folder beside the final one, as `name.part`, preallocated, written at their offsets in any order,
fsynced and renamed; the stage becomes the output by one rename of the folder (an exchange where an older output is replaced, so
that at every moment the final name is a whole old output, a whole new one, or nothing). A journal in the stage says which files
are done. Sizes prove nothing after a power cut: preallocated and renamed without fsync, a file can be all zeros.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
from pathlib import Path

from adapterkit.errors import Failed, Refused

PART = ".part"
JOURNAL = "journal.jsonl"
LOCK = "lock"
RECEIPT = "adapterkit.json"
FLUSH = 32 << 20  # bytes after which write-back is started, so that the fsync at the end finds little to do
# for measuring only: what durability costs
DURABLE = os.environ.get("ADAPTERKIT_FSYNC", "1") != "0"

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2


class ShardFile:
    """One output file while it is written: `name.part` in the stage, of its final size from the start."""

    def __init__(self, stage: Path, name: str, size: int):
        self.path, self.name, self.size = stage / (name + PART), name, size
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with storage_errors(self.path):
            self.descriptor = os.open(self.path, flags, 0o666)  # the umask decides, as for any file
            self._allocate(size)

    def _allocate(self, size: int) -> None:
        try:
            os.posix_fallocate(self.descriptor, 0, max(size, 1))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        os.ftruncate(self.descriptor, size)

    def write(self, data: memoryview | bytes, position: int) -> None:
        """All of `data` at `position`, through short writes."""
        view = memoryview(data)
        done = 0
        with storage_errors(self.path):
            while done < len(view):
                n = os.pwrite(self.descriptor, view[done:], position + done)
                if n == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += n

    def copy_from(self, source: int, start: int, position: int, length: int) -> bool:
        """Copy a byte range file to file inside the kernel (a reflink where it can be); False where that is not possible."""
        done = 0
        while done < length:
            try:
                n = os.copy_file_range(source, self.descriptor, length - done, start + done, position + done)
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
        """Ask the kernel to begin writing this range to disk. Only a hint: errors appear at `finish`."""
        if DURABLE and hasattr(_libc, "sync_file_range"):
            _libc.sync_file_range(
                self.descriptor, ctypes.c_int64(position), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE
            )

    def finish(self) -> None:
        """Make the bytes durable and give the file its name. An fsync that fails is final: the kernel forgets after one report."""
        with storage_errors(self.path):
            if DURABLE:
                os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1
            os.rename(self.path, self.path.with_name(self.name))

    def abandon(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Stage:
    """The hidden folder in which an output is built, with its lock and its journal beside it.

    `out` is the final folder; `.NAME.adapterkit/` beside it holds `out/` (the stage), `journal.jsonl` and `lock`. Where `out`
    exists and cannot be replaced by a rename (a mount point, or a parent that is not writable) that folder lies inside `out` and
    the files move one by one: weights, index, config and the rest, receipt last.
    """

    def __init__(self, out: Path):
        self.out = out
        parent = out.resolve().parent
        self.inner = out.is_dir() and (os.path.ismount(out) or not os.access(parent, os.W_OK))
        self.control = out / ".adapterkit" if self.inner else parent / f".{out.resolve().name}.adapterkit"
        self.path = self.control / "out"
        self._journal = -1
        self._lock: Path | None = None

    def check_output(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        """'fresh', 'resume' or 'finished'; `Refused` where the output or an interrupted run is in the way."""
        if self.out.exists() and not self.out.is_dir():
            raise Refused("a file of that name", expected="a folder to make", where=str(self.out), do="choose another --out")
        here = [p for p in self.out.iterdir() if p.name != ".adapterkit"] if self.out.is_dir() else []
        head = self._head()
        if resume and here and not overwrite and (self.out / RECEIPT).exists():
            if head is None or _receipt_of(self.out).get("fingerprint") == fingerprint:
                return "finished"
        going_on = resume and head is not None
        if here and (overwrite or (going_on and head is not None and head.get("overwrite"))):
            self._check_replaceable(here)
        elif here and not (going_on and self.inner):
            raise Refused(
                f"{len(here)} files in the output folder",
                expected="an empty or new folder",
                where=str(self.out),
                do="choose another --out, or give --overwrite to replace an older output",
            )
        if head is not None and not resume and not overwrite:
            raise Refused(
                "an interrupted run",
                where=str(self.control),
                do="give --resume to go on with it, or --overwrite to begin again",
            )
        return "resume" if going_on else "fresh"

    def _head(self) -> dict | None:
        """The journal's first entry, or None where there is no interrupted run."""
        try:
            line = (self.control / JOURNAL).open("rb").readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def _check_replaceable(self, here: list[Path]) -> None:
        files = _receipt_of(self.out).get("files")
        if not isinstance(files, dict):
            raise Refused(
                "no receipt of adapterkit among its files",
                expected="an older output (--overwrite replaces the whole folder)",
                where=str(self.out),
                do="remove the folder yourself, or choose another --out",
            )
        ours = set(files) | {RECEIPT}
        strange = [p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file() or p.is_symlink()]
        strange = sorted(name for name in strange if name not in ours and not name.startswith(".adapterkit/"))
        if strange:
            raise Refused(
                f"files that the older output did not write: {', '.join(strange[:6])}",
                expected="only files that its receipt lists (--overwrite replaces the whole folder)",
                where=str(self.out),
                do="move them away, or choose another --out",
            )

    def open(self, *, fresh: bool) -> None:
        """Make (or, when resuming, take over) the stage folder; `Refused` while another process works in it."""
        with storage_errors(self.control):
            self.control.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if fresh:
                shutil.rmtree(self.path, ignore_errors=True)
                (self.control / JOURNAL).unlink(missing_ok=True)
            self.path.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._journal = os.open(self.control / JOURNAL, flags, 0o666)

    def _take_lock(self) -> None:
        # flock is not trusted (it lies on Lustre and GPFS): an exclusive file that says who has it
        lock = self.control / LOCK
        me = f"{socket.gethostname()} {os.getpid()}"
        for _ in range(2):
            try:
                descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                host, _, pid = lock.read_text().partition(" ") if lock.exists() else ("", "", "")
                if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
                    lock.unlink(missing_ok=True)
                    continue
                raise Refused(
                    f"another process is at work there ({host} {pid})".rstrip(),
                    where=str(self.control),
                    do=f"wait for it; if there is none, remove {lock.name} in that folder",
                ) from None
            os.write(descriptor, me.encode())
            os.close(descriptor)
            self._lock = lock
            return

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock.unlink(missing_ok=True)
            self._lock = None

    def journal(self) -> list[dict]:
        """The journal's entries; a torn last line (a crash while it was written) is cut off."""
        data = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        entries, whole = [], 0
        for line in data.splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                entries.append(json.loads(line))
            except ValueError:
                break
            whole += len(line)
        if whole != len(data):
            os.ftruncate(self._journal, whole)
        return entries

    def note(self, entry: dict) -> None:
        """Append one entry to the journal, durably."""
        with storage_errors(self.control / JOURNAL):
            line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            if os.write(self._journal, line) != len(line):
                raise OSError(errno.EIO, "a short write")
            if DURABLE:
                os.fsync(self._journal)

    def write_file(self, name: str, data: bytes) -> None:
        """A small file, whole and durable."""
        path = self.path / name
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                if DURABLE:
                    os.fsync(file.fileno())

    def publish(self, weights: list[str]) -> None:
        """Give the finished stage its final name, and leave nothing else behind."""
        with storage_errors(self.out):
            sync_folders(self.path)
            if self.inner:
                self._move_into(weights)
            else:
                self._swap()
                sync_folder(self.out.resolve().parent)
            self.discard()

    def _swap(self) -> None:
        final = self.out.resolve()
        if not final.exists() or not any(final.iterdir()):
            os.rename(self.path, final)
            return
        old, new = os.fsencode(final), os.fsencode(self.path)
        if _libc.renameat2(_AT_FDCWD, new, _AT_FDCWD, old, _RENAME_EXCHANGE) != 0:
            # no exchange on this file system: for a moment there is no output, never a mixed one
            os.rename(final, self.control / "old")
            os.rename(self.path, final)

    def _move_into(self, weights: list[str]) -> None:
        names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        # an old index over new shards loads and is silently wrong: what makes a folder loadable goes first and comes last
        last = {RECEIPT: 3, "config.json": 2}
        for path in self.out.glob("*"):
            if path.name in last or path.name.endswith(".index.json"):
                path.unlink()
        sync_folder(self.out)
        order = {name: -1 for name in weights}
        for name in sorted(names, key=lambda n: (order.get(n, last.get(n, 1 if n.endswith(".index.json") else 0)), n)):
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.path / name, self.out / name)
            if name in last:
                sync_folder(self.out)
        for path in self.out.glob("*.safetensors"):
            if path.name not in weights:
                path.unlink()
        sync_folders(self.out)

    def close(self) -> None:
        """Leave the stage as it is (a later --resume finds it) and give the lock back."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
        self._drop_lock()

    def discard(self) -> None:
        """Remove the stage, its journal and its lock."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
        self._lock = None
        shutil.rmtree(self.control, ignore_errors=True)


def _receipt_of(folder: Path) -> dict:
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
    except (OSError, ValueError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


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


@contextlib.contextmanager
def storage_errors(path: Path):
    """Turn the system's errors into ours, naming the file and the way out."""
    try:
        yield
    except OSError as error:
        do = {
            errno.ENOSPC: "free some space, then run again with --resume",
            errno.EDQUOT: "free some space of your quota, then run again with --resume",
            errno.EFBIG: "give --max-shard-size a size that the file system can hold",
            errno.EACCES: "choose another --out, or change its permissions",
            errno.EROFS: "choose another --out",
        }.get(error.errno or 0, "check the disk, then run again with --resume")
        raise Failed(f"cannot write: {error.strerror or error}", where=str(path), do=do) from error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


__all__ = ["RECEIPT", "ShardFile", "Stage", "free_bytes", "storage_errors", "sync_folder"]
