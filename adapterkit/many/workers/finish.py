"""Assemble an output from the files of workers: journal, small files, receipt, one rename."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adapterkit.core.checkpoint.folder import FinishedFolder
from adapterkit.core.engine.execution import stage_of
from adapterkit.core.engine.placement import device_totals
from adapterkit.core.errors import Failed, Refused
from adapterkit.core.execute import FolderCheck, Push, check_free, run
from adapterkit.core.output.resume import state_of
from adapterkit.core.output.stage import Stage
from adapterkit.core.output.writer import part_name
from adapterkit.core.plan import OutputFile, Placement, Plan
from adapterkit.core.receipt import Receipt, read_receipt
from adapterkit.core.records import Json
from adapterkit.core.shared_options import RunOptions
from adapterkit.core.system import all_cores
from adapterkit.core.verify.file_checks import check_files
from adapterkit.many.workers.job_identity import WorkerJob, check_one_kind, job_failed, no_stage
from adapterkit.many.workers.ranges import accepts, join, tiling
from adapterkit.many.workers.stage import WorkerStage, adopt


def finish_workers(
    plan: Plan,
    job: WorkerJob,
    execution: RunOptions,
    missing: str,
    check: FolderCheck | None = None,
    push: Push | None = None,
    *,
    verify: bool = False,
) -> Receipt:
    """Assemble and publish the output of workers; return its receipt. `missing`: the command that
    makes missing files; `check` looks at the finished folder, `push` uploads it. With `verify` all
    hashes are checked before the folder gets its name."""
    job.check(plan)
    stage = stage_of(plan, Path(execution.out))
    worked, hashed = 0.0, execution.hash == "sha256"
    if state_of(stage, job.fingerprint, resume=True, overwrite=False) == "fresh":
        raise no_stage(stage.path)
    with stage:
        head = (stage.journal() or [{}])[0]
        workers = WorkerStage(stage.control, job.digest, accepts=accepts(plan, hashed=hashed))
        if workers.exists():
            head, worked = _adopt(plan, stage, workers, head, missing, hashed=hashed)
        elif head.get("ranks"):
            raise no_stage(workers.path)
    device = head.get("device", "cpu")
    if device != "cpu":  # of the workers: this machine may have none
        placement = Placement(device, device_totals(plan, all_cores()))
        plan = replace(plan, placement=placement)

    def looks_at(folder: Path) -> None:
        if check is not None:
            check(folder)
        if verify:
            out = FinishedFolder(folder)
            check_files(out, read_receipt(out))

    return run(
        plan,
        stage,
        _nothing_left,
        hash=execution.hash,
        resume=True,
        check=looks_at,
        push=push,
        progress=execution.progress,
        began=time.monotonic() - worked,
    )


def _adopt(
    plan: Plan, stage: Stage, workers: WorkerStage, head: Json, command: str, *, hashed: bool
) -> tuple[Json, float]:
    """Take over the workers' files. Returns the journal's new first entry, and the seconds that the
    slowest worker took. `Refused` if files are missing."""
    if reason := workers.failure():
        raise job_failed(reason, workers)
    files = {shard.file: shard for shard in plan.shards}
    names = [*files]
    markers = workers.markers(names)
    done = workers.parts()
    parts = {
        name: tiling(done.get(name, ()), shard.size)
        for name, shard in files.items()
        if name not in markers
    }
    missing = [name for name, ranges in parts.items() if not ranges]
    if missing:
        raise Refused(
            f"{len(missing)} of {len(names)} files are missing: {', '.join(missing)}",
            expected="all files of the plan",
            where=str(stage.out),
            hint=f"run the plan again, as one worker or as all\n{command}",
            code="AK610",
        )
    made = [part_name(name, *edges) for name, ranges in parts.items() for edges in ranges or ()]
    blocks = [b.name for shard in files.values() for b in shard.block_files()]
    check_one_kind([*markers.values(), *workers.markers([*made, *blocks]).values()], workers)
    check_free(
        max((b - a for some in parts.values() for a, b in (some or ())[1:]), default=0),
        workers.path,
    )
    for name, ranges in parts.items():
        shard = files[name]
        assert ranges is not None
        join(workers, shard, ranges, hashed=hashed)
    workers.leave()
    markers = workers.markers(names)
    if len(markers) < len(names):
        raise _gone(next(name for name in names if name not in markers))
    head = {key: value for key, value in head.items() if key != "ranks"}
    head["device"] = markers[names[0]]["device"]
    adopt(stage, workers, [head, *({"shard": entry["shard"]} for entry in markers.values())])
    return head, seconds_of(markers.values())


def seconds_of(markers: Iterable[Json]) -> float:
    """The seconds that the slowest worker took."""
    seconds = defaultdict[str, float](float)
    for entry in markers:
        seconds[entry["attempt"]] += entry["seconds"]
    return max(seconds.values(), default=0.0)


def _nothing_left(plan: Plan, shards: list[OutputFile], *_: object, **__: object) -> None:
    """The engine of a job whose files all exist."""
    if shards:
        raise _gone(shards[0].file)


def _gone(name: str) -> Failed:
    return Failed(
        "a file has disappeared",
        expected="the files of the workers",
        where=name,
        hint="make the plan again with --overwrite",
        code="AK610",
    )
