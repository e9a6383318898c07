"""Windows' rules on Linux: its half of `checkpoint.system` over a pretended kernel32, without what
Windows lacks in `os` and `signal`, and with errors where Windows has some.

- A file that somebody has open, or mapped, is not renamed, replaced or removed, nor is a folder
  that holds one; here the files of this process count.
- A mapped file is not emptied by opening it.
- `rename` never replaces; `replace` replaces files only. Folders are not opened.
"""

import contextlib
import ctypes
import errno
import importlib
import os
import shutil
import signal
import stat
import sys
import types
from pathlib import Path

LACKED = {
    "os": (
        "fork", "pread", "preadv", "pwrite", "pwritev", "readv", "writev", "copy_file_range",
        "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sysconf", "getuid", "geteuid",
        "getloadavg", "fchmod", "chown", "fchown", "mkfifo", "sendfile", "uname",
        "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY",
    ),
    "signal": (
        "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "alarm",
        "setitimer", "ITIMER_REAL", "pthread_sigmask", "pthread_kill", "sigwait", "pause",
        "SIG_BLOCK", "SIG_SETMASK",
    ),
}  # fmt: skip
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
BREAK = signal.SIGUSR2  # stands for Ctrl-Break
ACCESS_DENIED, INVALID_PARAMETER, STILL_ACTIVE = 5, 87, 259
TEMPORARY = 1 << 30


def pretend() -> None:
    """Make this process one of Windows; there is no way back. The functions of `os` that it has
    now are those that the pretended system calls."""
    kernel = Kernel()
    spare_foreign_locks()
    fcntl = importlib.import_module("fcntl")
    patch_names(kernel)
    sys.modules["msvcrt"] = msvcrt_of(fcntl)
    ctypes.WinDLL = lambda *_, **__: kernel
    ctypes.get_last_error = lambda: kernel.error
    ctypes.WinError = lambda code: OSError(code, f"error {code} of Windows")
    for module, names in LACKED.items():
        for name in names:
            with contextlib.suppress(AttributeError):
                delattr(sys.modules[module], name)
    signal.SIGBREAK = BREAK
    for name in MODULES:
        sys.modules[name] = None
    shutil._use_fd_functions = False
    sys.addaudithook(refuse_emptying)
    sys.platform = "win32"
    from adapterkit.core.system import system
    from adapterkit.core.system.windows import Windows

    # modules hold this very object
    system.__dict__.clear()
    system.__class__ = Windows
    system.__init__()


def spare_foreign_locks() -> None:
    """The Hub's client locks its cache through `filelock`, which chose its half when it was
    imported: that package alone keeps the names of Linux."""
    linux = types.ModuleType("os")
    linux.__dict__.update(os.__dict__)
    for name, module in list(sys.modules.items()):
        if name.startswith("filelock") and getattr(module, "os", None) is os:
            module.os = linux


class Kernel:
    """kernel32, as far as it is called."""

    def __init__(self) -> None:
        self.error, self.long_paths = 0, 1
        self.preadv, self.pwrite, self.readlink = os.preadv, os.pwrite, os.readlink
        self.pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.OpenProcess = Call(self._open_process)
        self.RtlAreLongPathsEnabled = Call(lambda: self.long_paths)

    def fail(self, code: int) -> int:
        self.error = code
        return 0

    def ReadFile(self, handle, buffer, size, done, at) -> int:
        view = memoryview(buffer).cast("B")[:size]
        done._obj.value = self.preadv(handle.value or 0, [view], place_of(at))
        return 1 if done._obj.value or not size else self.fail(38)

    def WriteFile(self, handle, buffer, size, done, at) -> int:
        done._obj.value = self.pwrite(handle.value or 0, bytes(buffer)[:size], place_of(at))
        return 1

    def _open_process(self, access: int, inherit: bool, pid: int) -> int:
        return pid if Path(f"/proc/{pid}").exists() else self.fail(INVALID_PARAMETER)

    def GetExitCodeProcess(self, handle, code) -> int:
        state = Path(f"/proc/{handle.value}/stat").read_bytes().rpartition(b")")[2].split()[0]
        code._obj.value = 1 if state in b"ZX" else STILL_ACTIVE
        return 1

    def GetProcessTimes(self, handle, start, *others) -> int:
        fields = Path(f"/proc/{handle.value}/stat").read_bytes().rpartition(b")")[2].split()
        start._obj.dwLowDateTime = int(fields[19]) & 0xFFFFFFFF
        return 1

    def CloseHandle(self, handle) -> int:
        return 1

    def GlobalMemoryStatusEx(self, status) -> int:
        status._obj.total = self.pages
        return 1


