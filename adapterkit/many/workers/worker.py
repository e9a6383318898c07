"""One of several processes that write an output: its share of the files, and its messages.

Every worker plans again from the headers. It writes its share, the longest files first, then files
of others that nobody has started or whose worker has died. There is no coordinator: two processes
that make one file write the same bytes, and the last rename wins (`many/workers/stage.py`).
"""

import contextlib
import hashlib
import platform
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.core.engine.device import arithmetic, own_gpu, pick_device
from adapterkit.core.engine.execution import stage_of
from adapterkit.core.engine.interruptible import POLL_INTERVAL, Running, signals_deferred
from adapterkit.core.engine.local import local
from adapterkit.core.engine.placement import place
from adapterkit.core.errors import (
    AdapterkitError,
    Failed,
    Interrupted,
    Refused,
    Unrecoverable,
    Waiting,
)
from adapterkit.core.lazy import torch
from adapterkit.core.options import Progress, expect
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.resume import state_of
from adapterkit.core.output.stage import Stage
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.core.shared_options import WAIT, RunOptions
from adapterkit.many.workers.job_identity import WorkerJob, check_one_kind, job_failed, no_stage
from adapterkit.many.workers.ranges import accepts, tiling, units
from adapterkit.many.workers.stage import WorkerStage, has_ended

HEARTBEAT = 2.0  # seconds after which a worker says again that it lives
POLL = 1.0  # seconds between looks at others' progress
STALLED = 90.0  # seconds without a word after which a worker on another machine counts as gone


def assigned(sizes: Iterable[tuple[str, int]], worker_count: int) -> list[list[str]]:
    """The files of each worker: the longest first, each to the worker with the least so far."""
    shares: list[list[str]] = [[] for _ in range(worker_count)]
    loads = [0] * worker_count
    for name, size in sorted(sizes, key=lambda pair: (-pair[1], pair[0])):
        worker = loads.index(min(loads))
        shares[worker].append(name)
        loads[worker] += size
    return shares


@dataclass
class Outcome:
    """A worker's result: its own files, those of others that it made, those still written."""

    worker: int
    worker_count: int
    share: list[str]
    made: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    finished: bool = False  # the output, by another process


def make_share(
    plan: Plan,
    job: WorkerJob,
    how: RunOptions,
    worker: int,
    worker_count: int,
    *,
    device: str | None = None,
    workers: int | None = None,
    wait: float = WAIT,
    dry_run: bool = False,
) -> Outcome:
    """Make files of a plan as one worker, until none is left for it."""
    job.check(plan)
    plan, device = place(plan, device or how.device, own_gpu())
    made = {unit.name: unit for unit in units(plan.shards, worker_count, pick_device(device))}
    # the last worker makes the file from all collected parts
    sizes = [(name, unit.size) for name, unit in made.items() if not unit.collection or unit.range]
    outcome = Outcome(worker, worker_count, assigned(sizes, worker_count)[worker])
    if dry_run:
        return outcome
    whole = stage_of(plan, Path(how.out))
    of_plan = accepts(plan, hashed=how.hash == "sha256")
    stage = WorkerStage(whole.control, job.digest, worker, accepts=of_plan)
    if not stage.exists() and _is_ended(whole, job):
        outcome.finished = True
        return outcome
    try:
        _WorkerRun(plan, made, stage, outcome, device, workers, how).make_files(wait)
    except Unrecoverable as error:
        with contextlib.suppress(AdapterkitError):
            stage.fail(f"{error.where}: {error.problem}")
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished files are kept",
            where=str(stage.path),
            hint="run the same command again",
        ) from None
    except Exception:  # whatever comes of a folder that another process made the output of
        if stage.exists() or not _is_ended(whole, job):
            raise
        outcome.finished = True
    finally:
        stage.leave()
    return outcome


def _is_ended(stage: Stage, job: WorkerJob) -> bool:
    """True if the output exists, or is being made from the workers' files."""
    try:
        state = state_of(stage, job.fingerprint, resume=True, overwrite=False)
    except Refused:
        return False
    journal = stage.journal()
    return state != "fresh" and not (journal and journal[0].get("ranks"))


class _Made(Exception):
    """Another process finished the file that this one was writing."""


