"""Carry out a pipeline: steps in a file, all planned before the first one runs, each done once.

A step that reads the output of an earlier one is planned from that one's plan, if its headers are
known. The receipt of each output names the pipeline and its inputs, so that a step is skipped while
neither it nor its inputs have changed.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.commands import command
from adapterkit.core.engine.execution import check_push_of, pinned_inputs, pushed, stage_of
from adapterkit.core.engine.planned_folder import planned_folder
from adapterkit.core.errors import AdapterkitError, Interrupted, Problems, Refused, listed, shown
from adapterkit.core.execute import check_place
from adapterkit.core.options import Progress
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt
from adapterkit.core.records import Json
from adapterkit.core.verb import WritingVerb
from adapterkit.many.workflows.earlier_output import (
    Older,
    can_go_on,
    inputs_digest,
    is_pushed,
    older_output,
)
from adapterkit.many.workflows.workflow_file import (
    Location,
    StepSource,
    WorkflowStep,
    read_pipeline,
)

STATES = ("done", "done before", "planned", "refused")
Row = Json  # facts about a job, its state, and details of that state
FINISHED: Row = {"state": "done before", "notes": []}


@dataclass(frozen=True)
class Mode:
    """How an output is written; `finished` means that it exists."""

    finished: bool = False
    sends: bool = False  # nothing else is left to do
    resume: bool = False
    overwrite: bool = False


@dataclass
class StepRun:
    """One run of a step: its plan, the mode of its output, and the result."""

    step: WorkflowStep
    mode: Mode | None = None  # None: known when its inputs are there
    damage: str = ""  # the error of the existing output
    plan: Plan | None = None
    outcome: Row = field(default_factory=dict)

    @property
    def row(self) -> Row:
        step = self.step
        names = {"step": step.number, "verb": step.name, "inputs": list(step.inputs)}
        return names | {"out": step.out} | self.outcome

    @property
    def is_finished(self) -> bool:
        return self.mode is not None and self.mode.finished


def run_pipeline(
    file: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    device: str | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    allow_push: bool = False,
    progress: Progress = lambda done: None,
    tell: Callable[[Row], object] = lambda row: None,
) -> Json:
    """Carry out the steps of a TOML file in order. Returns the report: `totals`, the number of
    steps in each state, and `steps`.

    States: done, done before, planned, refused. Nothing runs if planning refuses a step, and no
    step after one that is refused or fails later. An output is replaced if this pipeline wrote it;
    with `overwrite`, any older output of adapterkit. `device`: for steps that name none; `engine`:
    for all. `allow_push`: steps may upload; the file alone cannot allow it, because it may come
    from a stranger. `tell` is called with each step's row of the report. Raises `Refused` for a
    file that is no pipeline, and `Interrupted`; then the same call resumes.
    """
    path, steps = Path(file), read_pipeline(Path(file))
    if not (allow_push or dry_run):
        _check_local(steps, path)
    pipeline = _Workflow(path, device, engine, overwrite, progress)
    runs = pipeline.plan(steps)
    stopped = dry_run or any(run.outcome["state"] == "refused" for run in runs)
    for number, run in enumerate(runs, 1):
        if not stopped and not run.is_finished:
            try:
                run.outcome = pipeline.carry_out(run)
            except (KeyboardInterrupt, Interrupted):
                raise Interrupted(
                    f"stopped in step {number} of {len(runs)}; those before it are done",
                    where=path.name,
                    hint="run the same command again",
                ) from None
            except AdapterkitError as error:
                run.outcome, stopped = refusal(error), True
        run.plan = None
        tell(run.row)
    return report("steps", [run.row for run in runs])


def _check_local(steps: Sequence[WorkflowStep], file: Path) -> None:
    """`Refused` if steps upload their outputs."""
    problems = Problems(where=shown(file.name), code="AK114")
    for step in steps:
        if step.sent_to:
            problems.add(
                f"step {step.number} ({step.name}) uploads its output to {listed(step.sent_to)}",
                "steps without uploads, or your permission",
                f"if you want that\n{command('adapterkit run', file, allow_push=True)}",
            )
    problems.raise_all()


@dataclass(frozen=True)
class _Workflow:
    file: Path
    device: str | None
    engine: str | None
    overwrite: bool
    progress: Progress

    @property
    def id(self) -> str:
        """An id that distinguishes this file from others of its name."""
        return hashlib.sha256(os.fsencode(self.file.resolve())).hexdigest()[:16]

    def plan(self, steps: list[WorkflowStep]) -> list[StepRun]:
        """Plan all steps as far as possible without data; refused ones have a reason. An existing
        output that a later step reads is checked as by `verify`, and made again if damaged."""
        damages: dict[int, str] = {}  # of the outputs that were checked
        while True:
            runs = self._plan_all(steps, damages)
            read = {n for run in runs if not run.is_finished for n in run.step.needs.values()}
            unchecked = [n for n in sorted(read - damages.keys()) if runs[n - 1].is_finished]
            if not unchecked:
                return runs
            for number in unchecked:
                older = older_output(steps[number - 1].place)
                damages[number] = older.damage() if older else ""

    def _plan_all(self, steps: list[WorkflowStep], damages: Mapping[int, str]) -> list[StepRun]:
        runs: list[StepRun] = []
        for step in steps:
            run = StepRun(step, damage=damages.get(step.number, ""))
            runs.append(run)
            try:
                self._plan(run, runs)
            except AdapterkitError as error:
                run.outcome = refusal(error)
        return runs

    def _plan(self, run: StepRun, runs: list[StepRun]) -> None:
        step = run.step
        pending = {
            source: runs[number - 1]
            for source, number in step.needs.items()
            if not runs[number - 1].is_finished
        }
        planned = {
            source: other.plan
            and planned_folder(other.step.place.text, other.plan, source.place.text)
            for source, other in pending.items()
        }
        unknown = [source for source, folder in planned.items() if folder is None]
        folders = {source: folder for source, folder in planned.items() if folder is not None}
        verb = self._verb(step, folders)
        try:
            run.plan = None if unknown else _dry_run(verb)
        except AdapterkitError:
            if not any(folder.asked for folder in folders.values()):
                raise
        if any(folder.asked for folder in folders.values()):
            run.plan = None
        if run.plan is None:
            numbers = sorted({other.step.number for other in pending.values()})
            steps = " and ".join(f"step {number}" for number in numbers)
            run.outcome = {"state": "planned", "notes": [f"planned when {steps} is done"]}
            return
        run.mode = self._mode(run, run.plan, changes=bool(pending))
        run.outcome = FINISHED if run.mode.finished else outcome(run.plan)
        if run.damage:
            run.outcome["notes"] += [f"its output is damaged, and made again: {run.damage}"]
        if run.mode.sends:
            run.outcome = {"state": "planned", "notes": [sent(str(step.push))]}

    def _verb(self, step: WorkflowStep, planned: Mapping[StepSource, Overlay]) -> WritingVerb:
        """The step's verb, its arguments checked; some of its sources are planned."""

        def value(source: StepSource) -> Any:
            there = planned.get(source, source.place.text)
            return there if source.weight is None else (there, source.weight)

        arguments: dict[str, Any] = step.with_sources(value) | {"out": step.place.out}
        if self.device is not None:
            arguments = {"device": self.device} | arguments
        if self.engine is not None:
            arguments["engine"] = self.engine
        # an older output is looked at here
        return step.verb(**arguments, overwrite=True)

    def _mode(self, run: StepRun, plan: Plan, *, changes: bool) -> Mode:
        """The mode of the output; `Refused` if this pipeline did not write what is there.
        `changes`: earlier steps will change the inputs."""
        step = run.step
        older = older_output(step.place)
        pushed = None if step.push is None else older_output(Location("", step.push))
        resume = can_go_on(step.place, plan, self.overwrite)
        stays = older is not None and not (changes or resume or run.damage) and older.is_of(plan)
        if older is not None and stays and (step.push is None or is_pushed(older, pushed)):
            return Mode(finished=True)
        if pushed is not None:
            self._check_own(pushed, f"hf://{step.push}")
        if stays:
            return Mode(sends=True, resume=True, overwrite=pushed is not None)
        if older is not None:
            self._check_own(older, step.place.out)
        overwrite = self.overwrite or older is not None or pushed is not None
        if not resume and not step.place.repository:  # the Hub is asked when it is carried out
            stage, own = stage_of(plan, Path(step.place.path)), older is not None
            check_place(stage, plan, resume=False, overwrite=self.overwrite or own)
        return Mode(resume=resume, overwrite=overwrite)

    def _check_own(self, older: Older, where: str) -> None:
        """`Refused` for an older output that this pipeline may not replace."""
        if not self.overwrite and older.pipeline.get("id") != self.id:
            raise Refused(
                "the output exists, and is damaged, or this pipeline did not write it from these "
                "inputs",
                expected="a new output, or an older one of this pipeline",
                where=where,
                hint="choose another out, or give --overwrite",
                code="AK111",
            )

    def carry_out(self, run: StepRun) -> Row:
        """Write the step's output, unless it exists by now."""
        step, plan, mode = run.step, run.plan, run.mode
        verb = self._verb(step, {})
        if plan is None or mode is None or step.needs:  # from the outputs that exist by now
            plan = _dry_run(verb)
            mode = self._mode(run, plan, changes=False)
        if mode.finished:
            return FINISHED
        verb = replace(verb, resume=mode.resume, overwrite=mode.overwrite, progress=self.progress)
        with pinned_inputs(verb):
            if step.place.repository:  # a resumed one reads its inputs at their first commits
                plan = verb.plan()
            entry = {"file": shown(self.file.name), "id": self.id, "inputs": inputs_digest(plan)}
            plan = replace(plan, decisions=plan.decided() | {"pipeline": entry})
            check_push_of(plan, verb, step.push)
            done = verb.carry_out(plan, push=False)
            return outcome(pushed(done, verb, step.push) if isinstance(done, Receipt) else done)


