"""Statistics that several processes make: the executors of `stats` by plan file.

All run the model over all batches, as the data of a layer come from the layer before it; what they
share are the sums (`rank_ledger.py`).
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterkit.checkpoint.output.rank_stage import RankStage, adopt
from adapterkit.checkpoint.output.stage import Stage
from adapterkit.checkpoint.reader import Sources
from adapterkit.engines.device import arithmetic
from adapterkit.engines.ranks import rank as ranks
from adapterkit.engines.ranks.finish import RankFinish, seconds_of
from adapterkit.engines.ranks.job_identity import Preparation, check_one_kind, no_stage, spoiled
from adapterkit.engines.ranks.rank import Marks, Outcome, Pulse, Rank
from adapterkit.errors import Failed, Refused, listed
from adapterkit.options import Progress
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt
from adapterkit.run_options import RunOptions
from adapterkit.statistics import output
from adapterkit.statistics.collect import Layers, run
from adapterkit.statistics.file import Results
from adapterkit.statistics.job import CollectionJob
from adapterkit.statistics.model.activations import ActivationStore
from adapterkit.statistics.model.stored_model import StoredModel
from adapterkit.statistics.output import FileHere
from adapterkit.statistics.plan import Collection, check_unchanged, device_of
from adapterkit.statistics.rank_ledger import (
    FOLDER,
    RankLedger,
    SumsShare,
    accepts,
    names_of,
    path_of,
)
from adapterkit.statistics.sums_files import SumsFile

Collect = Callable[[Path, bool], Results]  # (work folder, whether to go on there)
Write = Callable[..., Receipt]  # (collect, began, resume, overwrite): writes the output


class _FileStage(Stage):
    """The stage of the file of statistics of a plan."""

    def __init__(self, out: Path, plan: Plan):
        super().__init__(out)
        self._recipe = plan.recipe()

    def state(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        options = {"resume": resume, "overwrite": overwrite}
        state, self.replaces = output.state_of(FileHere(self.out), self._recipe, **options)
        return state


class StatisticsPreparation(Preparation):
    """`Preparation` of `stats`."""

    def _stage(self, plan: Plan, out: Path) -> Stage:
        return _FileStage(out, plan)

    def _check_space(self, plan: Plan, stage: Stage) -> None:
        output.check_space(stage, plan.totals()["disk_needed"])

    def _files(self, plan: Plan) -> list[str]:
        return [path_of(name) for name in Collection.of(plan).parts]


@dataclass
class StatisticsRank(Rank):
    """`Rank` of `stats`: it has no share of its own, but takes what no other one is at."""

    def make(self, plan: Plan, execution: RunOptions) -> Plan:
        self.job.check(plan)
        if self.dry_run:
            self.outcome = Outcome(
                self.rank, self.ranks, [path_of(name) for name in Collection.of(plan).parts]
            )
            return plan
        taken: list[str] = []
        outcome = self.outcome = Outcome(self.rank, self.ranks, taken, made=taken)
        device = device_of(self.device or execution.device)
        if self.workers is not None:
            torch.set_num_threads(self.workers)

        def make_files(stage: RankStage) -> None:
            _SumsRun(plan, stage, outcome, device, execution.progress).make_files()

        self._at_work(_FileStage(Path(execution.out), plan), make_files, accepts)
        return plan


class _SumsRun:
    """One rank's run."""

    def __init__(
        self,
        plan: Plan,
        stage: RankStage,
        outcome: Outcome,
        device: torch.device,
        progress: Progress,
    ):
        self.plan, self.stage, self.outcome = plan, stage, outcome
        self.device, self.progress = device, progress
        self.marks = Marks(stage, outcome, arithmetic(device))
        self.share = SumsShare(
            stage, self.marks, Collection.of(plan).parts, lambda: check_unchanged(plan)
        )

    def make_files(self) -> None:
        """Let the batches through the model until nothing is left for this rank. `Refused` where
        the job is spoiled or gone."""
        self.marks.check(entry["shard"]["file"] for entry in self.stage.journal())
        expected = dict(self.plan.identities)
        with (
            Pulse(self.stage, {}, lambda done: None) as pulse,
            Sources(self.plan.folders, expected) as sources,
        ):
            job = job_of(self.plan, sources, self.device)
            while True:
                self.marks.check_spoiled()
                todo = [*self.share.todo()]
                if self.share.others_are_at(todo):
                    self.outcome.left = [*map(path_of, todo)]
                    return
                if self.share.has_free():
                    self._pass(job, pulse)
                else:
                    time.sleep(ranks.POLL)

    def _pass(self, job: CollectionJob, pulse: Pulse) -> None:
        """Let the batches through once; `Failed` where that will never do."""
        layers, todo = Layers(self.progress), [*self.share.todo()]

        def progress(done: int, total: int) -> None:
            pulse(0)
            layers(done, total)

        name = f"activations.{self.stage.attempt}.part"  # ranks' files are apart
        with closing(ActivationStore(self.stage.path / FOLDER, self.plan.budget, name)) as room:
            run(job, RankLedger(job, self.share), room, progress)
        # others may have made what was to do, before the pass or meanwhile
        if todo and not self.share.passed_by and [*self.share.todo()] == todo:
            raise Failed(
                f"the model does not come to {listed(todo)}, as for another rank",
                expected="a model that runs the same on all machines",
                where=str(self.stage.path),
                hint="run without --plan",
            )


