"""Execute a verb's plan with the engine that it names, in the output folder, on the Hub, or not at
all (a dry run)."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapterkit.core.checkpoint.folder import Folder, LocalFolder, original
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.engine.device import is_cpu
from adapterkit.core.engine.planned_folder import conversion_of
from adapterkit.core.errors import Refused, shown
from adapterkit.core.execute import FolderCheck, Push, check_place, output_names, run
from adapterkit.core.options import parse_size
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import RECEIPT, Stage, check_name, receipt_name_of
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt, fingerprint_of
from adapterkit.core.registry import load
from adapterkit.core.shared_options import RunOptions
from adapterkit.doors import ENGINES, HUB


def pinned_inputs(how: RunOptions) -> AbstractContextManager[object]:
    """Keep the inputs of a job that writes to the Hub at the commits of its first run, from its
    plan to its end. Nested blocks do nothing."""
    if not is_on_hub(how.out):
        return nullcontext()
    return load(HUB["pinned inputs"])(how.out, resume=how.resume)


def as_it_runs(plan: Plan, call: RunOptions) -> Plan:
    """Return the plan of a verb's call with its memory budget, and notes on inputs that are
    converted first."""
    memory = parse_size(call.memory) if call.memory else None
    made = ((folder, conversion_of(folder)) for folder in plan.folders)
    notes = [note for folder, one in made if one for note in one.plan.notes_of(folder.name)]
    return replace(plan, memory=memory, notes=(*plan.notes, *notes), call=call)


def execute(
    plan: Plan, how: RunOptions, check: FolderCheck | None = None, push: str | None = None
) -> Receipt | Plan:
    """Run a plan; with `dry_run` only check whether it could start, and return it. `push` is the
    repository to which the finished folder is sent. Raises `Refused` before anything is written,
    `Failed` after."""
    check_out(plan, how)
    check_push_of(plan, how, push)
    if is_on_hub(how.out):
        from adapterkit.core.engine.placement import place

        plan, device = place(plan, how.device)
        done = load(HUB["run"])(plan, replace(how, device=device), check)
        return with_verified(done, check) if isinstance(done, Receipt) else done
    if how.dry_run:
        if plan.is_file or not how.overwrite:
            stage = stage_of(plan, Path(how.out))
            check_place(stage, plan, resume=how.resume, overwrite=how.overwrite)
        if is_cpu(how.device):
            return plan
        from adapterkit.core.engine.placement import place  # not for the CPU: it imports an engine

        return place(plan, how.device)[0]
    sent: Push | None = None
    if push is not None:
        sent = partial(load(HUB["send"]), repo=push, overwrite=how.overwrite)
    return with_verified(load(ENGINES[how.engine])(plan, how, check, sent), check)


def check_out(plan: Plan, how: RunOptions) -> None:
    """Refuse an output whose place does not allow it."""
    if is_on_hub(how.out):
        return
    if how.disk_limit is not None:
        raise Refused(
            "--disk-limit is given with an output on this machine",
            expected="an output on the Hub: --out hf://org/name",
            where="options",
            hint="remove --disk-limit",
            code="AK102",
        )
    check_name(Path(how.out), output_names(plan))
    check_output_apart(Path(how.out), plan.folders, is_file=plan.is_file)


def with_verified(receipt: Receipt, check: FolderCheck | None) -> Receipt:
    """Return the receipt with the findings of the check of a merge's rows."""
    if found := getattr(check, "result", None):
        receipt.data["verified"] = found
    return receipt


def check_push_of(plan: Plan, how: RunOptions, repository: str | None) -> None:
    """Refuse an output that could not be pushed there."""
    if repository is None:  # the recipe of a large plan is slow
        return
    receipt = receipt_name_of(Path(how.out).name) if plan.is_file else RECEIPT
    names, job = output_names(plan, receipt), fingerprint_of(plan.recipe())
    load(HUB["check push"])(
        repository, names, plan.folders, receipt, overwrite=how.overwrite, job=job
    )


def pushed(receipt: Receipt, how: RunOptions, repository: str | None) -> Receipt:
    """Send a finished output and return its receipt."""
    if repository is not None:
        receipt.data["pushed"] = load(HUB["send"])(
            Path(receipt.out), repository, overwrite=how.overwrite
        )
    return receipt


def stage_of(plan: Plan, out: Path) -> Stage:
    """Return the stage in which the output of a plan is built on this machine."""
    if plan.is_file:
        from adapterkit.core.output.file_output import FileOutput

        return Stage(FileOutput(out, plan.files))
    return Stage(FolderOutput(out))


def run_here(plan: Plan, how: RunOptions, check: FolderCheck | None, push: Push | None) -> Receipt:
    """Run the plan on this machine (the engine `local`)."""
    from adapterkit.core.engine.local import local
    from adapterkit.core.engine.placement import place

    plan, device = place(plan, how.device)
    return run(
        plan,
        stage_of(plan, Path(how.out)),
        local(device),
        hash=how.hash,
        resume=how.resume,
        overwrite=how.overwrite,
        check=check,
        push=push,
        progress=how.progress,
    )


def check_output_apart(out: Path, folders: Iterable[Folder], *, is_file: bool = False) -> None:
    """Refuse an output that is an input, is inside or around one, is a link to one, or cannot be a
    folder."""
    final, problem, expected = out.resolve(), "", "a folder to make"
    places = final.parents if is_file else (final, *final.parents)
    there = next(path for path in places if os.path.exists(path))
    if out.is_symlink():
        problem, expected = "the output is a link", "a new file" if is_file else "a new folder"
    elif there == final and not there.is_dir():
        problem = "a file of this name exists"
    elif not there.is_dir():
        problem = f"{shown(there.name)} is a file, so no folder can be made in it"
    if problem:
        hint = "choose another --out"
        raise Refused(problem, expected=expected, where=str(out), hint=hint, code="AK601")
    for folder in map(original, folders):
        if not isinstance(folder, LocalFolder):
            continue
        root = (folder.root / folder.single if folder.single else folder.root).resolve()
        relations = {
            "is": final == root,
            "is inside": root in final.parents,
            "contains": final in root.parents,
        }
        relation = next((name for name, holds in relations.items() if holds), None)
        if relation is not None:
            raise Refused(
                f"the output {shown(str(out))} {relation} the input {folder.label}",
                expected="an output apart from the inputs",
                where="--out",
                hint="choose another --out",
                code="AK601",
            )
