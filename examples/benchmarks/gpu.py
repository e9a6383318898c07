"""Check and measure a GPU in an hour: correct results, the same bits every time, and the speed-up.

    python examples/benchmarks/gpu.py --json gpu.json               all steps, 16 GB, 40 minutes
    python examples/benchmarks/gpu.py --steps facts,right,races
    python examples/benchmarks/gpu.py --device cpu --small          do the steps run? no figures
    numactl --cpunodebind 0 --membind 0 python ...                  with `numa_of_gpu` 0 in facts

Data are made in --work, which should be a memory file system. Each step is a process of its own, so
that a GPU left broken by one is reset for the next; JSON is written after each. Each figure with an
expected range (gpu_expected.py) is printed with the range, and with a hint if it is outside.
Without a GPU the script says so and exits with status 2.

| step | what |
|---|---|
| facts | bus, versions, environment, copies from pinned and pageable memory, sha256, disk |
| right | rounding against float64; every verb here and there |
| races | a stream that is late; 1 to 8 workers; TF32 set; kill and resume |
| stats | covariances here and there, also with TF32 set |
| speed | merges by shards, hash, workers, ranks; how much overlaps; memory |
| decompositions | SVD, QR, LoftQ, TIES, codecs, compared with the CPU |
| runtime | training steps, rows of 64 adapters, compared with PEFT |
| limits | little memory, Ctrl-C, resume |
| peers | loading by safetensors and others |

If something fails: look at an exception in `right` that is no refusal before any timing. Run a step
that ended with an illegal access again with CUDA_LAUNCH_BLOCKING=1, or its smallest merge under
`compute-sanitizer --tool memcheck`. During `speed`, `py-spy dump` or `perf top` should show pwrite,
sha256 and clear_page; `take_gil` above a tenth means too many launches. In pieces: --steps
facts,right; races,stats; speed; decompositions; runtime,limits,peers with --size 8.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from gpu_expected import verdicts

sys.path.insert(0, str(common.REPOSITORY))  # the checkout, and its golden jobs

# minutes after which a step is ended, in the order of an hour: what is wrong shows first
STEPS = {
    "facts": 5, "right": 10, "races": 8, "stats": 5, "speed": 14, "decompositions": 16,
    "runtime": 8, "limits": 8, "peers": 6,
}  # fmt: skip
WORK_SPACE = 3.5  # bytes in --work for each of a timed merge


@dataclass(frozen=True)
class Settings:
    """The settings of all steps."""

    device: str
    work: Path
    size: float  # GB of the merges that are timed
    small: bool  # sizes that a CPU does in seconds: to see that the steps run

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def pick(self, large, small):
        """The value for this run's sizes."""
        return small if self.small else large


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", default=",".join(STEPS), help=", ".join(STEPS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:i; cpu to try the steps")
    parser.add_argument("--size", type=float, default=16.0, help="GB of the timed merges")
    parser.add_argument("--small", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=40.0, help="no step begins after these")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/adapterkit-gpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the step of this process
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps.split(",")) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}: {', '.join(STEPS)}")
    settings = Settings(
        arguments.device, arguments.work, 0.02 if arguments.small else arguments.size,
        arguments.small,
    )  # fmt: skip
    if arguments.only:
        arguments.json.write_text(json.dumps(run_step(arguments.only, settings)))
        return 0
    if problem := missing(settings):
        print(problem, file=sys.stderr)
        return 2
    arguments.work.mkdir(parents=True, exist_ok=True)
    report = common.environment("adapterkit", "torch", "peft", "transformers")
    report |= {"device": device_name(settings), "steps": {}}
    started, failed = time.monotonic(), False
    with common.alone(arguments.work):
        for name in arguments.steps.split(","):
            if time.monotonic() - started > 60 * arguments.minutes:
                report["steps"][name] = {"left_out": "no time"}
                continue
            figures = in_process(name, settings)
            report["steps"][name] = figures
            failed = failed or "failed" in figures
            show(name, figures, settings)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


def missing(settings: Settings) -> str | None:
    """The requirements that this machine lacks."""
    import torch

    if settings.on_gpu and not torch.cuda.is_available():
        return "no CUDA device on this machine: nothing is measured"
    folder = next(path for path in (settings.work, *settings.work.parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free / common.GB, WORK_SPACE * settings.size
    if free < needed:
        return (
            f"{free:.1f} GB are free in --work, {needed:.1f} are needed: give another --work, or "
            f"--size {free / WORK_SPACE:.0f}"
        )
    return None


def device_name(settings: Settings) -> str:
    import torch

    return torch.cuda.get_device_name(settings.device) if settings.on_gpu else "cpu"


# --- steps ----------------------------------------------------------------------------------------


def in_process(name: str, settings: Settings) -> dict[str, Any]:
    """The figures of a step that a process of its own carries out."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        argv = [
            sys.executable, __file__, "--only", name, "--device", settings.device,
            "--work", str(settings.work), "--size", str(settings.size), "--json", str(path),
            *(["--small"] if settings.small else []),
        ]  # fmt: skip
        try:
            status = subprocess.run(argv, timeout=60 * STEPS[name], stdout=sys.stderr).returncode
            figures = json.loads(path.read_text()) if status == 0 else {}
            figures |= {"failed": f"exit status {status}"} if status else {}
        except subprocess.TimeoutExpired:
            figures = {"failed": f"no end after {STEPS[name]} minutes"}
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def run_step(name: str, settings: Settings) -> dict[str, Any]:
    """The figures of a step; `failed` names the cases that failed."""
    import gpu_checks
    import gpu_figures

    step = getattr(gpu_checks, name, None) or getattr(gpu_figures, name)
    try:
        figures = step(settings)
    except Exception as error:  # of any step: the hour goes on, and the report names it
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"}
    cases = [path for path, _ in leaves(figures) if path.endswith("/failed")]
    return figures | ({"failed": sorted(path.removesuffix("/failed") for path in cases)}
                      if cases and "failed" not in figures else {})  # fmt: skip


def leaves(figures: object, path: str = "") -> Iterator[tuple[str, object]]:
    """All figures, each with its place."""
    if not isinstance(figures, dict):
        yield path.removeprefix("/"), figures
        return
    for key, value in figures.items():
        yield from leaves(value, f"{path}/{key}")


def show(name: str, figures: dict[str, Any], settings: Settings) -> None:
    """Print a step's figures; on a GPU with what was expected, which the figures then name too."""
    print(json.dumps({name: figures}, indent=1), flush=True)
    if settings.small or not settings.on_gpu:
        return
    found = verdicts(name, dict(leaves(figures)))
    for one in found:
        print(one, flush=True)
    if found:
        figures["expected"] = [str(one) for one in found]


if __name__ == "__main__":
    sys.exit(main())