def job_of(plan: Plan, sources: Sources, device: torch.device) -> CollectionJob:
    """What is to be collected by a plan."""
    collection = Collection.of(plan)
    stored, options = StoredModel(collection.base, sources, device), collection.options
    return CollectionJob(stored, options.request, collection.batches, options.whole)


class StatisticsFinish(RankFinish):
    """`RankFinish` of `stats`: the output of the sums that the ranks have made."""

    def finish(self, plan: Plan, execution: RunOptions, check: Any = None) -> Receipt:
        self.job.check(plan)
        if self.verify:
            raise Refused(
                "--verify does not apply to statistics",
                expected="an output whose receipt has hashes",
                where="options",
                hint="remove --verify",
            )
        stage = _FileStage(Path(execution.out), plan)
        worked = 0.0
        if stage.state(self.job.fingerprint, resume=True, overwrite=False) == "fresh":
            raise no_stage(stage.path)
        with stage:
            head = (stage.journal() or [{}])[0]
            found = RankStage(stage.control, self.job.digest, accepts=accepts)
            if found.exists():
                head, worked = self._take_over(plan, stage, found, head)
            elif head.get("ranks"):
                raise no_stage(found.path)
        names = head.get("files") if head else []  # finished before
        if names is None:
            raise no_stage(stage.path)

        def collect(work: Path, goes_on: bool) -> Results:
            with Sources(plan.folders, {}) as sources:
                job = job_of(plan, sources, torch.device("cpu"))
            return job.results(work, [SumsFile.read(work, name) for name in names])

        began = time.monotonic() - worked
        return check(collect, began=began, resume=True, overwrite=False)

    def _take_over(
        self, plan: Plan, stage: Stage, ranks: RankStage, head: dict[str, Any]
    ) -> tuple[dict[str, Any], float]:
        """Take over what the ranks made; the journal's only entry from now on, and the seconds
        that the slowest of them took. `Refused` where files are missing."""
        if reason := ranks.spoiled():
            raise spoiled(reason, ranks)
        parts = Collection.of(plan).parts
        names = names_of(ranks, parts) or parts
        markers = ranks.markers(map(path_of, names))
        missing = [name for name in names if path_of(name) not in markers]
        if missing:
            raise Refused(
                f"{len(missing)} of {len(names)} files are not there: {', '.join(missing)}",
                expected="the sums of all layers",
                where=str(ranks.path),
                hint=f"run `{self.command}` again, as one rank or as all",
            )
        check_one_kind([*markers.values()], ranks)
        head = {key: value for key, value in head.items() if key != "ranks"} | {"files": [*names]}
        adopt(stage, ranks, [head])
        return head, seconds_of(markers.values())
