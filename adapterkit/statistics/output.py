"""The file of statistics appears whole or not at all: the work folder beside it, resuming,
replacing an older one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.checkpoint.stage import Stage, check_name
from adapterkit.checkpoint.storage import free_bytes, storage_errors, sync_folder
from adapterkit.errors import AdapterkitError, Failed, Interrupted, Refused, Unrecoverable, shown
from adapterkit.execute import check_same_job
from adapterkit.receipt import digest, public_recipe
from adapterkit.tasks.statistics import metadata_of

SUFFIX = ".safetensors"
Fill = Callable[[Path, Path, bool], None]  # (file to write, work folder, whether to go on there)


def check_output(out: Path, base: Folder) -> None:
    """`Refused` where no file of statistics can be: another suffix, a folder, a link, in the folder
    of the model, whose loader would take it for weights."""
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
        raise refused("a folder of that name", "a new file")
    there = next(path for path in final.parents if os.path.exists(path))
    if not there.is_dir():
        raise refused(f"{shown(there.name)} is a file, and no folder to make one in", "a new file")
    root = base.root.resolve() if isinstance(base, LocalFolder) and not base.single else None
    if root is not None and root in final.parents:
        raise refused(f"the output lies inside the model {base.name}", "a file apart from it")


def check_space(out: Path, needed: int) -> None:
    """`Refused` where the disk has too little room."""
    free = free_bytes(out.resolve().parent)
    if needed > free:
        raise Refused(
            f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            where=str(out.resolve().parent),
            hint="free some space, choose an --out on another disk, or fewer --targets",
        )


def write(
    out: Path, recipe: dict[str, Any], fill: Fill, *, needed: int, resume: bool, overwrite: bool
) -> bool:
    """Let `fill` write the file, and give it its name; False where it was finished before.

    Raises `Refused` before anything is written, where a file or an interrupted run is in the way,
    or the disk has too little room; and `Failed` or `Interrupted` after, when `resume=True` goes on
    with what is done.
    """
    stage = Stage(out)
    _state(stage, recipe, resume=resume, overwrite=overwrite)  # refuses before anything is made
    try:
        with stage:
            state, replaces = _state(stage, recipe, resume=resume, overwrite=overwrite)
            if state == "finished":
                stage.discard()
                return False
            if state == "fresh":
                stage.forget()
            check_space(out, needed - _size(stage.path))  # of which some is there already
            stage.begin()
            if state == "fresh":
                stage.note(
                    {
                        "fingerprint": fingerprint(recipe),
                        "recipe": recipe,
                        "overwrite": replaces,
                    }
                )
            _fill(stage, fill, resume=state == "resume")
            _publish(stage, replaces)
            return True
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished layers are kept",
            where=str(out),
            hint="run the same command with --resume",
        ) from None


def _size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fingerprint(recipe: dict[str, Any]) -> str:
    return digest(public_recipe(recipe))


def _state(
    stage: Stage, recipe: dict[str, Any], *, resume: bool, overwrite: bool
) -> tuple[str, bool]:
    """'fresh', 'resume' or 'finished', and whether an older file is replaced."""
    head = next(iter(stage.journal()), None)
    out = stage.out
    older = _written(out)
    if resume and older is not None:
        if older["fingerprint"] == fingerprint(recipe):
            return "finished", False
        if head is None and not overwrite:
            raise Refused(
                "finished statistics of another job",
                expected="the job that --resume goes on with",
                where=str(out),
                hint="choose another --out, or give --overwrite",
            )
    replaces = overwrite or bool(resume and head is not None and head.get("overwrite"))
    if out.exists():
        if not replaces:
            raise Refused(
                "a file of that name",
                expected="a new file",
                where=str(out),
                hint="choose another --out, or give --overwrite to replace older statistics",
            )
        if older is None:
            raise Refused(
                "a file that adapterkit stats did not write",
                expected="older statistics (--overwrite replaces the file)",
                where=str(out),
                hint="remove the file yourself, or choose another --out",
            )
    if head is not None and resume:
        check_same_job(stage, recipe)
        return "resume", replaces
    if head is not None and not overwrite:
        raise Refused(
            "an interrupted run",
            expected="no unfinished output of that name",
            where=str(stage.control),
            hint="give --resume to continue it, or --overwrite to begin again",
        )
    return "fresh", replaces


def _written(out: Path) -> dict[str, Any] | None:
    """What a file of statistics says of itself; None where it is none that adapterkit wrote."""
    if not out.is_file():
        return None
    try:
        metadata = metadata_of(open_checkpoint(LocalFolder(out)))
    except AdapterkitError:
        return None
    return metadata if "fingerprint" in metadata else None


def _fill(stage: Stage, fill: Fill, *, resume: bool) -> None:
    """Write the file in the stage; a failure that no resumption can continue leaves nothing."""
    try:
        fill(stage.path / stage.out.name, stage.path / "work", resume)
    except AdapterkitError as error:
        if isinstance(error, Unrecoverable) or not (resume or isinstance(error, Failed)):
            stage.forget()
            stage.discard()
        raise


def _publish(stage: Stage, replaces: bool) -> None:
    final = stage.out.resolve()
    with storage_errors(final):
        if final.exists() and not replaces:  # it appeared meanwhile
            raise Refused(
                "a file of that name",
                expected="a new file",
                where=str(stage.out),
                hint="move it away, then run again with --resume",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage.path / stage.out.name, final)
        sync_folder(final.parent)
    stage.discard()
