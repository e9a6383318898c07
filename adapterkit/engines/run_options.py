"""The keywords that every verb that writes has: where and how its plan runs."""

from dataclasses import dataclass

from adapterkit.options import Executor, StrPath
from adapterkit.plan import Progress


@dataclass(frozen=True)
class RunOptions:
    """The keywords that every writing verb has: where and how its plan runs.

    `hash` sha256 or none; `memory` bytes for tasks (5GB, 500MB, or a number; None: a quarter of the
    machine's); `engine` local, ray, or an `Executor`; `disk_limit` bytes on this machine's disk for
    an output on the Hub; `ray_address` of the cluster; `progress` is called with the bytes just
    done.
    """

    out: StrPath
    hash: str
    device: str
    memory: str | int | None
    engine: str | Executor
    resume: bool
    overwrite: bool
    dry_run: bool
    progress: Progress
    disk_limit: str | int | None = None
    ray_address: str | None = None
