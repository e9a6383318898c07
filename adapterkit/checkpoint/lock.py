"""One process at a time in a folder, also after crashes and restarts, and where flock lies (Lustre, GPFS, some NFS)."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from adapterkit.checkpoint import system
from adapterkit.errors import Refused

LOCK = "lock"


class Lock:
    """The file `lock` in a folder. It says which process has it, and that process keeps it flocked.

    The file appears with its content, by a hard link, so a crash cannot leave an empty one. It is stale when nobody has it flocked
    and the process that it names is gone; then the next one takes its place. A process on another host counts as at work.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._descriptor = -1

    def take(self) -> None:
        """Take the lock; `Refused` while another process has it."""
        mine = self.path.with_name(f"{LOCK}.{os.getpid()}")
        mine.unlink(missing_ok=True)
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, _self().encode())
            _flock(descriptor)
            while not self._appears(mine):
                self._remove_stale()
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            mine.unlink(missing_ok=True)
        self._descriptor = descriptor

    def drop(self) -> None:
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _appears(self, mine: Path) -> bool:
        """Give our file the lock's name; False where there is one."""
        try:
            _name(mine, self.path)
        except FileExistsError:
            return False
        return True

    def _remove_stale(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace")
            if not _flock(descriptor) or _at_work(holder):
                raise Refused(
                    f"another process is at work there ({holder.rpartition(' ')[0]})",
                    expected="one process for each output",
                    where=str(self.path.parent),
                    hint=f"wait for it; if there is none, remove the file {self.path.name} in that folder",
                )
            # only who has a file flocked removes it, and only if it still bears the name
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self.path.unlink()
        finally:
            os.close(descriptor)


def _name(file: Path, name: Path) -> None:
    """Give the file a name, unless it is taken."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        system.rename_new(file, name)


def _flock(descriptor: int) -> bool:
    """False where another process has the file flocked; true also where the file system knows no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _self() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def _at_work(holder: str) -> bool:
    """Whether the process that a lock names may be running: its number alone may have gone to another after a restart."""
    host, _, rest = holder.partition(" ")
    pid, _, started = rest.partition(" ")
    if not pid.isdigit() or not started:
        return False  # torn by a power cut
    return host != socket.gethostname() or _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process began (boot and clock tick); "" for one that is gone or dead, "?" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "?" if _alive(pid) else ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
