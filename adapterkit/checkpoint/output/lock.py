"""One process at a time in a folder, also after crashes and restarts, and without a working flock.

(Lustre, GPFS and some NFS accept a flock that other machines do not see.)
"""

import contextlib
import fcntl
import os
import re
import socket
from pathlib import Path

from adapterkit.checkpoint import system
from adapterkit.errors import Refused

LOCK = "lock"


class Lock:
    """The file `lock` in a folder. It names the process that holds it, which keeps it flocked.

    The file appears with its content, by a hard link, so a crash cannot leave an empty one. It is
    stale when nobody has it flocked and the process that it names is gone; then the next one takes
    its place. A process on another host counts as running.

    `filelock.SoftFileLock` (tried: 4.3.1) does not serve: it takes a process in another PID
    namespace for one of another host, so the lock of a container that was killed refuses its
    successor for ever; it creates the file first and writes the owner then, so a crash in between
    leaves an empty file that no later process reclaims; a torn one is refused until it was watched
    for two seconds.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._descriptor = -1

    def acquire(self) -> None:
        """`Refused` while another process holds the lock."""
        own = self.path.with_name(f"{LOCK}.{os.getpid()}")
        own.unlink(missing_ok=True)
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, process_record().encode())
            _flock(descriptor)
            while not self._publish(own):
                self._remove_stale()
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            own.unlink(missing_ok=True)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _publish(self, own: Path) -> bool:
        """Give our file the lock's name; False where there is a lock."""
        try:
            _link(own, self.path)
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
            if not _flock(descriptor) or may_run(holder):
                raise Refused(
                    f"another process is at work there ({holder.rpartition(' ')[0]})",
                    expected="one process for each output",
                    where=str(self.path.parent),
                    hint=f"wait for it; if there is none, remove the file {self.path.name} "
                    "in that folder",
                )
            # only the process that has a file flocked removes it, and only under this name
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self.path.unlink()
        finally:
            os.close(descriptor)


def _link(file: Path, name: Path) -> None:
    """Give the file a name; `FileExistsError` where there is a file of that name."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        system.rename_new(file, name)


def _flock(descriptor: int) -> bool:
    """False where another process has the file flocked; True also on a file system without
    flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def process_record() -> str:
    """This process: its host, number and start."""
    return f"{socket.gethostname()} {os.getpid()} {_start_time(os.getpid())}"


def may_run(holder: str) -> bool:
    """Whether the process of a record may be running, one on another host always; after a restart
    its number may be another's."""
    host, _, rest = holder.partition(" ")
    pid, _, start = rest.partition(" ")
    if not re.fullmatch(r"[0-9]{1,10}", pid) or not start:
        return False  # torn by a power cut
    return host != socket.gethostname() or _start_time(int(pid)) == start


def _start_time(pid: int) -> str:
    """Boot and clock tick at which a process began; "" for a dead one, "?" where the system hides
    it."""
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
