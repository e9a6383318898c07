"""The ray engine: each output file is made by a task on a Ray cluster, whose machines see one file
system; a large one in parts, each by a task.

The driver plans, joins parts, keeps the journal and publishes, as on one machine; a task makes one
file in the stage, in an attempt of its own, and gives back what it noted. No tensor goes through
Ray: the plan does, once for each worker process. A lost worker's task is tried again, one that is
refused is not.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapterkit import __version__, errors
from adapterkit.checkpoint.shard_result import ShardResult
from adapterkit.checkpoint.stage import Workspace
from adapterkit.checkpoint.writer import UNFINISHED
from adapterkit.engines.device import kind, pick_device
from adapterkit.engines.local import local
from adapterkit.engines.pieces import Part
from adapterkit.engines.rank_parts import file_of, room, units
from adapterkit.engines.ray_parts import Joiner, longest_first
from adapterkit.errors import AdapterkitError, Failed, MultipleErrors, Refused, shown
from adapterkit.options import Progress
from adapterkit.plan import Computed, Plan, Shard

RETRIES = 3  # of the task of a lost worker
OPTIONS = {
    "scheduling_strategy": "SPREAD",
    "max_retries": RETRIES,
    "retry_exceptions": False,
}
AHEAD = 2  # tasks in flight for each place on the cluster
# files that a machine streams at a time: the end of one waits for its disk, and for its hash, which
# is one row of bytes
STREAMED = 8
POLL = 1.0  # seconds between looks at Ctrl-C
LEAVE = 10.0  # seconds that cancelled tasks get
VERSIONS = f"adapterkit {__version__}, torch {torch.__version__}"


@contextlib.contextmanager
def on_ray(address: str | None, device: str) -> Iterator["Cluster"]:
    """An engine on a Ray cluster: the one at `address`, or the one that Ray finds or starts, for
    as long as the block runs; the connection that the process has, where it has one.

    `Refused` without the package ray, and where no cluster answers.
    """
    ray = _package()
    connects = not ray.is_initialized()
    if connects:
        _connect(ray, address)
    try:
        yield Cluster(ray, device)
    finally:
        if connects:
            ray.shutdown()


def _package() -> Any:
    try:
        import ray
    except ImportError as error:
        raise Refused(
            "--engine ray without the package ray",
            expected="ray, on this machine and on the cluster's",
            where="options",
            hint="pip install 'adapterkit[ray]'",
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    # a cluster that is started here would report its use over the network
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Refused(
            f"no Ray cluster at {shown(address or 'this machine')}: {shown(error)}",
            expected="a cluster that runs",
            where="--ray-address",
            hint="check the address, or start one: ray start --head",
        ) from error


@dataclass(frozen=True)
class Cluster:
    """The `Engine` of a connected cluster; `auto` stands for the CPU."""

    ray: Any  # the package
    device: str

    def placed(self, plan: Plan) -> Plan:
        """The plan with the kind of device that the cluster's machines have, and the room for the
        join of parts."""
        _, places = self._places()
        plan = replace(plan, room=room(plan.shards, places))
        if not self.on_cuda:
            return plan
        card = self.ray.remote(_card).options(num_gpus=1)
        return replace(plan, device=self.ray.get(card.remote()))

    def __call__(
        self,
        plan: Plan,
        shards: list[Shard | Computed],
        stage: Workspace,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        for folder in {(stage.path / shard.file).parent for shard in shards}:
            folder.mkdir(parents=True, exist_ok=True)  # attempts make none
        workers, places = self._places()
        task, options = self.ray.remote(_make), {"num_gpus": int(self.on_cuda), **OPTIONS}
        device = "cuda" if self.on_cuda else "cpu"  # Ray says which card
        share = _Share(stage.path.absolute(), secrets.token_hex(8), hash, device)
        stored = [self.ray.put(plan)]  # in a list a task gets the reference
        made = longest_first(units(shards, places, torch.device(device)))
        by_name, needs = {unit.file: unit for unit in made}, plan.needs()
        joiner = Joiner(stage.path, made, _attempt(), hashed=hash, finished=finished)
        streamed = sum(isinstance(unit, Shard) for unit in made)
        few = workers if self.on_cuda else threads(workers, places, streamed)

        def start(unit: Shard | Computed) -> Any:
            needed = needs[file_of(unit)]
            done = (entry for entry in (stage.journal() if needed else ()) if "shard" in entry)
            entries = [entry for entry in done if entry["shard"]["file"] in needed]
            part = (unit.start, unit.stop) if isinstance(unit, Part) else None
            count = few if isinstance(unit, Shard) else workers
            arguments = (share, count, stored, file_of(unit), part, entries, VERSIONS)
            return task.options(num_cpus=count, **options).remote(*arguments)

        def note(answer: dict[str, Any]) -> None:
            result = ShardResult(**answer)
            unit = by_name[result.file]
            if isinstance(unit, Part):
                joiner.add(unit, result)
                progress(unit.size)
            else:
                finished(result)
                progress(unit.layout.size)

        try:
            self._run(made, needs, start, note, joiner.look, AHEAD * places * workers // few)
            joiner.look(wait=True)
        finally:
            joiner.close()
        left = [stage.path / unit.file for unit in made if isinstance(unit, Part)]
        for path in (*left, *stage.path.rglob(f"*{UNFINISHED}")):  # of lost workers
            path.unlink(missing_ok=True)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _places(self) -> tuple[int, int]:
        """The cores of the smallest machine, or those that each card has, and how many such places
        there are."""
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cores = [int(each["CPU"]) for each in resources if each.get("CPU", 0) >= 1]
        gpus = sum(int(each.get("GPU", 0)) for each in resources)
        if not cores or (self.on_cuda and not gpus):
            raise Failed(
                f"a Ray cluster of {sum(cores)} CPUs and {gpus} GPUs",
                expected="at least one" + " GPU" * self.on_cuda,
                where="--ray-address",
                hint="add a machine to the cluster, then --resume",
            )
        if self.on_cuda:
            return max(1, min(cores) // max(1, gpus)), gpus
        return min(cores), sum(count // min(cores) for count in cores)

    def _run(
        self,
        made: Sequence[Shard | Computed],
        needs: dict[str, tuple[str, ...]],
        start: Callable[[Shard | Computed], Any],
        note: Callable[[dict[str, Any]], None],
        look: Callable[[], None],
        limit: int,
    ) -> None:
        """Start the tasks in this order, those that need others after them, at most `limit` at a
        time, `note` what they answer, and `look` in between; on an error, or Ctrl-C, end all that
        run."""
        waiting = list(made)
        running: dict[Any, str] = {}
        try:
            while waiting or running:
                left = {*(unit.file for unit in waiting), *running.values()}
                ready = [unit for unit in waiting if not left.intersection(needs[file_of(unit)])]
                for unit in ready[: limit - len(running)]:
                    waiting.remove(unit)
                    running[start(unit)] = unit.file
                done, _ = self.ray.wait(list(running), timeout=POLL)
                for reference in done:
                    note(self._answer(reference, running.pop(reference)))
                look()
        except BaseException:
            for reference in running:
                self.ray.cancel(reference, force=True)
            if running:
                self.ray.wait(list(running), num_returns=len(running), timeout=LEAVE)
            raise

    def _answer(self, reference: Any, file: str) -> dict[str, Any]:
        """What a task gives back. Raises the task's own error, and `Failed` where its workers were
        lost again and again."""
        try:
            answer = self.ray.get(reference)
        except (
            self.ray.exceptions.WorkerCrashedError,
            self.ray.exceptions.NodeDiedError,
            self.ray.exceptions.OutOfMemoryError,
            self.ray.exceptions.RaySystemError,
        ) as error:
            raise Failed(
                f"its worker was lost {RETRIES + 1} times: {shown(error)}",
                expected="machines that stay, with the memory that the plan says",
                where=file,
                hint="run the same command with --resume",
            ) from error
        if "error" in answer:
            raise _as_error(answer["error"])
        return answer


def threads(workers: int, places: int, files: int) -> int:
    """Cores of a task that streams a file, on so many places of `workers` cores: an eighth of one,
    or more where there are fewer files than that makes tasks."""
    return max(1, workers // STREAMED, min(workers, workers * places // max(1, files)))


@dataclass(frozen=True)
class _Share:
    """What all tasks of a job have in common."""

    path: Path  # the stage's folder
    job: str  # of which a worker keeps the plan
    hash: bool
    device: str


@dataclass
class _Workspace:
    """The stage as a task sees it."""

    path: Path
    attempt: str
    entries: list[dict]

    def journal(self) -> list[dict]:
        return self.entries

    def wanted(self, name: str) -> bool:
        return True


_plans: dict[str, Plan] = {}  # of the job that this worker process is at


def _card() -> str:
    """A task: the kind of the card that it gets."""
    return kind(pick_device("cuda"))


def _make(
    share: _Share,
    workers: int,
    stored: list[Any],
    file: str,
    part: tuple[int, int] | None,
    entries: list[dict],
    versions: str,
) -> dict[str, Any]:
    """A task: make one file, or bytes [start, stop) of it; what is noted of it, or the error as
    data, which is not retried."""
    try:
        if versions != VERSIONS:
            raise Failed(
                f"a worker with {VERSIONS}",
                expected=f"{versions}, as here: others round otherwise",
                where=file,
                hint="install the same on all machines, then --resume",
            )
        if share.job not in _plans:
            _plans.clear()
            _plans[share.job] = _package().get(stored[0])
        plan, results = _plans[share.job], []
        if (here := kind(pick_device(share.device))) != plan.device:
            raise Failed(
                f"a worker on {here}",
                expected=f"{plan.device}, as the first one: others round otherwise",
                where=file,
                hint="use machines of one kind, then --resume",
            )
        unit = next(shard for shard in plan.shards if shard.file == file)
        if part is not None:
            assert isinstance(unit, Shard)
            unit = Part(unit.layout, unit.steps, *part)
        local(share.device, workers)(
            plan,
            [unit],
            _Workspace(share.path, _attempt(), entries),
            hash=share.hash,
            finished=results.append,
            progress=lambda done: None,
        )
        return vars(results[0])
    except AdapterkitError as error:
        return {"error": _as_data(error)}


def _attempt() -> str:
    return f"0-{os.getpid()}-{secrets.token_hex(4)}"


def _as_data(error: AdapterkitError) -> dict[str, Any]:
    inner = error.errors if isinstance(error, MultipleErrors) else ()
    four = {key: getattr(error, key) for key in ("problem", "expected", "where", "hint")}
    # the driver knows the classes of `errors`, and those of them that others are made of
    kind = next(each.__name__ for each in type(error).__mro__ if hasattr(errors, each.__name__))
    return {"kind": kind, **four, "errors": [_as_data(one) for one in inner]}


def _as_error(data: dict[str, Any]) -> AdapterkitError:
    if data["errors"]:
        return MultipleErrors(_as_error(one) for one in data["errors"])
    four = {key: data[key] for key in ("expected", "where", "hint")}
    return getattr(errors, data["kind"])(data["problem"], **four)
