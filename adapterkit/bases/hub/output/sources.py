"""The files of a base on the Hub that are read one after another, on bounded disk: each comes when
it is read, and those that were read longest ago go where there is no room left."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.output.transfers import ORDINARY, check_limit
from adapterkit.bases.hub.scratch import ScratchFolder
from adapterkit.core.checkpoint.disk import free_bytes
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.interruptible import run_stoppable
from adapterkit.core.plan import OutputFile, Plan


class BoundedFolder(ScratchFolder):
    """A `ScratchFolder` whose files take `room` bytes together, or what the largest one takes."""

    def __init__(self, source: HubFolder, place: Path, room: int):
        super().__init__(source, place)
        self.room = room


class ShardCache:
    """Which of the files are here, by when they were read last; `sizes` in bytes."""

    def __init__(self, sizes: Mapping[str, int], room: int):
        self.sizes, self.room = sizes, room
        self._here: dict[str, None] = {}

    def read(self, name: str) -> list[str] | None:
        """Take a file in: those that go for it; None where it is here already."""
        is_here = name in self._here
        self._here.pop(name, None)
        gone = []
        if not is_here:
            used = sum(self.sizes[other] for other in self._here)
            for other in list(self._here):
                if used + self.sizes[name] <= self.room:
                    break
                used -= self.sizes[other]
                gone.append(other)
                del self._here[other]
        self._here[name] = None
        return None if is_here else gone


def bytes_down(names: Iterable[str], sizes: Mapping[str, int], room: int) -> int:
    """Bytes that are downloaded while these files are read in this order."""
    kept = ShardCache(sizes, room)
    return sum(sizes[name] for name in names if kept.read(name) is not None)


def plan_bounded(plan: Plan, file: OutputFile, place: Path, limit: int | None) -> tuple[Plan, int]:
    """The plan of a file that is collected, the files of its base on the Hub one after another; and
    the bytes of disk that it takes. `Refused` where these are more than `limit`."""
    totals, (folder,), collection = plan.totals(), plan.folders, file.collection
    assert collection is not None
    sizes = dict[str, int]()  # of what is downloaded
    if isinstance(folder, HubFolder):
        scratch = ScratchFolder(folder, place)
        names = {*collection.reads}
        sizes = {name: size for name in names if (size := scratch.disk(name))}
    own = totals["disk_needed"]
    least, most = own + max(sizes.values(), default=0), own + sum(sizes.values())
    disk, free = min(most, max(least, ORDINARY)), free_bytes(place)
    if limit is None and disk > free:
        limit = free // 10 * 9  # it takes what there is
    check_limit(
        limit,
        least,
        f"the job takes {least:,}",
        "what waits for its end, the file of statistics, and the largest file of the base",
    )
    disk = disk if limit is None else min(most, limit)
    down = bytes_down((name for name in collection.reads if name in sizes), sizes, disk - own)
    if isinstance(folder, HubFolder):
        folder = BoundedFolder(folder, place, disk - own)
    moved = {"bytes_down": down, "bytes_up": totals["bytes_written"], "disk_needed": disk}
    placement = replace(plan.placement, totals={**plan.placement.totals, **moved})
    return replace(plan, folders=(folder,), placement=placement), disk


class BoundedSources(Sources):
    """The `Sources` of a job that reads one `BoundedFolder`, by one thread; its files are removed
    at the end."""

    def __init__(self, folder: BoundedFolder):
        super().__init__((folder,), {})
        self.folder = folder
        sizes = {name: folder.disk(name) for name in folder.files()}
        self._kept = ShardCache(sizes, folder.room)
        shutil.rmtree(folder.place, ignore_errors=True)  # of a run that was killed

    def acquire(self, which: tuple[int, str]) -> int:
        _, name = which
        if self._kept.sizes[name]:
            gone = self._kept.read(name)
            for other in gone or ():
                self.forget((0, other))
                self.folder.drop(other)
            if gone is not None:
                run_stoppable(partial(self.folder.download, name))
        return super().acquire(which)

    def close(self) -> None:
        try:
            super().close()
        finally:
            shutil.rmtree(self.folder.place, ignore_errors=True)