class _WorkerRun:
    """One worker's run: its remaining and its finished files."""

    def __init__(
        self,
        plan: Plan,
        units: dict[str, OutputFile],
        stage: WorkerStage,
        outcome: Outcome,
        device: str,
        workers: int | None,
        execution: RunOptions,
    ):
        self.plan, self.stage, self.outcome = plan, stage, outcome
        self.execution = execution
        self.engine = local(device, workers)
        self.marks = Marks(stage, outcome, plan.placement.device)
        if any(unit.is_block for unit in units.values()):  # sums of a model's own products
            threads = workers or torch.get_num_threads()
            self.marks.kind["torch"] += f", {arithmetic(pick_device(device), threads)}"
        self.units = units
        blocks = {shard.file: [b.name for b in shard.block_files()] for shard in plan.shards}
        needs = plan.needs()
        self.needs = {
            name: () if unit.is_block else (*needs[unit.file], *blocks[unit.file])
            for name, unit in units.items()
        }
        self.done: set[str] = set()
        self.watch = Liveness(stage)

    def make_files(self, wait: float) -> None:
        """Make files until none is left that this worker can make. Raises `Waiting` after `wait`
        seconds for others' files, `Refused` if the job failed or its folder is gone."""
        self.marks.check(self.units)
        waited = 0.0
        with Heartbeat(self.stage, self.units, self.execution.progress) as heartbeat:
            while True:
                self.marks.check_not_failed()
                todo = self._todo()
                ready = [n for n in todo if not set(self.needs[n]).intersection(todo)]
                own = [name for name in self.outcome.share if name in todo]
                if own_ready := [name for name in own if name in ready]:
                    self._make(own_ready, heartbeat)
                elif name := self._free(ready):
                    self._make([name], heartbeat, shared=True)
                elif own:
                    if waited >= wait:
                        raise _waiting(own[0], self.needs[own[0]], todo)
                    time.sleep(POLL)
                    waited += POLL
                    continue
                elif not todo or all(map(self.watch.advancing, ready)):
                    self.outcome.left = todo
                    return
                else:
                    time.sleep(POLL)
                waited = 0.0

    def _todo(self) -> list[str]:
        """The files without a marker, the longest first."""
        left = [name for name in self.units if name not in self.done]
        self.done |= self.stage.markers(left).keys()
        parts = self.stage.parts()
        self.done |= {name for name in left if self._is_done_otherwise(self.units[name], parts)}
        left = [name for name in left if name not in self.done]
        return sorted(left, key=lambda name: (-self.units[name].size, name))

    def _is_done_otherwise(self, unit: OutputFile, parts: dict[str, list[tuple[int, int]]]) -> bool:
        """True if another number of workers has made it, in other parts or in one."""
        if unit.range is not None and self.stage.marker(unit.file) is not None:
            return True
        return unit.file in parts and tiling(parts[unit.file], unit.layout.size) is not None

    def _free(self, ready: Sequence[str]) -> str | None:
        """A file that nobody is writing: from the end, because its worker starts with the longest.
        Workers that look at the same time take different ones."""
        free = [name for name in reversed(ready) if not self.watch.alive(name)]
        return free[self.stage.worker % len(free)] if free else None

    def _make(self, names: Sequence[str], heartbeat: "Heartbeat", *, shared: bool = False) -> None:
        """Make files; stop writing another worker's file if that worker finishes it."""
        self.marks.began = time.monotonic()

        def progress(done: int) -> None:
            heartbeat(done)
            if shared and names[0] in heartbeat.made:
                raise _Made

        shards = [self.units[name] for name in names]
        with contextlib.suppress(_Made):
            self.engine(
                self.plan,
                shards,
                self.stage,
                hash=self.execution.hash == "sha256",
                finished=self.marks.note,
                progress=progress,
            )


