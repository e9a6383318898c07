"""One process at a time in a folder, also after crashes and restarts, and without a working flock.

(Lustre, GPFS and some NFS accept a flock that other machines do not see.)
"""

import contextlib
import os
import re
import socket
from datetime import datetime
from pathlib import Path

from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.errors import Refused, shown
from adapterkit.core.system import LockHeldError, system

LOCK = "lock"


class Lock:
    """The file `lock` in a folder. It names the process that owns it, which keeps it locked.

    It is stale when nobody has it locked and the named process is gone; then the next process takes
    it over. A process on another host counts as running.

    `filelock.SoftFileLock` (tried: 4.3.1) does not suffice. It takes a process in another PID
    namespace for one on another host, so the lock of a killed container refuses its successor for
    ever. It creates the file before it writes the owner, so a crash in between leaves an empty file
    that no later process reclaims. A torn file is refused until it was watched for two seconds."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock; `Refused` while another process has it."""
        try:
            self._descriptor = system.hold(self.path, process_record(), may_run)
        except LockHeldError as held:
            raise self._refusal(held.holder) from None

    def check(self) -> None:
        """Read the lock; `Refused` while another process has it."""
        holder = ""
        if self._descriptor < 0:
            with contextlib.suppress(OSError, ValueError):
                holder = read_small(self.path, 1000).decode("utf-8", "replace")
        if may_run(holder):
            raise self._refusal(holder)

    def _refusal(self, holder: str) -> Refused:
        host, pid, *_ = *holder.split(" "), "?"
        which = f"process {pid}" if host == socket.gethostname() else f"process {pid} on {host}"
        with contextlib.suppress(OSError):  # it has just finished
            began = datetime.fromtimestamp(self.path.stat().st_mtime)
            which += f" since {began.isoformat(' ', 'seconds')}"
        return Refused(
            f"another run writes this output now ({shown(which)})",
            expected="one process for each output",
            where=str(self.path.parent),
            hint=f"wait for it; if there is none, remove the file {self.path.name} in that folder",
            code="AK602",
        )

    def release(self) -> None:
        if self._descriptor >= 0:
            system.release(self.path, self._descriptor)
            self._descriptor = -1


def process_record() -> str:
    """Return the record of this process: its host, number and start."""
    return f"{socket.gethostname()} {os.getpid()} {system.start_of(os.getpid())}"


def may_run(holder: str) -> bool:
    """Return whether the process of a record may be running. One on another host always may. After
    a restart another process may have its number."""
    host, _, rest = holder.partition(" ")
    pid, _, start = rest.partition(" ")
    if not re.fullmatch(r"[0-9]{1,10}", pid) or not start:
        return False  # torn by a power cut
    return host != socket.gethostname() or system.start_of(int(pid)) == start