def _dry_run(verb: WritingVerb) -> Plan:
    """The plan of a verb, without writing anything."""
    plan = replace(verb, dry_run=True).run()
    assert isinstance(plan, Plan)
    return plan


# -- the report on several jobs, each of which is done or refused on its own -----------------------


def report(name: str, rows: Sequence[Row]) -> Json:
    """The rows under this name, and how many of them are in each state."""
    totals = {state: sum(row["state"] == state for row in rows) for state in STATES}
    return {"totals": totals, name: list(rows)}


def outcome(result: Receipt | Plan) -> Row:
    """The state of a job that was carried out, or of one that is planned."""
    if not isinstance(result, Receipt):
        texts = {"warnings": list(result.warnings), "notes": list(result.notes)}
        return {"state": "planned", "totals": result.totals(), **texts}
    notes, pushed = list(result.data["notes"]), result.data.get("pushed")
    if pushed is not None:
        notes += [sent(pushed["repo"])] * result.finished_before + pushed["notes"]
    state = "done before" if result.finished_before and pushed is None else "done"
    return {"state": state, "warnings": result.data.get("warnings", []), "notes": notes}


def sent(repo: str) -> str:
    """The note on a step of which only the push was left."""
    return f"finished before: only sent to {repo}"


def refusal(error: AdapterkitError) -> Row:
    return {"state": "refused", "message": str(error), "code": error.code}
