"""Measure planning at real size: headers of the largest open checkpoints without their data, and
merges over stacks of experts.

    python examples/benchmarks/plan.py                            all plans and merges, two tables
    python examples/benchmarks/plan.py --only DeepSeek            cases whose name holds one of
                                                                  these, comma-separated
    python examples/benchmarks/plan.py --experts 8,32,128 --size 0.3
    python examples/benchmarks/plan.py --json plan.json

Each base has the published names, shapes, dtypes and number of files. The files are sparse, so five
checkpoints of 3 TB take some MB on disk. Boundaries of published files are not copied: tensors are
in the model's order, in files of one size. Each plan is a process of its own. It first plans a
two-layer model of the same kind, so that imports (torch, transformers, the model's code) do not
count, and then `CPU s` (user + system) and `wall s` are measured for the real one. `peak MB` is the
whole process, imports included. `requests` is the number of ranges that planning would request from
a remote folder. Merges are over random values, through `target_parameters`, by the size of all
experts, whatever their number.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import common
from checkpoints import BASES, LINEAR, make_adapter, make_base, qwen

PLAN = """
import gc, json, re, sys, time
from pathlib import Path
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.verb import MergeOptions

class Remote:
    "A folder whose ranges are counted, as one that is not here."
    def __init__(self, path):
        self.folder, self.requests = LocalFolder(path), 0
        self.name, self.label = self.folder.name, self.folder.label
        self.origin, self.hashes = self.folder.origin, self.folder.hashes
    def files(self): return self.folder.files()
    def path(self, name): return self.folder.path(name)
    def prefetch(self, names): pass
    def read(self, name, start, stop):
        self.requests += 1
        return self.folder.read(name, start, stop)

