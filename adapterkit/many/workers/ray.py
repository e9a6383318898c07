"""Workers on a Ray cluster whose machines share one file system. The plan is prepared as for
`--plan`, each slot of the cluster runs a worker as a task, and `finish` publishes the output.

No tensors go through Ray, only the plan, once per worker process. If a worker is lost, its share is
retried or others make its files; a refused one is not retried.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.core import errors
from adapterkit.core.engine.device import pick_device
from adapterkit.core.engine.execution import stage_of
from adapterkit.core.errors import (
    AdapterkitError,
    Failed,
    Interrupted,
    MultipleErrors,
    Refused,
    Unrecoverable,
    shown,
)
from adapterkit.core.execute import FolderCheck, Push
from adapterkit.core.lazy import optional, torch
from adapterkit.core.options import no_progress
from adapterkit.core.output.resume import state_of
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt
from adapterkit.core.records import Json
from adapterkit.core.shared_options import RunOptions
from adapterkit.many.workers.finish import finish_workers
from adapterkit.many.workers.job_identity import WorkerJob, prepare_workers
from adapterkit.many.workers.ranges import accepts, units
from adapterkit.many.workers.stage import WorkerStage
from adapterkit.many.workers.worker import Heartbeat, make_share

RETRIES = 3  # of the task of a lost worker
OPTIONS = {"scheduling_strategy": "SPREAD", "max_retries": RETRIES, "retry_exceptions": False}
POLL = 1.0  # seconds between looks at Ctrl-C
LEAVE = 10.0  # seconds that cancelled tasks get
VERSIONS = f"adapterkit {__version__}, torch {torch.__version__}"
AGAIN = "run the same command with --resume"


def run_on_ray(
    plan: Plan, how: RunOptions, check: FolderCheck | None, push: Push | None
) -> Receipt:
    """Run a plan with the workers of a cluster: the process's own connection if it has one, else
    the cluster at `how.ray_address`, or one that Ray finds or starts.

    `Refused` without the package ray, if no cluster answers, and for resuming a run of a single
    machine.
    """
    job = WorkerJob.of(plan, how.hash)
    finish = partial(finish_workers, plan, job, how, "the same command with --resume", check, push)
    state = _state(plan, job, how)
    if state == "finished":
        return finish()
    with _connected(how.ray_address) as ray:
        cluster = _Cluster(ray, on_cuda=how.device.startswith("cuda"))
        cores, slots = cluster.slots()
        if state == "fresh":
            prepare_workers(plan, job, how)
        try:
            cluster.run_workers(plan, job, how, cores, slots)
        except Unrecoverable:  # no worker can go on
            with stage_of(plan, Path(how.out)) as stage:
                stage.discard()
            raise
        except KeyboardInterrupt:
            where = str(stage_of(plan, Path(how.out)).control)
            raise Interrupted("stopped; finished files are kept", where=where, hint=AGAIN) from None
    return finish()


def _state(plan: Plan, job: WorkerJob, how: RunOptions) -> str:
    """'fresh', 'resume' or 'finished'; `Refused` for resuming a run that workers did not start."""
    stage = stage_of(plan, Path(how.out))
    state = state_of(stage, job.fingerprint, resume=how.resume, overwrite=how.overwrite)
    if state == "resume" and not (stage.journal() or [{}])[0].get("ranks"):
        stage.lock.check()
        raise Refused(
            "the interrupted run was on one machine, with --engine local",
            expected="a run that --engine ray began",
            where=str(stage.control),
            hint="resume it with --engine local, or give --overwrite without --resume",
            code="AK603",
        )
    return state


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The package ray, connected to a cluster within the block."""
    ray = optional(
        "ray", install="ray", expected="ray, on this machine and on the cluster's", where="--engine"
    )
    connects = not ray.is_initialized()
    if connects:
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
                code="AK610",
            ) from error
    try:
        yield ray
    finally:
        if connects:
            ray.shutdown()


