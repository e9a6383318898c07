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
    """The file `lock` in a folder. It names the process that holds it, which keeps it locked.

    It is stale when nobody has it locked and the process that it names is gone; then the next one
    takes its place. A process on another host counts as running.

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
        try:
            self._descriptor = system.hold(self.path, process_record(), may_run)
        except LockHeldError as held:
            raise self._refusal(held.holder) from None

    def check(self) -> None:
        """`Refused` while another process holds the lock, which this only reads."""
        holder = ""
        if self._descriptor < 0:
            with contextlib.suppress(OSError, ValueError):
                holder = read_small(self.path, 1000).decode("utf-8", "replace")
        if may_run(holder):
            raise self._refusal(holder)

    def _refusal(self, holder: str) -> Refused:
        host, pid, *_ = *holder.split(" "), "?"
        which = f"process {pid}" if host == socket.gethostname() else f"process {pid} on {host}"
        with contextlib.suppress(OSError):  # it has just ended
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
    """This process: its host, number and start."""
    return f"{socket.gethostname()} {os.getpid()} {system.start_of(os.getpid())}"


def may_run(holder: str) -> bool:
    """Whether the process of a record may be running, one on another host always; after a restart
    its number may be another's."""
    host, _, rest = holder.partition(" ")
    pid, _, start = rest.partition(" ")
    if not re.fullmatch(r"[0-9]{1,10}", pid) or not start:
        return False  # torn by a power cut
    return host != socket.gethostname() or system.start_of(int(pid)) == start
