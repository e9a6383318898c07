"""One merge by one process, by ranks and by Ray, on the same cores; and the steps of a job of ranks
over a checkpoint of 671B.

    python examples/benchmarks/ranks.py                           4 GB, three rounds, and 671B
    python examples/benchmarks/ranks.py --size 0.2 --repeat 1     a quick look
    python examples/benchmarks/ranks.py --only local,ranks-2      some of: local, ranks-N, ray, 671B
    python examples/benchmarks/ranks.py --json ranks.json

`local` is one process with a thread for each core. `ranks-N` is `merge --plan`, N processes of
`run --worker i/N` at once, each with its share of the cores, and `finish`. `ray` is `--engine ray`
on a cluster of this machine whose workers have done a small merge before. All write the same bytes,
which is checked. `start-up` is what processes take to begin, and stays the same for a model of any
size: imports and planning, measured by dry runs of the same commands, of all three steps for ranks;
for Ray the start of the cluster and of its workers. `work` is the rest, and `/ local` compares it
with one process. `peak MB` is of the largest process, for Ray of the driver.

671B is DeepSeek-V3's names and shapes without its data: `merge --plan`, one of 64 ranks with
`--dry-run`, and `finish`, which refuses, as no file is made. Their CPU seconds and peak memory are
of the whole process. They do not look at the free space, as a disk of 0.7 TB is not needed.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import common
from checkpoints import BASES, make_adapter, make_base

SHARDS = 16  # output files: what ranks and Ray deal out
RANKS = 64  # of the large job
LARGE = "671B"
ADAPTERKIT = (sys.executable, "-m", "adapterkit")

RAY = """
import json, os, sys, threading, time
start = time.perf_counter()
import ray
from adapterkit import merge
small, small_adapter, base, adapter, out, cores = sys.argv[1:]
ray.init(num_cpus=int(cores), include_dashboard=False, log_to_driver=False)
merge(small, [small_adapter], out=out + "-small", engine="ray")
merge(base, [adapter], out=out, dry_run=True)
started = time.perf_counter()
merge(base, [adapter], out=out, engine="ray")
print(json.dumps({"start": started - start, "work": time.perf_counter() - started}))
ray.shutdown()
"""

ROOMY = """
from adapterkit.core.checkpoint import disk
disk.free_bytes = lambda path: 1 << 60
from adapterkit.cli import process
process()
"""


class Failed(RuntimeError):
    """A command ended otherwise than it should; the message is the end of what it wrote."""


@dataclass(frozen=True)
class Usage:
    """The costs of a process."""

    wall: float  # seconds
    cpu: float  # seconds
    peak: int  # bytes of its largest process


class Process:
    """A command of adapterkit, or another one, from its start on."""

    def __init__(self, argv: list[str], **environment: str):
        self.argv, self.began = argv, time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `wait`)
        self.process = subprocess.Popen(
            argv, stdout=self.log, stderr=self.log, env=os.environ | environment
        )

    def wait(self, status: int = 0) -> tuple[Usage, str]:
        """Its costs and output, once it has ended with that status."""
        _, ended, used = os.wait4(self.process.pid, 0)
        wall = time.perf_counter() - self.began
        self.process.returncode = os.waitstatus_to_exitcode(ended)
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        if self.process.returncode != status:
            raise Failed(f"{shlex.join(self.argv)}: {self.process.returncode}\n{text[-2000:]}")
        return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024), text


def adapterkit(*words: object) -> Process:
    return Process([*ADAPTERKIT, *map(str, words)])


# --- one merge, several ways ----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A merge, and the folder of its output."""

    base: Path
    adapter: Path
    work: Path
    cores: int

    @property
    def out(self) -> Path:
        return self.work / "run" / "out"

    @property
    def plan(self) -> Path:
        return self.out.with_suffix(".plan.json")

    @property
    def merge(self) -> list[object]:
        return ["merge", self.base, self.adapter, "--out", self.out, "--quiet"]

    def fresh(self) -> None:
        common.fresh(self.work / "run")
        os.sync()
        common.warm(self.base, self.adapter)

    def hashes(self) -> dict[str, str]:
        """The sha256 of each file of the output, as its receipt says."""
        files = json.loads((self.out / "adapterkit.json").read_text())["files"]
        return {name: file["sha256"] for name, file in files.items()}


