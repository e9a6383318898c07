"""The calls that Linux and macOS share."""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from adapterkit.core.system.interface import ALL, FLAGS, MINE, Handler, LockHeldError, Mode, System

assert sys.platform != "win32"  # there type checkers skip the rest

ANY = {"read"}  # modes that follow links


class Posix(System):
    signals = (*System.ending, signal.SIGALRM)  # the last: `call_soon`

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the C library; OSError with ENOSYS if it does not exist."""
        function = getattr(self.libc, name, None)
        if function is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        while function(*arguments) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def open(self, path: Path, mode: Mode, permissions: int = ALL) -> int:
        flags = FLAGS[mode] | os.O_CLOEXEC | (0 if mode in ANY else os.O_NOFOLLOW)
        if mode in ("read", "own"):
            flags |= os.O_NONBLOCK  # it may be a pipe by now
        return os.open(path, flags, permissions)

    def open_unnamed(self, path: Path) -> int:
        descriptor = self.open(path, "create", MINE)
        os.unlink(path)
        return descriptor

    def read_at(self, descriptor: int, buffer: memoryview, position: int) -> int:
        return os.preadv(descriptor, [buffer], position)

    def write_at(self, descriptor: int, data: memoryview, position: int) -> int:
        return os.pwrite(descriptor, data, position)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def is_own(self, status: os.stat_result) -> bool:
        return status.st_uid in (0, os.geteuid())

    def replace(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def hold(self, path: Path, record: str, may_run: Callable[[str], bool]) -> int:
        """Take a lock. The file appears with its content, by a hard link, so a crash cannot leave
        an empty one."""
        own = path.with_name(f"{path.name}.{os.getpid()}")
        own.unlink(missing_ok=True)
        descriptor = self.open(own, "create")
        try:
            os.write(descriptor, record.encode())
            _flock(descriptor)
            while not self._link(own, path):
                self._remove_stale(path, may_run)
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            own.unlink(missing_ok=True)
        return descriptor

    def release(self, path: Path, descriptor: int) -> None:
        path.unlink(missing_ok=True)
        os.close(descriptor)

    def _link(self, file: Path, name: Path) -> bool:
        """Give the file a name; return False if the name exists."""
        try:
            os.link(file, name)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                self.rename_new(file, name)
            except FileExistsError:
                return False
        return True

    def _remove_stale(self, path: Path, may_run: Callable[[str], bool]) -> None:
        try:
            descriptor = self.open(path, "own")
        except FileNotFoundError:
            return
        try:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace")
            if not _flock(descriptor) or may_run(holder):
                raise LockHeldError(holder)
            # only the process that has a file flocked removes it, and only under this name
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    path.unlink()
        finally:
            os.close(descriptor)

    def memory(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def call_soon(self, handler: Handler, seconds: float) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _flock(descriptor: int) -> bool:
    """Return False if another process has the file flocked; True also on a file system without
    flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
