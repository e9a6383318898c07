"""The interface that each operating system implements."""

import contextlib
import errno
import os
import shlex
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

# the modes of opening a file; only "read", which is for inputs, follows links
Mode = Literal["read", "own", "create", "keep", "append", "touch"]
FLAGS: dict[Mode, int] = {
    "read": os.O_RDONLY,
    "own": os.O_RDONLY,  # a file of this package's, if it is still an ordinary one
    "create": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "keep": os.O_RDWR,
    "append": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "touch": os.O_WRONLY | os.O_CREAT,
}
ALL, MINE = 0o666, 0o600  # limited by the umask, as usual; or only for this user
Handler = Callable[[int, FrameType | None], object]


class LockHeldError(Exception):
    """Another process has the lock; `holder` is its record."""

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


class System(ABC):
    """One operating system. Calls that it lacks raise OSError with ENOSYS, or do nothing; see the
    table in `core/system/__init__.py`. Descriptors are binary, and child processes do not inherit
    them."""

    ending: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)  # signals that end a job
    signals: Sequence[signal.Signals] = ending  # every signal that this package handles

    # --- files ------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, path: Path, mode: Mode, permissions: int = ALL) -> int: ...

    @abstractmethod
    def open_unnamed(self, path: Path) -> int:
        """Open a new file that disappears with its descriptor, however the process ends."""

    @abstractmethod
    def read_at(self, descriptor: int, buffer: memoryview, position: int) -> int:
        """Read into the buffer and return the number of bytes, 0 at the end. Threads may share a
        descriptor."""

    @abstractmethod
    def write_at(self, descriptor: int, data: memoryview, position: int) -> int:
        """Write and return the number of bytes. Threads may share a descriptor."""

    def copy_range(
        self, source: int, target: int, count: int, start: int, position: int
    ) -> int:  # bytes
        """Copy between open files inside the kernel."""
        raise _missing()

    def allocate(self, descriptor: int, size: int) -> None:
        """Allocate blocks for `size` bytes of the file, never by writing them one by one."""
        raise _missing()

    def start_writeback(self, descriptor: int, position: int, length: int) -> None:
        """Start writing a range of the file to disk, without waiting for it."""
        raise _missing()

    def drop_cache(self, descriptor: int) -> None:
        """Make later reads of the file come from the disk."""
        raise _missing()

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes durable."""
        os.fsync(descriptor)

    @abstractmethod
    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""

    # --- names ------------------------------------------------------------------------------------

    @abstractmethod
    def replace(self, old: Path, new: Path) -> None:
        """Rename a file, also over another one, in one step."""

    @abstractmethod
    def rename_new(self, old: Path, new: Path) -> None:
        """Rename; `FileExistsError` if the new name exists."""

    def exchange(self, one: Path, other: Path) -> None:
        """Exchange two names in one step."""
        raise _missing()

    def replace_empty(self, old: Path, new: Path) -> None:
        """Rename a folder, also over an empty one."""
        os.rename(old, new)

    longest_path = 4095  # bytes
    path_limit = "paths that the system takes"

    def path_overflow(self, path: Path) -> int:
        """Return by how many characters, or bytes, a path is too long; at most 0 if it is not."""
        return len(os.fsencode(path)) - self.longest_path

    @abstractmethod
    def is_mount(self, path: Path) -> bool:
        """Return whether no rename can replace a folder because it is a mount point, bind mounts
        within one file system included."""

    def is_own(self, status: os.stat_result) -> bool:
        """Return whether a file belongs to this user or to root."""
        return False

    # --- processes --------------------------------------------------------------------------------

    @abstractmethod
    def hold(self, path: Path, record: str, may_run: Callable[[str], bool]) -> int:
        """Take a lock for this process, with a record of it, and return its descriptor;
        `LockHeldError` if another process has it. An unlocked file whose record names no process
        that `may_run` is taken over."""

    @abstractmethod
    def release(self, path: Path, descriptor: int) -> None:
        """Release a lock."""

    @abstractmethod
    def start_of(self, pid: int) -> str:
        """Return when a process began, to distinguish it from a later one with its number; "" for a
        dead one, "?" if the system hides it."""

    @abstractmethod
    def processors(self) -> int:
        """Return the number of processors that this process may use."""

    @abstractmethod
    def memory(self) -> int:
        """Return the bytes of the machine's memory."""

    def may_have_gpus(self) -> bool:
        """Return whether there may be GPUs that torch counts as CUDA devices."""
        return True

    def limit(self, size: int, seconds: int) -> None:
        """Limit this process to that many more bytes, and that many seconds of a processor."""
        return  # the default: nothing to limit

    def quote(self, word: str) -> str:
        """Return a word of a command, quoted for the system's shells."""
        return shlex.quote(word)

    # --- signals ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Block `signals` for threads that are started in the block."""
        yield

    @abstractmethod
    def call_soon(self, handler: Handler, seconds: float) -> None:
        """Call a handler of signals in the main thread, after that many seconds."""


def _missing() -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
