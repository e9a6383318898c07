"""macOS: written from its manual pages, not yet run there."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

assert sys.platform == "darwin"  # elsewhere type checkers skip the rest

# below the assert: when types are checked for Windows, that module has no names
from adapterkit.core.system.posix import Posix, is_alive  # noqa: E402

# of <sys/fcntl.h>, <sys/stdio.h>
_FULLFSYNC, _PREALLOCATE, _ALLOCATEALL, _PEOFPOSMODE = 51, 42, 4, 3
_SWAP, _EXCL = 2, 4


class Darwin(Posix):
    longest_path = 1023

    def allocate(self, descriptor: int, size: int) -> None:
        """fstore_t: flags, mode, offset, length, bytes allocated."""
        store = ctypes.create_string_buffer(32)
        parts = (
            (ctypes.c_uint32, 0, _ALLOCATEALL), (ctypes.c_int32, 4, _PEOFPOSMODE),
            (ctypes.c_int64, 8, 0), (ctypes.c_int64, 16, size),
        )  # fmt: skip
        for kind, at, value in parts:
            kind.from_buffer(store, at).value = value
        fcntl.fcntl(descriptor, _PREALLOCATE, store.raw)

    def may_have_gpus(self) -> bool:
        return False

    def sync(self, descriptor: int) -> None:
        """Flush the disk's own cache too, which fsync does not; network file systems only have
        fsync."""
        try:
            fcntl.fcntl(descriptor, _FULLFSYNC)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
            os.fsync(descriptor)

    def rename_new(self, old: Path, new: Path) -> None:
        self._renamex(old, new, _EXCL)

    def exchange(self, one: Path, other: Path) -> None:
        self._renamex(one, other, _SWAP)

    def _renamex(self, old: Path, new: Path, how: int) -> None:
        self.call("renamex_np", os.fsencode(old), os.fsencode(new), ctypes.c_uint(how))

    def is_mount(self, path: Path) -> bool:
        return os.path.ismount(path)

    def start_of(self, pid: int) -> str:
        """Return boot and the second of the start, from ps and sysctl."""
        if not is_alive(pid):
            return ""
        boot = _output_of("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")
        start = _output_of("/bin/ps", "-o", "lstart=", "-p", str(pid))
        return f"{boot}:{start}".replace(" ", "_") if boot and start else "?"

    def processors(self) -> int:
        return os.cpu_count() or 1


def _output_of(*command: str) -> str:
    """Return the output of a system program; empty if it fails or is missing."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment)
    except OSError:
        return ""
    return done.stdout.decode("ascii", "replace").strip() if done.returncode == 0 else ""
