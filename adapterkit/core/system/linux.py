"""Linux: also calls that Python lacks, through the C library."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path

assert sys.platform != "win32"  # there type checkers skip the rest
assert sys.platform != "darwin"

# below the asserts: when types are checked for Windows, that module has no names
from adapterkit.core.system.posix import Posix, is_alive  # noqa: E402

# of NVIDIA's drivers, also on a board and under Windows, and of AMD's
_GPUS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")
_AT_FDCWD, _NOREPLACE, _EXCHANGE, _WRITE = -100, 1, 2, 2


class Linux(Posix):
    def allocate(self, descriptor: int, size: int) -> None:
        """Allocate without writing blocks one by one, unlike posix_fallocate."""
        self.call("fallocate", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))

    def start_writeback(self, descriptor: int, position: int, length: int) -> None:
        at, count = ctypes.c_int64(position), ctypes.c_int64(length)
        self.call("sync_file_range", descriptor, at, count, _WRITE)

    def rename_new(self, old: Path, new: Path) -> None:
        self._renameat2(old, new, _NOREPLACE)

    def exchange(self, one: Path, other: Path) -> None:
        self._renameat2(one, other, _EXCHANGE)

    def _renameat2(self, old: Path, new: Path, how: int) -> None:
        names = os.fsencode(old), os.fsencode(new)
        self.call("renameat2", _AT_FDCWD, names[0], _AT_FDCWD, names[1], how)

    def copy_range(self, source: int, target: int, count: int, start: int, position: int) -> int:
        return os.copy_file_range(source, target, count, start, position)

    def drop_cache(self, descriptor: int) -> None:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def is_mount(self, path: Path) -> bool:
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

    def may_have_gpus(self) -> bool:
        return any(next(Path("/dev").glob(name), None) for name in _GPUS)

    def start_of(self, pid: int) -> str:
        """Boot and clock tick."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        except OSError:
            return "?" if is_alive(pid) else ""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return ""
        fields = stat.rpartition(b")")[2].decode("ascii").split()
        return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"

    def limit(self, size: int, seconds: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
            size += int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            self.call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent

    def processors(self) -> int:
        return len(os.sched_getaffinity(0))
