"""The file of statistics appears whole or not at all: the work folder beside it, resuming,
replacing an older one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from adapterkit.checkpoint.disk import free_bytes, storage_errors, sync_folder
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.output.stage import Stage, check_name
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.engines.execution import check_disk_limit
from adapterkit.engines.hub.stage import work_folder
from adapterkit.errors import (
    AdapterkitError,
    Damaged,
    Failed,
    Interrupted,
    Refused,
    Unrecoverable,
    shown,
)
from adapterkit.execute import check_alone, check_same_job
from adapterkit.hub.destination import check_apart, parse_output
from adapterkit.hub.errors import quiet_library
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import StrPath, parse_size
from adapterkit.plan import Plan
from adapterkit.receipt import fingerprint_of
from adapterkit.statistics.hub_file import FileOnHub, on_hub
from adapterkit.tasks.statistics import metadata_of

SUFFIX = ".safetensors"
Fill = Callable[[Path, Path, bool], None]  # (file to write, work folder, whether to go on there)


class StatisticsTarget(Protocol):
    """Where the file of statistics goes: on this machine, or on the Hub (`hub_file.py`)."""

    @property
    def out(self) -> Path | str: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def made(self) -> Path:
        """The file, finished, before it has its name."""
        ...

    @property
    def older(self) -> Folder | None:
        """What has the name already."""
        ...

    def publish(self, *, replaces: bool) -> tuple[str | None, dict[str, str]]:
        """Give the file its name, and leave nothing else; its sha256 where that is known, and what
        the receipt has of its commit."""
        ...


class FileHere:
    """A `StatisticsTarget` on this machine."""

    def __init__(self, out: Path):
        self.out, self.stage = out, Stage(out)
        self.made = self.stage.path / out.name

    @property
    def older(self) -> Folder | None:
        return LocalFolder(self.out) if self.out.exists() else None

    def publish(self, *, replaces: bool) -> tuple[None, dict[str, str]]:
        final = self.out.resolve()
        with storage_errors(final):
            if final.exists() and not replaces:  # it appeared meanwhile
                raise Refused(
                    "a file of this name exists",
                    expected="a new file",
                    where=str(self.out),
                    hint="move it away, then run again with --resume",
                )
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.made, final)
            sync_folder(final.parent)
        self.stage.discard()
        return None, {}


def placed(plan: Plan, out: StrPath, limit: str | int | None) -> Plan:
    """The plan of a file there. `limit`: of the disk that an output on the Hub takes; `Refused` for
    another, or too small a one."""
    check_disk_limit(out, limit)
    if not is_on_hub(out):
        return plan
    hub_id = parse_output(os.fspath(out), file=True)
    return on_hub(plan, hub_id, parse_size(limit) if limit else None)


@contextmanager
def open_target(out: StrPath, base: Folder) -> Iterator[StatisticsTarget]:
    """Where the file goes; `Refused` for an account of the Hub that may not write there."""
    if not is_on_hub(out):
        yield FileHere(Path(out))
        return
    with quiet_library():
        yield FileOnHub(parse_output(os.fspath(out), file=True), base)


def check_output(out: StrPath, base: Folder) -> None:
    """`Refused` where no file of statistics can be: another suffix, a folder, a link, in the folder
    of the model, whose loader would take it for weights."""
    if is_on_hub(out):
        hub_id = parse_output(os.fspath(out), file=True)
        check_name(work_folder(hub_id))
        check_apart(hub_id.parent, (base,))
    else:
        _check_path(Path(out), base)


def check_place(plan: Plan, out: StrPath, base: Folder, *, resume: bool, overwrite: bool) -> None:
    """`Refused` where the file could not be written there, as the job itself would be."""
    if is_on_hub(out) or not overwrite:
        with open_target(out, base) as target:
            state_of(target, plan.recipe(), resume=resume, overwrite=overwrite)


def _check_path(out: Path, base: Folder) -> None:
    refused = lambda problem, expected: Refused(
        problem, expected=expected, where=str(out), hint="choose another --out"
    )
    check_name(out)
    final = out.resolve()
    if out.suffix != SUFFIX:
        raise refused(f"a file of type {shown(out.suffix) or 'unknown'}", f"a name with {SUFFIX}")
    if out.is_symlink():
        raise refused("the output is a link", "a new file")
    if out.exists() and not out.is_file():
        raise refused("a folder of this name exists", "a new file")
    there = next(path for path in final.parents if os.path.exists(path))
    if not there.is_dir():
        raise refused(f"{shown(there.name)} is a file, and no folder to make one in", "a new file")
    root = base.root.resolve() if isinstance(base, LocalFolder) and not base.single else None
    if root is not None and root in final.parents:
        raise refused(f"the output lies inside the model {base.name}", "a file apart from it")


def check_space(stage: Stage, needed: int) -> None:
    """`Refused` where the disk has too little room."""
    place = stage.out.resolve().parent
    free = free_bytes(place)
    if needed > free:
        raise Refused(
            f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            where=str(place),
            hint="free some space, choose an --out on another disk, or fewer --targets",
        )


@dataclass(frozen=True)
class Written:
    """The file of statistics, finished."""

    metadata: dict[str, Any]
    tensors: int
    size: int
    sha256: str | None  # where it is known
    pushed: dict[str, str] = field(default_factory=dict)  # its commit on the Hub
    is_new: bool = False

    @classmethod
    def of(cls, file: Folder) -> "Written":
        stats, [(name, size)] = open_checkpoint(file), file.files().items()
        return cls(metadata_of(stats), len(stats.tensors), size, file.hashes.get(name))


def write(
    target: StatisticsTarget,
    recipe: dict[str, Any],
    fill: Fill,
    *,
    needed: int,
    resume: bool,
    overwrite: bool,
) -> Written:
    """Let `fill` write the file, and give it its name, unless it was finished before.

    Raises `Refused` before anything is written, where a file or an interrupted run is in the way,
    or the disk has too little room; and `Failed` or `Interrupted` after, when `resume=True` goes on
    with what is done.
    """
    stage = target.stage
    state_of(target, recipe, resume=resume, overwrite=overwrite)  # refuses before anything is made
    try:
        with stage:
            state, replaces = state_of(target, recipe, resume=resume, overwrite=overwrite)
            older = target.older
            if state == "finished" and older is not None:
                stage.discard()
                return Written.of(older)
            if state == "fresh":
                stage.forget()
            else:
                check_alone(stage)
            is_made = target.made.is_file()  # by the run that is resumed
            if not is_made:
                check_space(stage, needed - _size(stage.path))  # of which some is there already
            stage.begin()
            if state == "fresh":
                job = {
                    "fingerprint": fingerprint_of(recipe),
                    "recipe": recipe,
                    "overwrite": replaces,
                }
                stage.note(job | stage.head())
            if not is_made:
                _fill(target, fill, resume=state == "resume")
            written = Written.of(LocalFolder(target.made))
            sha256, pushed = target.publish(replaces=replaces)
            return replace(written, sha256=sha256, pushed=pushed, is_new=True)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished layers are kept",
            where=str(target.out),
            hint="run the same command with --resume",
        ) from None


def _size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def state_of(
    target: StatisticsTarget, recipe: dict[str, Any], *, resume: bool, overwrite: bool
) -> tuple[str, bool]:
    """'fresh', 'resume' or 'finished', and whether an older file is replaced."""
    stage, there = target.stage, target.older
    head = next(iter(stage.journal()), None)
    older = None if there is None else _metadata(there)
    if resume and older is not None:
        if older["fingerprint"] == fingerprint_of(recipe):
            return "finished", False
        if head is None and not overwrite:
            raise Refused(
                "these are finished statistics of another job",
                expected="the job that --resume goes on with",
                where=str(target.out),
                hint="choose another --out, or give --overwrite",
            )
    replaces = overwrite or bool(resume and head is not None and head.get("overwrite"))
    if there is not None:
        if not replaces:
            raise Refused(
                "a file of this name exists",
                expected="a new file",
                where=str(target.out),
                hint="choose another --out, or give --overwrite to replace older statistics",
            )
        if older is None:
            raise Refused(
                "this is a file that adapterkit stats did not write",
                expected="older statistics (--overwrite replaces the file)",
                where=str(target.out),
                hint="remove the file yourself, or choose another --out",
            )
    if head is not None and resume:
        check_same_job(stage, recipe)
        return "resume", replaces
    if head is not None and not overwrite:
        raise Refused(
            "an earlier run to this --out was interrupted",
            expected="an output that no other run has begun",
            where=str(stage.control),
            hint="give --resume to continue it, or --overwrite to begin again",
        )
    return "fresh", replaces


def _metadata(file: Folder) -> dict[str, Any] | None:
    """What a file of statistics says of itself; None where it is none that adapterkit wrote."""
    try:
        metadata = metadata_of(open_checkpoint(file))
    except (Refused, Damaged):
        return None
    return metadata if "fingerprint" in metadata else None


def _fill(target: StatisticsTarget, fill: Fill, *, resume: bool) -> None:
    """Write the file in the stage; a failure that no resumption can continue leaves nothing."""
    stage = target.stage
    try:
        fill(target.made, stage.path / "work", resume)
    except AdapterkitError as error:
        if isinstance(error, Unrecoverable) or not (resume or isinstance(error, Failed)):
            stage.forget()
            stage.discard()
        raise
