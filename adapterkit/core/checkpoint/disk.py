"""Write to a disk: short writes, durable names, free space, and the system's errors with a hint."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from adapterkit.core.errors import Failed
from adapterkit.core.system import system

DURABLE = True  # whether files and names are fsynced; False only to measure what that costs
HINTS = {
    errno.ENOSPC: "free some space, then run again with --resume",
    errno.EDQUOT: "free some space of your quota, then run again with --resume",
    errno.EFBIG: "give --max-shard-size a size that the file system, or the limit (ulimit -f), "
    "can hold",
    errno.EACCES: "choose another --out, or change its permissions",
    errno.EPERM: "choose another --out, or change its permissions",
    errno.EROFS: "choose another --out",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run again with --resume",
    errno.EXDEV: "move the older output away, or choose another --out",
    errno.EBUSY: "move the older output away, or choose another --out",
    errno.ELOOP: "remove the link, then run again with --resume",
}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise the system's errors as `Failed`, naming the file."""
    try:
        yield
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "check the disk, then run again with --resume")
        problem = f"cannot write: {error.strerror or error}"
        raise Failed(problem, where=str(path), hint=hint, code="AK209") from error


def write_all(data: memoryview | bytes, write: Callable[[memoryview, int], int]) -> None:
    """Hand all of `data` to `write(rest, position)`, which returns how many bytes it wrote."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        n = write(view[done:], done)
        if n == 0:
            raise OSError(errno.EIO, "nothing was written")
        done += n


def is_linked(root: Path, folder: Path) -> bool:
    """Return whether a folder below `root`, or one in between, is a link, which may lead anywhere.
    A system call that follows no links only checks the last name of a path."""
    between = takewhile(lambda one: one != root, (folder, *folder.parents))
    return any(one.is_symlink() for one in between)


def check_folder(root: Path, folder: Path) -> None:
    """Raise OSError for a folder that `is_linked`."""
    if is_linked(root, folder):
        raise OSError(errno.ELOOP, "a folder is a symbolic link", str(folder))


def size_below(root: Path, name: str) -> int | None:
    """Return the bytes of an ordinary file with no other name; None for a link, a hard link, a file
    behind a linked folder, or no file."""
    path = root / name
    try:
        status = path.lstat()
    except OSError:
        return None
    is_own = stat.S_ISREG(status.st_mode) and status.st_nlink < 2  # may be 0 on some file systems
    return status.st_size if is_own and not is_linked(root, path.parent) else None


def replace_file(path: Path, data: bytes, temporary: Path, *, durable: bool = True) -> None:
    """Write a small file as a whole: under the name `temporary` in its folder, then renamed."""
    with storage_errors(path):
        temporary.unlink(missing_ok=True)  # it may be a hard link
        descriptor = system.open(temporary, "create")
        try:
            try:
                write_all(data, lambda rest, _: os.write(descriptor, rest))
                if durable:
                    sync(descriptor)
            finally:
                os.close(descriptor)
            system.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Make a file's bytes durable."""
    if DURABLE:
        system.sync(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    if DURABLE:
        system.sync_folder(path)


def sync_folders(root: Path) -> None:
    """Make the names in a folder and in all folders below it durable, the innermost first."""
    for path in [*sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True), root]:
        sync_folder(path)


def free_bytes(path: Path) -> int:
    """Return the free bytes for an unprivileged writer at `path`, or at its nearest existing
    parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
