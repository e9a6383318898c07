"""Windows: written from its documentation, and tested under its rules on Linux; not yet run there.

An open file cannot be renamed, replaced or removed, so files are closed before."""

import _thread
import contextlib
import ctypes
import errno
import msvcrt
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable
from ctypes import wintypes
from pathlib import Path

from adapterkit.core.system.interface import ALL, FLAGS, MINE, Handler, LockHeldError, Mode, System

assert sys.platform == "win32"  # elsewhere type checkers skip the rest

BINARY = os.O_BINARY | os.O_NOINHERIT
LOCKED = 1 << 30  # behind the record: locks are mandatory, and others read it
HANDLE_EOF = 38
QUERY_LIMITED, STILL_ACTIVE = 0x1000, 259
PLAIN = re.compile(r"[\w:/\\.=+-][\w:/\\.=+@-]*")  # what no shell changes


class Overlapped(ctypes.Structure):
    """The position of a read or write, independent of the file's own."""

    _fields_ = (
        ("internal", ctypes.c_void_p),
        ("internal_high", ctypes.c_void_p),
        ("offset", wintypes.DWORD),
        ("offset_high", wintypes.DWORD),
        ("event", wintypes.HANDLE),
    )


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", wintypes.DWORD),
        ("load", wintypes.DWORD),
        *((name, ctypes.c_uint64) for name in (
            "total", "free", "total_page", "free_page", "total_virtual", "free_virtual", "extended"
        )),
    )  # fmt: skip


class Windows(System):
    # Ctrl-Break; the C library also raises it for a closed window and for logging off
    ending = signals = (*System.ending, signal.SIGBREAK)

    def __init__(self) -> None:
        self.kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        self.kernel.OpenProcess.restype = wintypes.HANDLE
        self.native = ctypes.WinDLL("ntdll")
        self.native.RtlAreLongPathsEnabled.restype = ctypes.c_ubyte

    def open(self, path: Path, mode: Mode, permissions: int = ALL) -> int:
        if mode != "read" and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if mode == "own" and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return os.open(path, FLAGS[mode] | BINARY, permissions)

    def open_unnamed(self, path: Path) -> int:
        return os.open(path, FLAGS["create"] | BINARY | os.O_TEMPORARY, MINE)

    def read_at(self, descriptor: int, buffer: memoryview, position: int) -> int:
        return self._transfer("ReadFile", descriptor, buffer, position)

    def write_at(self, descriptor: int, data: memoryview, position: int) -> int:
        return self._transfer("WriteFile", descriptor, data, position)

    def _transfer(self, name: str, descriptor: int, data: memoryview, position: int) -> int:
        handle = wintypes.HANDLE(msvcrt.get_osfhandle(descriptor))
        size = min(len(data), 1 << 30)
        buffer = _address_of(data[:size])
        done = wintypes.DWORD()
        at = Overlapped(offset=position & 0xFFFFFFFF, offset_high=position >> 32)
        function = getattr(self.kernel, name)
        if not function(handle, buffer, size, ctypes.byref(done), ctypes.byref(at)):
            code = ctypes.get_last_error()
            if code == HANDLE_EOF:
                return 0
            raise ctypes.WinError(code)
        return done.value

    def sync_folder(self, path: Path) -> None:
        pass

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def rename_new(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def replace_empty(self, old: Path, new: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(new)
        os.rename(old, new)

    path_limit = "paths of at most 259 letters, or long paths enabled in Windows"

    def path_overflow(self, path: Path) -> int:
        # the switch in the registry, and Python's manifest, which allows it
        most = 32_766 if self.native.RtlAreLongPathsEnabled() else 259
        return len(str(path).encode("utf-16-le")) // 2 - most

    def is_mount(self, path: Path) -> bool:
        return os.path.ismount(path)

    def hold(self, path: Path, record: str, may_run: Callable[[str], bool]) -> int:
        """Take a lock. It ends with its process, so a leftover record means nothing."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, ALL)
        try:
            os.lseek(descriptor, LOCKED, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 1000).decode("utf-8", "replace")
            os.close(descriptor)
            raise LockHeldError(holder) from None
        os.ftruncate(descriptor, 0)
        self.write_at(descriptor, memoryview(record.encode()), 0)
        return descriptor

    def release(self, path: Path, descriptor: int) -> None:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the next process has it open
            path.unlink(missing_ok=True)

    def start_of(self, pid: int) -> str:
        handle = self.kernel.OpenProcess(QUERY_LIMITED, False, pid)
        if not handle:
            return "?" if ctypes.get_last_error() == 5 else ""  # access denied, so it runs
        try:
            code, times = wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
            known = self.kernel.GetExitCodeProcess(wintypes.HANDLE(handle), ctypes.byref(code))
            if known and code.value != STILL_ACTIVE:
                return ""
            if not self.kernel.GetProcessTimes(
                wintypes.HANDLE(handle), *(ctypes.byref(time) for time in times)
            ):
                return "?"
            return f"{times[0].dwHighDateTime:08x}{times[0].dwLowDateTime:08x}"
        finally:
            self.kernel.CloseHandle(wintypes.HANDLE(handle))

    def processors(self) -> int:
        return os.cpu_count() or 1

    def memory(self) -> int:
        status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
        if not self.kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise ctypes.WinError(ctypes.get_last_error())
        return status.total

    def quote(self, word: str) -> str:
        """Quote for cmd and PowerShell. They share no quoting for quotes, nor one that prevents the
        expansion of variables and substitutions, so these characters become `_`."""
        if PLAIN.fullmatch(word):
            return word
        word = re.sub('[$`%"\u201c\u201d\u201e]', "_", word)
        ending = len(word) - len(word.rstrip("\\"))  # a backslash takes its meaning from a quote
        return f'"{word}{word[len(word) - ending :]}"'

    def call_soon(self, handler: Handler, seconds: float) -> None:
        signal.signal(signal.SIGBREAK, handler)
        timer = threading.Timer(seconds, _thread.interrupt_main, (signal.SIGBREAK,))
        timer.daemon = True
        timer.start()


def _address_of(data: memoryview) -> ctypes.Array:
    """Return the bytes for a C call; read-only ones are copied."""
    kind = ctypes.c_char * len(data)
    return kind.from_buffer_copy(data) if data.readonly else kind.from_buffer(data)
