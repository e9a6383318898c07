"""What each operating system has to do."""

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

# how a file is opened; all but "read", which is for inputs, follow no link
Mode = Literal["read", "own", "create", "keep", "append", "touch"]
FLAGS: dict[Mode, int] = {
    "read": os.O_RDONLY,
    "own": os.O_RDONLY,  # what this package wrote, if it is still an ordinary file
    "create": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "keep": os.O_RDWR,
    "append": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "touch": os.O_WRONLY | os.O_CREAT,
}
ALL, MINE = 0o666, 0o600  # the umask decides, as for any file; or nobody else
Handler = Callable[[int, FrameType | None], object]


class LockHeldError(Exception):
    """Another process holds a lock; `holder` is its record."""

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


class System(ABC):
    """One operating system. Calls that it lacks raise OSError, with ENOSYS, or do nothing; see the
    table above. Descriptors are binary, and processes that are started do not get them."""

    ending: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)  # signals that end a job
    signals: Sequence[signal.Signals] = ending  # all that this package has handlers for

    # --- files ------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, path: Path, mode: Mode, permissions: int = ALL) -> int: ...

    @abstractmethod
    def open_unnamed(self, path: Path) -> int:
        """A new file of which nothing is left when its descriptor is closed, however the process
        ends."""

    @abstractmethod
    def read_at(self, descriptor: int, buffer: memoryview, position: int) -> int:
        """Read into the buffer; how many bytes, 0 at the end. Threads may share a descriptor."""

    @abstractmethod
    def write_at(self, descriptor: int, data: memoryview, position: int) -> int:
        """Write; how many bytes. Threads may share a descriptor."""

    def copy_range(
        self, source: int, target: int, count: int, start: int, position: int
    ) -> int:  # bytes
        """Copy between open files inside the kernel."""
        raise _missing()

    def allocate(self, descriptor: int, size: int) -> None:
        """Give the file blocks for `size` bytes, never by writing them one by one."""
        raise _missing()

    def start_writeback(self, descriptor: int, position: int, length: int) -> None:
        """Begin to write a range of the file to disk, without waiting for it."""
        raise _missing()

    def drop_cache(self, descriptor: int) -> None:
        """Let later reads of the file come from the disk."""
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
        """Rename; `FileExistsError` where there is something of the new name."""

    def exchange(self, one: Path, other: Path) -> None:
        """Each gets the other's name, in one step."""
        raise _missing()

    def replace_empty(self, old: Path, new: Path) -> None:
        """Rename a folder, also over an empty one."""
        os.rename(old, new)

    longest_path = 4095  # bytes
    room_for_paths = "paths that the system takes"

    def excess(self, path: Path) -> int:
        """By how many letters, or bytes, a path is too long; below 1 it is not."""
        return len(os.fsencode(path)) - self.longest_path

    @abstractmethod
    def is_mount(self, path: Path) -> bool:
        """Whether no rename can replace a folder: a mount point, bind mounts within one file system
        included."""

    # --- processes --------------------------------------------------------------------------------

    @abstractmethod
    def hold(self, path: Path, record: str, may_run: Callable[[str], bool]) -> int:
        """The descriptor of a lock that this process now holds, with a record of it;
        `LockHeldError` while another one does. One that nobody has locked, and whose record is of
        no process that `may_run`, is taken over."""

    @abstractmethod
    def release(self, path: Path, descriptor: int) -> None:
        """Give a lock back."""

    @abstractmethod
    def start_of(self, pid: int) -> str:
        """When a process began, so that another one of its number has another; "" of a dead one,
        "?" where the system hides it."""

    @abstractmethod
    def processors(self) -> int:
        """How many this process may use."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of the machine's memory."""

    def may_have_gpus(self) -> bool:
        """Whether there may be GPUs that torch counts as CUDA devices."""
        return True

    def limit(self, size: int, seconds: int) -> None:
        """This process gets at most so many bytes more, and so many seconds of a processor."""
        return  # where it cannot be said

    def quote(self, word: str) -> str:
        """A word of a command, as the system's shells take it."""
        return shlex.quote(word)

    # --- signals ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """No signal of `signals` comes to threads that are started in the block."""
        yield

    @abstractmethod
    def call_soon(self, handler: Handler, seconds: float) -> None:
        """Call a handler of signals in the main thread, after so long."""


def _missing() -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