class Call:
    """A function of a library: its result type can be set."""

    def __init__(self, function):
        self.function, self.restype = function, None

    def __call__(self, *arguments):
        return self.function(*arguments)


def place_of(at) -> int:
    return at._obj.offset | at._obj.offset_high << 32


def msvcrt_of(fcntl) -> types.ModuleType:
    """The C library's module: locks are of bytes from the file's position on."""
    module = types.ModuleType("msvcrt")

    def locking(descriptor: int, mode: int, count: int) -> None:
        fcntl.lockf(
            descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR)
        )

    module.get_osfhandle = lambda descriptor: descriptor
    module.locking, module.LK_NBLCK = locking, 2
    return module


def patch_names(kernel: Kernel) -> None:
    """The functions of `os` that rename, remove and open."""
    real = {name: getattr(os, name) for name in ("open", "rename", "replace", "unlink", "rmdir")}
    inherited = os.O_CLOEXEC
    close, temporary = os.close, dict[int, str]()

    def open_file(path, flags, mode=0o777, *, dir_fd=None):
        if dir_fd is None and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "folders are not opened", os.fspath(path))
        descriptor = real["open"](path, (flags & ~TEMPORARY) | inherited, mode, dir_fd=dir_fd)
        if flags & TEMPORARY:
            temporary[descriptor] = os.fspath(path)
        return descriptor

    def close_file(descriptor: int) -> None:
        close(descriptor)
        if descriptor in temporary:
            real["unlink"](temporary.pop(descriptor))

    def rename(old, new, **_) -> None:
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "exists", os.fspath(new))
        refuse_open(kernel, old)
        real["rename"](old, new)

    def replace(old, new, **_) -> None:
        if os.path.isdir(new):
            raise PermissionError(errno.EACCES, "a folder is not replaced", os.fspath(new))
        refuse_open(kernel, old)
        refuse_open(kernel, new)
        # under the name that faults count
        real["rename"](old, new)

    def unlink(path, *, dir_fd=None) -> None:
        if dir_fd is None:
            refuse_open(kernel, path)
        real["unlink"](path, dir_fd=dir_fd)

    os.open, os.close, os.rename, os.replace = open_file, close_file, rename, replace
    os.unlink = os.remove = unlink
    os.O_BINARY, os.O_NOINHERIT, os.O_TEMPORARY = 0, 0, TEMPORARY


def refuse_open(kernel: Kernel, path) -> None:
    """PermissionError where this process has the file, or one in the folder, open or mapped."""
    where = os.path.abspath(path)
    inside = where + "/"
    for name in [*open_files(kernel), *mapped_files()]:
        if name == where or (name.startswith(inside) and stat.S_ISDIR(os.lstat(where).st_mode)):
            raise PermissionError(errno.EACCES, f"{name} is open", os.fspath(path))


def refuse_emptying(event: str, arguments: tuple) -> None:
    """Of files that are mapped; every way of opening one comes by here."""
    if event != "open" or isinstance(arguments[0], int) or not arguments[2] & os.O_TRUNC:
        return
    if os.path.abspath(arguments[0]) in mapped_files():
        raise PermissionError(errno.EACCES, "is mapped", os.fspath(arguments[0]))


def open_files(kernel: Kernel) -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(kernel.readlink(f"/proc/self/fd/{descriptor}"))
    return names


def mapped_files() -> list[str]:
    text = Path("/proc/self/maps").read_bytes().decode("utf-8", "replace")
    return [line.split(None, 5)[5] for line in text.splitlines() if len(line.split(None, 5)) == 6]
