"""The differences between operating systems: one interface, implemented for each.

| promise | Linux | macOS | Windows |
|---|---|---|---|
| `replace` | atomic | atomic | atomic, of files that nobody has open |
| `rename_new` | renameat2 | renamex_np | rename, which never replaces |
| `exchange` | renameat2 | renamex_np | none: two renames in its place |
| `replace_empty` | atomic | atomic | the empty folder goes first |
| `sync` | fsync | F_FULLFSYNC, past the disk's cache | FlushFileBuffers |
| `sync_folder` | fsync | fsync | none: NTFS journals names |
| `hold` | flock and the holder's record | the same | a locked byte behind the content |
| `start_of` | boot and tick | boot and time of start | time of start |
| `allocate` | fallocate | F_PREALLOCATE | none |
| `copy_range` | in the kernel, as a reflink | none | none |
| `start_writeback` | sync_file_range | none | none |
| `limit` | setrlimit | none | none |
| `is_own` | by the owner's number | the same | none: always False |
| `open_unnamed` | unlinked at once | unlinked at once | deleted when it is closed |

"None" is OSError with ENOSYS where the caller has another way, else nothing is done.
"""

import sys

from adapterkit.core.system.interface import LockHeldError, System

__all__ = ["LockHeldError", "all_cores", "cores", "quarter_of_memory", "system"]

MOST_CORES = 8  # used by default


def _chosen() -> System:
    if sys.platform == "win32":
        from adapterkit.core.system.windows import Windows

        return Windows()
    if sys.platform == "darwin":
        from adapterkit.core.system.darwin import Darwin

        return Darwin()
    from adapterkit.core.system.linux import Linux

    return Linux()


system = _chosen()


def all_cores() -> int:
    """Return the number of processors that this process may use."""
    return system.processors()


def cores() -> int:
    """Return the number of processors used by default: more would wait for the disk, or for
    memory."""
    return min(MOST_CORES, system.processors())


def quarter_of_memory() -> int:
    """Return a quarter of the machine's memory in bytes."""
    return system.memory() // 4