gc.set_threshold(100_000, 50, 50)  # as the command does; half as much again with Python's own
small, small_adapter, base, adapter, remote = sys.argv[1:]
plan_merge(kind_of(LocalFolder(small)), [(LocalFolder(small_adapter), 1.0)], MergeOptions())
folder = Remote(base) if remote == "1" else LocalFolder(base)
wall, cpu = time.perf_counter(), time.process_time()
plan = plan_merge(kind_of(folder), [(LocalFolder(adapter), 1.0)], MergeOptions())
totals = plan.totals()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
requests = getattr(folder, "requests", None)
times = {"cpu": cpu, "wall": wall, "peak": peak}
print(json.dumps({**times, "requests": requests, "totals": totals}))
"""

MERGE = """
import json, sys, time, torch
from adapterkit import merge
base, adapter, out, workers = sys.argv[1:]
merge(base, [adapter], out=out, dry_run=True)
wall, cpu = time.perf_counter(), time.process_time()
receipt = merge(base, [adapter], out=out)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"cpu": cpu, "wall": wall, "totals": receipt.data["totals"]}))
"""


# --- plans ----------------------------------------------------------------------------------------


def child(code: str, *argv: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True
    )
    if done.returncode:
        raise common.ProcessFailed(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def plans(args: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for base in BASES:
        for experts in (False, True)[: 1 + base.experts]:
            name = base.name + (
                ", attention and experts"
                if experts
                else ", all linear"
                if base.modules == LINEAR
                else ", attention"
            )
            if args.only and not any(word in name for word in args.only.split(",")):
                continue
            folders = []
            for word, sizes, shards in (("small", base.small, 1), ("base", {}, base.shards)):
                config, tensors = base.shape(**sizes)
                folders.append(
                    make_base(args.work / f"{base.name}-{word}", config, tensors, shards)
                )
                config, tensors = base.shape(**sizes)
                adapter = (
                    args.work / f"{base.name}-{word}-adapter-{'experts' if experts else 'modules'}"
                )
                folders.append(make_adapter(adapter, config, tensors, base.modules, experts))
            runs = [child(PLAN, *folders, 0) for _ in range(args.repeat)]
            far = child(PLAN, *folders, 1)
            index = json.loads((folders[2] / "model.safetensors.index.json").read_text())
            results[name] = {
                "bytes": index["metadata"]["total_size"],
                "tensors": len(index["weight_map"]),
                "cpu_seconds": [round(run["cpu"], 3) for run in runs],
                "wall_seconds": [round(run["wall"], 3) for run in runs],
                "peak_bytes": [run["peak"] for run in runs],
                "requests": far["requests"],
                "totals": runs[0]["totals"],
            }
            print(f"{name:45} {results[name]['cpu_seconds']} CPU s", file=sys.stderr)
    return results


def plan_table(results: dict[str, dict]) -> None:
    heads = (
        "tensors",
        "CPU s",
        "wall s",
        "peak MB",
        "requests",
        "changed",
        "read GB",
        "written GB",
    )
    print("\n" + "plan".ljust(45), *(head.rjust(10) for head in heads))
    for name, one in results.items():
        totals = one["totals"]
        cells = [
            one["tensors"],
            f"{median(one['cpu_seconds']):.1f}",
            f"{median(one['wall_seconds']):.1f}",
        ]
        cells += [
            f"{median(one['peak_bytes']) / 1e6:.0f}",
            one["requests"],
            totals["tensors_changed"],
        ]
        cells += [f"{totals[key] / common.GB:.1f}" for key in ("bytes_read", "bytes_written")]
        print(name.ljust(45), *(str(cell).rjust(10) for cell in cells))


# --- merges over experts --------------------------------------------------------------------------


def fill(folder: Path) -> None:
    """Fill the holes of a checkpoint or an adapter with small random values."""
    import torch

    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = 8 + int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length - 8))
            generator = torch.Generator().manual_seed(0)
            for entry in (entry for key, entry in table.items() if key != "__metadata__"):
                dtype = torch.bfloat16 if entry["dtype"] == "BF16" else torch.float32
                values = (
                    torch.randn(math.prod(entry["shape"]), generator=generator) * common.STD
                ).to(dtype)
                file.seek(length + entry["data_offsets"][0])
                file.write(values.view(torch.uint8).numpy().data)


def merges(args: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for count in map(int, args.experts.split(",") if args.experts else ()):
        layers, hidden = 4, 1024
        inner = max(8, round(args.size * common.GB / (layers * 6 * hidden * count)))
        sizes = {
            "layers": layers,
            "experts": count,
            "hidden": hidden,
            "inner": inner,
            "heads": 8,
            "vocab": 1000,
        }
        name = f"experts-{count}-{args.size:g}GB"
        folders = [args.work / f"{name}-base", args.work / f"{name}-adapter"]
        if not all(folder.exists() for folder in folders):
            make_base(folders[0], *qwen(**sizes), 2)
            make_adapter(folders[1], *qwen(**sizes), (), True)
            for folder in folders:
                fill(folder)
        runs = []
        for _ in range(args.repeat):
            common.fresh(args.work / "run")
            common.warm(*folders)
            runs.append(child(MERGE, *folders, args.work / "run" / "out", 0))
        results[str(count)] = {
            "bytes": common.folder_bytes(folders[0]),
            "cpu_seconds": [round(run["cpu"], 3) for run in runs],
            "wall_seconds": [round(run["wall"], 3) for run in runs],
            "bytes_read": runs[0]["totals"]["bytes_read"],
        }
        print(
            f"merge over {count} experts {results[str(count)]['cpu_seconds']} CPU s",
            file=sys.stderr,
        )
    return results


def merge_table(results: dict[str, dict]) -> None:
    print(
        "\n" + "merge through target_parameters".ljust(45),
        *(head.rjust(10) for head in ("GB", "CPU s", "wall s", "read GB")),
    )
    for count, one in results.items():
        cells = [f"{one['bytes'] / common.GB:.2f}", f"{median(one['cpu_seconds']):.1f}"]
        cells += [f"{median(one['wall_seconds']):.1f}", f"{one['bytes_read'] / common.GB:.2f}"]
        print(f"{count} experts".ljust(45), *(cell.rjust(10) for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="plans whose names hold one of these words, comma-separated")
    parser.add_argument(
        "--experts",
        default="8,32,128",
        help="numbers of experts to merge over, comma-separated; '' for none",
    )
    parser.add_argument(
        "--size", type=float, default=0.3, help="GB of the experts merged over (0.3)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="rounds (1)")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-benchmark"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "transformers") | {
        "repeat": args.repeat,
        "size": args.size,
    }
    report |= {"plans": plans(args), "merges": merges(args)}
    lock.close()
    plan_table(report["plans"])
    merge_table(report["merges"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
