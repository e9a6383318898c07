"""Identify the job of several processes: the facts they must agree on, and their plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.core.engine.execution import stage_of
from adapterkit.core.errors import Refused
from adapterkit.core.execute import check_space
from adapterkit.core.output.resume import difference, state_of
from adapterkit.core.plan import Placement, Plan
from adapterkit.core.receipt import digest, public_recipe
from adapterkit.core.records import Json
from adapterkit.core.shared_options import RunOptions
from adapterkit.many.workers.ranges import part_bytes
from adapterkit.many.workers.stage import WorkerStage, prepare


@dataclass(frozen=True)
class WorkerJob:
    """The facts that all processes must agree on: the public recipe and the inputs' identity."""

    recipe: Json
    inputs: dict[str, list[int]]  # "number name" -> size and times of local files
    hash: str

    @classmethod
    def of(cls, plan: Plan, hash: str) -> "WorkerJob":
        """The job of a plan, in the form that is read from a file."""
        inputs = {f"{n} {name}": list(known) for (n, name), known in plan.identities.items()}
        return cls(public_recipe(plan.recipe()), inputs, hash)

    @property
    def fingerprint(self) -> str:
        return digest(self.recipe)

    @property
    def digest(self) -> str:
        return digest(vars(self))

    def check(self, plan: Plan) -> None:
        """`Refused` if this process's plan is a different job, naming the first difference."""
        now = WorkerJob.of(plan, self.hash)
        if now.recipe != self.recipe:
            raise Refused(
                f"the job differs when it is planned again: {difference(self.recipe, now.recipe)}",
                expected="the inputs, options and version of the plan file",
                where="the plan file",
                hint="use the same adapterkit everywhere, or make the plan again",
                code="AK603",
            )
        if now.inputs != self.inputs:
            names = [*self.inputs, *now.inputs]
            name = next(n for n in names if self.inputs.get(n) != now.inputs.get(n))
            raise Refused(
                f"{name.partition(' ')[2]} is not the file that was planned with",
                expected="inputs that stay as they are",
                where=f"input {name.partition(' ')[0]}",
                hint="make the plan again with --overwrite",
                code="AK603",
            )


def prepare_workers(plan: Plan, job: WorkerJob, how: RunOptions) -> Plan:
    """Check a job, make its stage, and leave the files to workers. Returns the plan, with the disk
    space that workers need."""
    plan = replace(plan, placement=Placement(temporary_disk=part_bytes(plan.shards)))
    stage = stage_of(plan, Path(how.out))
    options = {"resume": False, "overwrite": how.overwrite}
    state_of(stage, job.fingerprint, **options)  # refuses before anything is made
    with stage:
        state_of(stage, job.fingerprint, **options)
        check_space(plan, plan.shards, stage)
        head = {
            "fingerprint": job.fingerprint,
            "recipe": plan.recipe(),
            "overwrite": stage.replaces,
            "ranks": True,
        }
        prepare(stage, job.digest, [shard.file for shard in plan.shards], head)
    return plan


def check_one_kind(entries: Sequence[Json], stage: WorkerStage) -> None:
    """`Refused` if files were, or would be, made on CPU and on CUDA, or with several torch."""
    kinds: dict[str, list[str]] = {}
    for entry in entries:
        kind = f"{entry['device']}, torch {entry['torch']}"
        kinds.setdefault(kind, []).append(
            entry["shard"]["file"] if "shard" in entry else "this run"
        )
    if len(kinds) > 1:
        texts = [f"{kind} ({len(files)}, e.g. {files[0]})" for kind, files in kinds.items()]
        raise Refused(
            f"files were made on {' and on '.join(texts)}",
            expected="one kind of device, one version of torch, and as many threads where they are "
            "named (--workers), because others round differently",
            where=str(stage.marks),
            hint="run with the same ones; or remove the markers NAME.json of the fewer, and run "
            "again",
            code="AK603",
        )


def job_failed(reason: str, stage: WorkerStage) -> Refused:
    """The refusal of a job that failed in one of its workers."""
    return Refused(
        f"the job failed: {reason}",
        expected="inputs that stay as they are, and results that fit",
        where=str(stage.marks),
        hint="make the plan again with --overwrite",
        code="AK603",
    )


def no_stage(path: Path) -> Refused:
    """The refusal of a plan file without its stage."""
    return Refused(
        "no run of this plan was found",
        expected="the folder that --plan made, or the finished output",
        where=str(path.parent),
        hint="make the plan again: the same command with --plan",
        code="AK603",
    )
