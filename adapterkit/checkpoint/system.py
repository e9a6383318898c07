"""System calls that Python lacks, through the C library; each raises OSError (ENOSYS where the
system has no such call)."""

import ctypes
import errno
import os
from pathlib import Path

MOST_CORES = 8  # that are used unless asked otherwise
_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _NOREPLACE, _EXCHANGE, _WRITE = -100, 1, 2, 2


def fallocate(descriptor: int, size: int) -> None:
    """Give the file blocks for `size` bytes; unlike posix_fallocate never by writing them one by
    one."""
    _call("fallocate", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))


def start_writeback(descriptor: int, position: int, length: int) -> None:
    """Begin to write a range of the file to disk, without waiting for it."""
    _call("sync_file_range", descriptor, ctypes.c_int64(position), ctypes.c_int64(length), _WRITE)


def rename_new(old: Path, new: Path) -> None:
    """Rename, unless there is something of the new name."""
    _call("renameat2", _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE)


def exchange(one: Path, other: Path) -> None:
    """Each gets the other's name, in one step."""
    _call("renameat2", _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)


def all_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def cores() -> int:
    """Those that it uses by default: more wait for the disk, or for memory."""
    return min(MOST_CORES, all_cores())


def quarter_of_memory() -> int:
    """A quarter of the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def _call(name: str, *arguments: object) -> None:
    function = getattr(_libc, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