class Marks:
    """A worker's record of each file that it has made; the worker continues only if all agree."""

    def __init__(self, stage: WorkerStage, outcome: Outcome, device: str):
        self.stage, self.outcome = stage, outcome
        self.kind = {"device": device, "torch": torch.__version__}
        self.began = time.monotonic()  # of the current file

    def note(self, result: ShardResult) -> None:
        """Note durably that a file is done."""
        assert self.stage.accepts(result), result  # else nobody would ever find it done
        now = time.monotonic()
        entry = {
            "shard": vars(result),
            **self.kind,
            "host": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
            "seconds": round(now - self.began, 3),
        }
        self.began = now
        self.stage.mark(result.file, entry)
        self.outcome.made.append(result.file)

    def check(self, names: Iterable[str]) -> None:
        """`Refused` if there is no stage of this job, or its files were made in another way."""
        if not self.stage.exists():
            raise no_stage(self.stage.path)
        check_one_kind([*self.stage.markers(names).values(), self.kind], self.stage)

    def check_not_failed(self) -> None:
        """`Refused` if another worker failed the job, `Failed` if its folder was removed."""
        if not self.stage.exists():
            raise Failed(
                "the output was finished, or begun again, by another process",
                where=str(self.stage.path),
                hint="nothing is left to do here",
                code="AK602",
            )
        if reason := self.stage.failure():
            raise job_failed(reason, self.stage)


class Liveness:
    """Finds processes that are writing a file, by heartbeats and whether they advance."""

    def __init__(self, stage: WorkerStage):
        self.stage = stage
        self.seen: dict[str, tuple[int, float, bool]] = {}  # attempt -> word, since, not the first

    def alive(self, name: str) -> bool:
        """True if some process is writing the file and is not known to be dead."""
        return any(self._alive(attempt) for attempt in self.stage.attempts(name))

    def advancing(self, name: str) -> bool:
        """True if a heartbeat of some process writing the file has advanced."""
        attempts = self.stage.attempts(name)
        return any(self._alive(attempt) and self.seen[attempt][2] for attempt in attempts)

    def _alive(self, attempt: str) -> bool:
        heartbeat = self.stage.heartbeats().get(attempt)
        if heartbeat is None or has_ended(heartbeat):  # it speaks before it begins
            return False
        known, now = self.seen.get(attempt), time.monotonic()
        if known is None or known[0] != heartbeat.get("number"):
            self.seen[attempt] = heartbeat.get("number", 0), now, known is not None
        return now - self.seen[attempt][1] < STALLED


class Heartbeat:
    """Records every few seconds that this process lives, and shows the progress of all together."""

    def __init__(self, stage: WorkerStage, units: dict[str, OutputFile], progress: Progress):
        self.stage, self.units, self.progress = stage, units, progress
        self.bytes = self.shown = 0  # of files without a marker; of all workers, shown so far
        self.made: set[str] = set()  # files that had a marker at the last look
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.running, self.problem = Running(1), None

    def __enter__(self) -> "Heartbeat":
        total = sum(unit.size for unit in self.units.values())
        expect(self.progress, total)
        self._look(0)
        with signals_deferred():
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with signals_deferred():
            self.stop.set()
        while not self.running.wait(POLL_INTERVAL):
            pass

    def __call__(self, done: int) -> None:
        with self.lock:
            self.bytes += done
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        number = 0
        try:
            while not self.stop.wait(HEARTBEAT):
                number += 1
                self._look(number)
        except BaseException as error:
            self.problem = error  # the stage is gone, or the caller's progress raised
        finally:
            self.running.finish()

    def _look(self, number: int) -> None:
        markers = self.stage.markers(name for name in self.units if name not in self.made)
        own = [name for name, entry in markers.items() if entry["attempt"] == self.stage.attempt]
        self.made |= markers.keys()
        with self.lock:
            self.bytes = max(0, self.bytes - sum(self.units[name].size for name in own))
            mine = self.bytes
        self.stage.heartbeat(number, mine)
        others = [each for each in self.stage.heartbeats().values() if not has_ended(each)]
        done = sum(self.units[name].size for name in self.made) + mine
        done += sum(each.get("done", 0) for each in others)
        if done > self.shown:
            self.progress(done - self.shown)
            self.shown = done


def _waiting(name: str, needs: Sequence[str], todo: Sequence[str]) -> Waiting:
    missing = next(need for need in needs if need in todo)
    return Waiting(
        f"waiting for {missing}",
        expected="a worker that makes it",
        where=name,
        hint="run the same command again when it is there",
    )
