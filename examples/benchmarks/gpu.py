"""The hour of a GPU: is what it computes right, the same every time, and what does it gain?

    python examples/benchmarks/gpu.py --json gpu.json               all steps, 16 GB, 40 minutes
    python examples/benchmarks/gpu.py --steps facts,right,races
    python examples/benchmarks/gpu.py --device cpu --small          do the steps run? no figures

Data are made in --work, which should be a memory file system. JSON is written after each step, so
that an interrupted hour keeps what it has; a step that fails is named and the next one begins. On a
machine without a GPU it says so and exits with status 2.

| step | what | expected |
|---|---|---|
| facts | bus, versions, copies from pinned and pageable memory, sha256, disk | pinned 50-55 GB/s |
| right | rounding against float64; every verb here and there | 1 ulp in 1e-4 of the elements |
| races | a stream that is late; 1 to 8 workers; TF32 set; kill and resume | one hash |
| speed | shards, hash, workers, ranks; how much overlaps | 15 GB/s, 0.9 of the hash's rate |
| decompositions | SVD, QR, LoftQ, TIES, codecs beside the CPU | 10x SVD and LoftQ, 5x TIES |
| runtime | training steps, rows of 64 adapters, beside PEFT | not slower, not larger |
| limits | little memory, Ctrl-C, resume | a message, then the same bytes |
| peers | loading by safetensors and others | 7-35 GB/s |
"""

import argparse
import json
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import common

sys.path.insert(0, str(common.REPOSITORY))  # the checkout, and its golden jobs


@dataclass(frozen=True)
class Settings:
    """What the steps are given."""

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
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", default=",".join(STEPS), help=", ".join(STEPS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:i; cpu to try the steps")
    parser.add_argument("--size", type=float, default=16.0, help="GB of the timed merges")
    parser.add_argument("--small", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=40.0, help="no step begins after these")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/adapterkit-gpu"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps.split(",")) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}: {', '.join(STEPS)}")
    import torch

    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing is measured", file=sys.stderr)
        return 2
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        arguments.device, arguments.work, 0.02 if arguments.small else arguments.size,
        arguments.small,
    )  # fmt: skip
    report = common.environment("adapterkit", "torch", "peft", "transformers")
    report |= {"device": device_name(settings), "steps": {}}
    started, failed = time.monotonic(), False
    with common.alone(arguments.work):
        for name in arguments.steps.split(","):
            if time.monotonic() - started > 60 * arguments.minutes:
                report["steps"][name] = {"left_out": "no time"}
                continue
            report["steps"][name] = figures = run_step(name, settings)
            failed = failed or "failed" in figures
            print(json.dumps({name: figures}, indent=1), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


def device_name(settings: Settings) -> str:
    import torch

    return torch.cuda.get_device_name(settings.device) if settings.on_gpu else "cpu"


def run_step(name: str, settings: Settings) -> dict:
    import gpu_checks
    import gpu_figures

    step = getattr(gpu_checks, name, None) or getattr(gpu_figures, name)
    began = time.monotonic()
    try:
        figures = step(settings)
    except Exception as error:  # of any step: the hour goes on, and the report names it
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"}
    return figures | {"seconds": round(time.monotonic() - began, 1)}


# in the order of an hour: what is wrong shows first
STEPS = ("facts", "right", "races", "speed", "decompositions", "runtime", "limits", "peers")

if __name__ == "__main__":
    sys.exit(main())
