"""Plan the transfers of a job between the Hub and this machine before a byte of weights moves:
files that the Hub already has, the inputs of each of the others, and the disk."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.output.inputs import Input, conversions_in, inputs_of
from adapterkit.bases.hub.scratch import BoundedFolder, ScratchFolder, ShardCache
from adapterkit.bases.hub.upload import CopiedFile
from adapterkit.core.checkpoint.disk import free_bytes
from adapterkit.core.errors import Refused, shown
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.core.tasks.handoff import HANDOFF_FOLDER, HandoffFactors

ORDINARY = 16 << 30  # bytes of disk that a job without a limit takes at least, if it can use them
RECORDS = (64 << 10, 800)  # bytes of journal and receipt, and those of each tensor


@dataclass(frozen=True)
class MadeFile:
    """One output file to make: the large Hub files that it reads, and the disk that it takes."""

    shard: OutputFile
    inputs: tuple[Input, ...]
    disk: int


@dataclass(frozen=True)
class Transfers:
    """The files that a job makes, in their order, and those that it copies."""

    made: tuple[MadeFile, ...]
    copied: tuple[CopiedFile, ...]
    sizes: dict[Input, int]  # of the inputs that are downloaded
    # bytes of what stays to the end: small files, handoffs, journal and receipt, converted adapters
    rest: int
    small: int  # bytes of the other files than weights
    converted: int = 0  # bytes that are downloaded for adapters that are converted first
    keep_outputs: bool = False  # outputs stay until all are done, to be checked together

    def without(self, done: Sequence[str]) -> "Transfers":
        """The transfers that remain after these files."""
        return replace(self, made=tuple(file for file in self.made if file.shard.file not in done))

    def last_uses(self) -> dict[Input, int]:
        """The index of the last file made that reads each input."""
        return {each: number for number, file in enumerate(self.made) for each in file.inputs}

    def least_disk(self) -> tuple[int, str]:
        """The least bytes of disk with which each file can be made, and the file that needs
        them."""
        last, present, most = self.last_uses(), set[Input](), (self.rest, "the small files")
        kept = 0
        for number, file in enumerate(self.made):
            present |= set(file.inputs)
            inputs = sum(self.sizes[each] for each in present)
            needed = (self.rest + kept + inputs + file.disk, file.shard.file)
            most = max(most, needed, key=lambda pair: pair[0])
            present = {each for each in present if last[each] > number}
            kept += file.shard.size if self.keep_outputs else 0
        return most

    def disk(self, limit: int | None) -> int:
        """Upper bound of the disk that the job takes, in bytes."""
        everything = self.rest + sum(self.sizes.values()) + sum(file.disk for file in self.made)
        if limit is None:
            # one file that is made, one that is downloaded, one that is sent
            largest = max(
                (sum(self.sizes[each] for each in file.inputs) + file.disk for file in self.made),
                default=0,
            )
            limit = max(self.least_disk()[0] + 2 * largest, ORDINARY)
        return min(limit, everything)

    def check(self, limit: int | None) -> None:
        """`Refused` if one of the files does not fit into the limit."""
        least, file = self.least_disk()
        reason = " for all outputs, which are checked before the upload" * self.keep_outputs
        check_limit(
            limit,
            least,
            f"{shown(file)} takes {least:,}{reason}",
            "the inputs of one file, the file, and files that stay to the end",
        )

    def totals(self, limit: int | None) -> dict[str, int]:
        """The sizes that a dry run prints."""
        return {
            "bytes_down": sum(self.sizes.values()) + self.converted,
            "bytes_up": self.small + sum(file.shard.size for file in self.made),
            "bytes_copied_on_hub": sum(file.size for file in self.copied),
            "disk_needed": self.disk(limit),
        }


def check_limit(limit: int | None, least: int, problem: str, parts: str) -> None:
    """`Refused` if a job takes at least so many bytes of disk, and the limit is lower; `parts`:
    what takes them."""
    if limit is not None and least > limit:
        raise Refused(
            f"{limit:,} bytes of disk, and {problem}",
            expected=f"at least {least:,} bytes: {parts}",
            where="--disk-limit",
            hint=f"give --disk-limit {math.ceil(least / 1e6)}MB or more, with HF_HOME on a "
            "disk that has them",
            code="AK108",
        )


def plan_transfers(plan: Plan, *, keep_outputs: bool, uncopied: Sequence[str] = ()) -> Transfers:
    """The transfers of a plan whose Hub folders are `ScratchFolder`s; `uncopied`: files to make
    here even if the Hub has them."""
    copied = {
        shard.file: file
        for shard in plan.shards
        if shard.file not in uncopied and (file := _copied_file(plan, shard)) is not None
    }
    made = [shard for shard in plan.shards if shard.file not in copied]
    made.sort(key=lambda shard: not shard.tasks)  # its steps may need what tasks hand on
    files, sizes = [], dict[Input, int]()
    for shard in made:
        inputs = [each for each in inputs_of(shard) if _disk(plan, each)]
        sizes |= {each: _disk(plan, each) for each in inputs}
        disk = shard.size << (shard.finalize is not None)  # twice where all tasks are waited for
        files.append(MadeFile(shard, tuple(inputs), disk))
    small = plan.totals()["bytes_written"] - sum(shard.layout.size for shard in plan.shards)
    tensors = sum(len(shard.layout.tensors) for shard in plan.shards)
    rest = small + _handoffs(plan) + RECORDS[0] + RECORDS[1] * tensors
    converted = conversions_in(plan)
    downloads = [maker.download_size for _, maker in converted]
    rest += sum(sum(folder.files().values()) for folder, _ in converted)
    rest += max(downloads, default=0)
    return Transfers(
        tuple(files), tuple(copied.values()), sizes, rest, small, sum(downloads), keep_outputs
    )


def _copied_file(plan: Plan, shard: OutputFile) -> CopiedFile | None:
    """The file on the Hub with the same bytes as the output, including the header."""
    if not shard.steps or not all(s.copied for s in shard.steps):
        return None
    sources = {(step.source.folder, step.source.file) for step in shard.steps}
    (number, name), *others = sources
    folder = plan.folders[number]
    if others or not isinstance(folder, ScratchFolder | HubFolder) or name not in folder.hashes:
        return None
    same_places = all(
        step.source.start == at for step, at in zip(shard.steps, shard.layout.starts, strict=True)
    )
    same_header = (
        plan.headers.get((number, name)) == hashlib.sha256(shard.layout.header).hexdigest()
    )
    if not (same_places and same_header and shard.size == folder.files()[name]):
        return None
    source = folder.source if isinstance(folder, ScratchFolder) else folder
    return CopiedFile(
        shard.file,
        shard.size,
        folder.hashes[name],
        source.hub_id.repo,
        source.commit,
        source.path_in_repo(name),
    )


def _disk(plan: Plan, which: Input) -> int:
    """Bytes of disk that a downloaded input takes."""
    folder = plan.folders[which[0]]
    return folder.disk(which[1]) if isinstance(folder, ScratchFolder) else 0


def _handoffs(plan: Plan) -> int:
    """The largest number of bytes that files hand on; they stay to the end."""
    factors = [
        math.prod(stored.shape)
        for shard in plan.shards
        for task in shard.tasks
        if isinstance(task, HandoffFactors)
        for stored in task.max_outputs
    ]
    handed_on = {
        spec
        for shard in plan.shards
        for step in shard.steps
        for edit in step.edits
        for spec in edit.reads
        if spec.folder == HANDOFF_FOLDER
    }
    return 4 * sum(factors) + sum(spec.nbytes for spec in handed_on)


def plan_bounded(plan: Plan, file: OutputFile, place: Path, limit: int | None) -> tuple[Plan, int]:
    """The plan of a collected file with a bounded folder for its base, and the bytes of disk that
    it takes. `Refused` if these exceed `limit`."""
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
        "files that stay to the end, the file of statistics, and the largest file of the base",
    )
    disk = disk if limit is None else min(most, limit)
    down = bytes_down((name for name in collection.reads if name in sizes), sizes, disk - own)
    if isinstance(folder, HubFolder):
        folder = BoundedFolder(folder, place, disk - own)
    moved = {"bytes_down": down, "bytes_up": totals["bytes_written"], "disk_needed": disk}
    placement = replace(plan.placement, totals={**plan.placement.totals, **moved})
    return replace(plan, folders=(folder,), placement=placement), disk


def bytes_down(names: Iterable[str], sizes: Mapping[str, int], capacity: int) -> int:
    """Bytes that are downloaded while these files are read in this order."""
    kept = ShardCache(sizes, capacity)
    return sum(sizes[name] for name in names if kept.read(name) is not None)