@dataclass(frozen=True)
class Run:
    """One way's seconds."""

    start: float  # of imports and planning
    work: float
    peak: int  # bytes of its largest process; for Ray of the driver


def local(job: Job) -> Run:
    start, _ = adapterkit(*job.merge, "--dry-run").wait()
    whole, _ = adapterkit(*job.merge).wait()
    return Run(start.wall, whole.wall - start.wall, whole.peak)


def ranks(count: int) -> Callable[[Job], Run]:
    def shares(job: Job, *options: object) -> tuple[float, int]:
        """Seconds of all ranks at once, and the peak of the largest."""
        began = time.perf_counter()
        words = ["run", job.plan, "--quiet", *options]
        processes = [adapterkit(*words, "--worker", f"{i}/{count}") for i in range(count)]
        peak = max(process.wait()[0].peak for process in processes)
        return time.perf_counter() - began, peak

    def run(job: Job) -> Run:
        plan, _ = adapterkit(*job.merge, "--plan", job.plan).wait()
        start, _ = shares(job, "--dry-run")
        seconds, peak = shares(job, "--workers", max(1, job.cores // count))
        finish, _ = adapterkit("finish", job.plan, "--quiet").wait()
        # finish plans as a rank does
        work = seconds + finish.wall - 2 * start
        return Run(plan.wall + 2 * start, work, max(plan.peak, peak, finish.peak))

    return run


def ray(job: Job) -> Run:
    small, small_adapter = elsewhere(inputs, job.work / "small", 0.05, 0.01)
    words = [small, small_adapter, job.base, job.adapter, job.out, job.cores]
    process = Process([sys.executable, "-c", RAY, *map(str, words)], RAY_DEDUP_LOGS="0")
    used, text = process.wait()
    times = json.loads(text.splitlines()[-1])
    return Run(times["start"], times["work"], used.peak)


def elsewhere(make: Callable[..., tuple[Path, Path]], *args: Any) -> tuple[Path, Path]:
    """The result of `make` in a process of its own, because Linux counts the memory of a parent at
    the start in its child's peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(make, *args).result()


def inputs(folder: Path, size: float, shard: float) -> tuple[Path, Path]:
    """A base of `size` GB in shards of `shard` GB, and an adapter for it."""
    base = common.make_base(folder, size, shard)
    config = json.loads((base / "config.json").read_text())
    adapter = folder.with_name(f"{folder.name}-adapter")
    return base, common.make_adapter(adapter, config, "float32")


def ways(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[Job], Run]]]:
    """The requested ways; `local` first, because the others are compared with it."""
    yield "local", local
    for name in args.only:
        if match := re.fullmatch(r"ranks-(\d+)", name):
            yield name, ranks(int(match[1]))
        elif name == "ray":
            yield name, ray


def merges(args: argparse.Namespace) -> dict[str, dict]:
    base, adapter = elsewhere(
        inputs, args.work / f"base-{args.size:g}", args.size, args.size / SHARDS
    )
    job = Job(base, adapter, args.work, len(os.sched_getaffinity(0)))
    runs: dict[str, list[Run]] = {}
    expected: dict[str, str] = {}
    for number in range(args.repeat):
        for name, way in ways(args):
            job.fresh()
            runs.setdefault(name, []).append(way(job))
            hashes = job.hashes()
            expected = expected or hashes
            if hashes != expected:
                raise Failed(f"{name}: other bytes than one process")
            print(f"round {number + 1}: {name:8} {runs[name][-1]}", file=sys.stderr)
    common.fresh(args.work / "run")
    alone = median(run.work for run in runs["local"])
    return {
        name: {
            "start_seconds": [round(run.start, 3) for run in of_one],
            "work_seconds": [round(run.work, 3) for run in of_one],
            "peak_bytes": [run.peak for run in of_one],
            "over_local": round(median(run.work for run in of_one) / alone, 3),
        }
        for name, of_one in runs.items()
    }


def merge_table(results: dict[str, dict]) -> None:
    heads = ("start-up s", "work s", "/ local", "peak MB")
    print("\n" + "merge".ljust(30), *(head.rjust(12) for head in heads))
    for name, one in results.items():
        cells = [f"{median(one['start_seconds']):.2f}", f"{median(one['work_seconds']):.2f}"]
        cells += [f"{one['over_local']:.2f}", f"{median(one['peak_bytes']) / 1e6:.0f}"]
        print(name.ljust(30), *(cell.rjust(12) for cell in cells))


# --- a job of 64 ranks over 671B ------------------------------------------------------------------


def large_inputs(work: Path) -> tuple[Path, Path]:
    """DeepSeek-V3's headers, and an adapter of its attention."""
    model = next(base for base in BASES if base.name == "DeepSeek-V3")
    base = make_base(work / f"{model.name}-base", *model.shape(), model.shards)
    adapter = base.with_name(f"{base.name}-adapter-modules")
    return base, make_adapter(adapter, *model.shape(), model.modules, False)


def large(args: argparse.Namespace) -> dict[str, dict]:
    base, adapter = elsewhere(large_inputs, args.work)
    job = Job(base, adapter, args.work, 1)
    common.fresh(args.work / "run")
    share = ["run", job.plan, "--worker", f"0/{RANKS}", "--dry-run"]
    steps: dict[str, tuple[list[object], int]] = {
        "merge --plan": ([*job.merge, "--plan", job.plan], 0),
        f"run --worker 0/{RANKS} --dry-run": (share, 0),
        "finish (refused)": (["finish", job.plan, "--quiet"], 1),
    }
    results = {}
    for name, (words, status) in steps.items():
        process = Process([sys.executable, "-c", ROOMY, *map(str, words)])
        used, text = process.wait(status)
        results[name] = {
            "cpu_seconds": round(used.cpu, 2),
            "wall_seconds": round(used.wall, 2),
            "peak_bytes": used.peak,
            "plan_bytes": job.plan.stat().st_size,
        }
        if status:
            results[name]["names_missing_files"] = len(set(re.findall(r"model-\S+tensors", text)))
        print(f"{LARGE}: {name:32} {used}", file=sys.stderr)
    common.fresh(args.work / "run")
    return results


def large_table(results: dict[str, dict]) -> None:
    print("\n" + LARGE.ljust(34), *(head.rjust(10) for head in ("CPU s", "wall s", "peak MB")))
    for name, one in results.items():
        cells = [f"{one['cpu_seconds']:.1f}", f"{one['wall_seconds']:.1f}"]
        cells.append(f"{one['peak_bytes'] / 1e6:.0f}")
        print(name.ljust(34), *(cell.rjust(10) for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=4.0, help="GB of the checkpoint (4)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=["local", "ranks-1", "ranks-2", "ray", LARGE],
        help="some of local,ranks-N,ray,671B, comma-separated",
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-benchmark"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    if unknown := [n for n in args.only if not re.fullmatch(rf"local|ranks-\d+|ray|{LARGE}", n)]:
        parser.error(f"--only {','.join(unknown)}: expected local, ranks-N, ray, {LARGE}")
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "transformers", "ray")
    report |= {"repeat": args.repeat, "size": args.size, "shards": SHARDS}
    if args.only != [LARGE]:
        report["merges"] = merges(args)
    if LARGE in args.only:
        report["large"] = large(args)
    lock.close()
    if "merges" in report:
        merge_table(report["merges"])
    if "large" in report:
        large_table(report["large"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
