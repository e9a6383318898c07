"""macOS's half of `checkpoint.system` on Linux, without what macOS lacks in `os`; calls of its own
C library fail as if this file system had none of them."""

import contextlib
import os
import sys

LACKED = ("copy_file_range", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "fdatasync",
          "memfd_create", "sched_setaffinity", "setresuid")  # fmt: skip


def pretend() -> None:
    """Make this process one of macOS, as far as the package is concerned; there is no way back."""
    for name in LACKED:
        with contextlib.suppress(AttributeError):
            delattr(os, name)
    sys.platform = "darwin"
    from adapterkit.core.system import system
    from adapterkit.core.system.darwin import Darwin

    # modules hold this very object
    system.__dict__.clear()
    system.__class__ = Darwin
    system.__init__()