@dataclass(frozen=True)
class _Cluster:
    """A connected cluster; `on_cuda`: each worker gets a GPU."""

    ray: Any  # the package
    on_cuda: bool

    def slots(self) -> tuple[int, int]:
        """The cores of the smallest machine, or per GPU, and the number of such slots; each runs a
        worker."""
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cores = [int(each["CPU"]) for each in resources if each.get("CPU", 0) >= 1]
        gpus = sum(int(each.get("GPU", 0)) for each in resources)
        if not cores or (self.on_cuda and not gpus):
            raise Failed(
                f"the Ray cluster has {sum(cores)} CPUs and {gpus} GPUs",
                expected="at least one" + " GPU" * self.on_cuda,
                where="--ray-address",
                hint=f"add a machine to the cluster, then {AGAIN}",
                code="AK610",
            )
        if self.on_cuda:
            return max(1, min(cores) // max(1, gpus)), gpus
        return min(cores), sum(count // min(cores) for count in cores)

    def run_workers(
        self, plan: Plan, job: WorkerJob, how: RunOptions, cores: int, slots: int
    ) -> None:
        """Run a worker in each slot; on an error or Ctrl-C, end all of them."""
        device = "cuda" if self.on_cuda else "cpu"  # Ray says which GPU
        work = {"num_cpus": cores, "num_gpus": int(self.on_cuda), **OPTIONS}
        task = self.ray.remote(_run_worker).options(**work)
        out = Path(how.out).absolute()  # a worker runs in a folder of its own
        options = replace(how.only(RunOptions), out=out, device=device, progress=no_progress)
        # in a list a task gets the reference
        arguments = ([self.ray.put(plan)], job, options)
        running = {
            task.remote(*arguments, worker, slots, cores, VERSIONS): worker
            for worker in range(slots)
        }
        made = {unit.name: unit for unit in units(plan.shards, slots, torch.device(device))}
        known = accepts(plan, hashed=how.hash == "sha256")
        stage = WorkerStage(stage_of(plan, Path(how.out)).control, job.digest, slots, accepts=known)
        try:
            with Heartbeat(stage, made, how.progress) as heartbeat:
                while running:
                    done, _ = self.ray.wait(list(running), timeout=POLL)
                    for reference in done:
                        self._check(reference, running.pop(reference))
                    heartbeat(0)
        except BaseException:
            for reference in running:
                self.ray.cancel(reference, force=True)
            if running:
                self.ray.wait(list(running), num_returns=len(running), timeout=LEAVE)
            raise
        finally:
            stage.leave()

    def _check(self, reference: object, worker: int) -> None:
        """Raise a worker's own error, or `Failed` if its processes were lost repeatedly."""
        lost = self.ray.exceptions
        try:
            error = self.ray.get(reference)
        except (
            lost.WorkerCrashedError,
            lost.NodeDiedError,
            lost.OutOfMemoryError,
            lost.RaySystemError,
        ) as caught:
            raise Failed(
                f"worker {worker} was lost {RETRIES + 1} times: {shown(caught)}",
                expected="machines that stay, with the memory that the plan says",
                where="the Ray cluster",
                hint=AGAIN,
                code="AK610",
            ) from caught
        if error is not None:
            raise _as_error(error)


def _run_worker(
    stored: list[Any],
    job: WorkerJob,
    how: RunOptions,
    worker: int,
    worker_count: int,
    workers: int,
    versions: str,
) -> Json | None:
    """The task of one worker; its error is returned as data, so that it is not retried."""
    import ray

    try:
        if versions != VERSIONS:
            raise Failed(
                f"a worker has {VERSIONS}",
                expected=f"{versions}, as here, because others round differently",
                where="the Ray cluster",
                hint=f"install the same on all machines, then {AGAIN}",
                code="AK610",
            )
        pick_device(how.device)
        plan: Any = ray.get(stored[0])
        make_share(plan, job, how, worker, worker_count, workers=workers, wait=math.inf)
    except AdapterkitError as error:
        return _as_data(error)
    return None


def _as_data(error: AdapterkitError) -> Json:
    inner = error.errors if isinstance(error, MultipleErrors) else ()
    parts = {key: getattr(error, key) for key in ("expected", "where", "hint", "code")}
    # the driver knows the classes of `errors` and their bases
    kind = next(each.__name__ for each in type(error).__mro__ if hasattr(errors, each.__name__))
    own = {"kind": kind, "problem": error.problem, "parts": parts}
    return own | {"errors": [_as_data(one) for one in inner]}


def _as_error(data: Json) -> AdapterkitError:
    if data["errors"]:
        return MultipleErrors(_as_error(one) for one in data["errors"])
    return getattr(errors, data["kind"])(data["problem"], **data["parts"])
