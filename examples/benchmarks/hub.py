"""Compare a merge from Hub to Hub on little disk with download-all, merge, upload-all.

    python examples/benchmarks/hub.py                        2 GB, 500 MB of disk: about 2 minutes
    python examples/benchmarks/hub.py --size 64MB            a look at whether it runs
    python examples/benchmarks/hub.py --json hub.json

The Hub is the tests' own on 127.0.0.1, with Git LFS, queried by the real client. Its line is
limited: 0.68 GB/s down and 0.41 GB/s up were measured to the real one. Here both are a fifth, so
that the two cores, which also serve, are not the bottleneck. Half of the layers have an adapter, so
about half of the shards change.

- `disk`: the most disk used at any time by the client's home (its cache, the job's folder) and the
  output, without the Hub's own files. Sampled every 20 ms.
- `memory`: the most resident anonymous memory of the process.
- `down`, `up`: bytes of all answers and of all uploads; over the minimum, which is the shards that
  changed, and the adapter's file downwards.
- `requests`: of planning (`--dry-run`), and how many of them for each shard.

Both repositories are compared at the end, file by file.
"""

import argparse
import json
import os
import sys
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import common
from merge import adapterkit_env

from adapterkit.core.options import parse_size

sys.path.insert(0, str(common.REPOSITORY))
from tests.support.hub_server import Hub
from tests.support.hub_state import Tree

FULL = 2 * common.GB  # bytes of the base that the other numbers are for
DISK_LIMIT = 500_000_000  # bytes, for FULL
DOWN, UP = 136_000_000, 82_000_000  # bytes in a second
SHARDS = 14  # at least
TOKEN = "hf_benchmark"
ALL = """
import sys
import adapterkit
from huggingface_hub import HfApi, snapshot_download
base, adapter, target, out = sys.argv[1:]
adapterkit.merge(snapshot_download(base), [snapshot_download(adapter)], out=out)
HfApi().create_repo(target)
HfApi().upload_folder(repo_id=target, folder_path=out)
"""


@dataclass(frozen=True)
class Run:
    """The costs of one way of merging."""

    seconds: float
    disk: int  # bytes at the peak, as the other sizes
    memory: int
    down: int
    up: int


class DiskWatch:
    """The most that some folders have taken on disk, while a `with` block runs."""

    def __init__(self, *folders: Path):
        self.folders, self.peak = folders, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(common.SAMPLE_EVERY):
            self.peak = max(self.peak, sum(map(blocks, self.folders)))

    def __enter__(self) -> "DiskWatch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()


def blocks(folder: Path) -> int:
    """Bytes that the files in a folder take on disk; those that go meanwhile count 0."""
    total = 0
    for parent, _, names in os.walk(folder):  # it passes over folders that go meanwhile, too
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def main() -> int:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    size = args.size / common.GB
    base = common.make_base(args.work / f"base-{args.size}", size, size / SHARDS)
    config = json.loads((base / "config.json").read_text())
    half = config | {"num_hidden_layers": config["num_hidden_layers"] // 2}
    adapter = common.make_adapter(args.work / f"adapter-{args.size}", half, "float32")
    common.warm(base, adapter)
    kept = common.fresh(args.work / "hub")
    # files are uploaded whole, so that nothing waits for the server to join parts
    with Hub(token=TOKEN, folder=kept, part_size=args.size) as hub:
        for name, folder in (("org/base", base), ("org/adapter", adapter)):
            hub.commit(name, {path.name: path for path in folder.iterdir()})
        report = measure(args, hub)
    lock.close()
    if args.json:
        about = common.environment("torch", "huggingface_hub") | {"size": args.size}
        args.json.write_text(json.dumps(about | report, indent=2) + "\n")
    return 0 if report["same"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=parse_size, default=FULL, help="of the base, such as 2GB")
    parser.add_argument("--disk-limit", type=parse_size, help="default: 500 MB for 2 GB")
    parser.add_argument(
        "--down", type=parse_size, default=DOWN, help="bytes in a second, such as 136MB"
    )
    parser.add_argument("--up", type=parse_size, default=UP, help="bytes in a second")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the median counts")
    parser.add_argument("--work", type=Path, default=Path("benchmark-hub"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.disk_limit = args.disk_limit or round(DISK_LIMIT * args.size / FULL)
    return args


def measure(args: argparse.Namespace, hub: Hub) -> dict:
    command = [sys.executable, "-m", "adapterkit", "merge", "org/base", "org/adapter", "--quiet"]
    requests = planning(args, hub, command)
    hub.down.rate, hub.up.rate = args.down, args.up
    limit = ["--disk-limit", str(args.disk_limit)]
    streamed, whole = [], []
    for n in range(args.repeat):
        streams = [*command, "--out", f"hf://me/streamed-{n}", *limit]
        streamed.append(run(args, hub, streams))
        out = args.work / "out"
        argv = [sys.executable, "-c", ALL, "org/base", "org/adapter", f"me/whole-{n}", str(out)]
        whole.append(run(args, hub, argv))
    one, other = (head(hub, f"me/{name}-0") for name in ("streamed", "whole"))
    same = all(one[name].sha256 == other[name].sha256 for name in weights(one) | weights(other))
    least = minimum(head(hub, "org/base"), one, head(hub, "org/adapter"))
    results = {"streamed": middle(streamed), "whole": middle(whole)}
    report = {
        "same": same,
        "disk_limit": args.disk_limit,
        "line": {"down": args.down, "up": args.up},
        "minimum": least,
        "requests": requests,
        "runs": {name: asdict(found) for name, found in results.items()},
        "time_ratio": results["streamed"].seconds / results["whole"].seconds,
        "down_ratio": results["streamed"].down / least["down"],
        "up_ratio": results["streamed"].up / least["up"],
    }
    print_report(report)
    return report


def planning(args: argparse.Namespace, hub: Hub, command: list[str]) -> dict[str, int]:
    """Requests of a dry run: all of them, and the most for one file of the base's weights."""
    hub.log.clear()
    home = common.fresh(args.work / "home")
    target = ["--out", "hf://me/planned", "--dry-run", "--json"]
    common.time_process([*command, *target], environment(hub, home))
    shards = Counter(a.path for a in hub.asked("GET", "org/base/resolve") if is_weights(a.path))
    return {"all": len(hub.log), "shards": len(shards), "most_of_a_shard": max(shards.values())}


def run(args: argparse.Namespace, hub: Hub, argv: list[str]) -> Run:
    """One process with an empty cache."""
    home, out = common.fresh(args.work / "home"), common.fresh(args.work / "out")
    out.rmdir()
    hub.log.clear()
    with DiskWatch(home, out) as disk:
        timing = common.time_process(argv, environment(hub, home))
    down, up = (sum(getattr(asked, way) for asked in hub.log) for way in ("sent", "received"))
    return Run(timing.wall, disk.peak, timing.peak, down, up)


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return hub.environment(home.resolve()) | adapterkit_env() | {"HF_TOKEN": TOKEN}


def head(hub: Hub, name: str) -> Tree:
    repo = hub.repos[name]
    return repo.trees[repo.refs["main"]]


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def weights(tree: Tree) -> set[str]:
    return set(filter(is_weights, tree))


def minimum(base: Tree, merged: Tree, adapter: Tree) -> dict[str, int]:
    """Bytes that have to move: of shards that change, and of the adapter."""
    changed = [name for name in weights(merged) if merged[name].sha256 != base[name].sha256]
    down = sum(base[name].size for name in changed) + adapter["adapter_model.safetensors"].size
    return {
        "changed": len(changed),
        "shards": len(weights(merged)),
        "down": down,
        "up": sum(merged[name].size for name in changed),
    }


def middle(runs: list[Run]) -> Run:
    """The run of the middle time."""
    seconds = median(found.seconds for found in runs)
    return min(runs, key=lambda found: abs(found.seconds - seconds))


def print_report(report: dict) -> None:
    least, mb = report["minimum"], lambda n: f"{n / 1e6:,.0f}"
    print(f"{least['changed']} of {least['shards']} shards change; MB:\n")
    print("| | seconds | disk | memory | down | up |\n|---|---|---|---|---|---|")
    for name, found in report["runs"].items():
        sizes = (found[key] for key in ("disk", "memory", "down", "up"))
        print(f"| {name} | {found['seconds']:.1f} | {' | '.join(map(mb, sizes))} |")
    print(f"| minimum | | | | {mb(least['down'])} | {mb(least['up'])} |\n")
    requests = report["requests"]
    print(
        f"disk limit {mb(report['disk_limit'])} MB; time x{report['time_ratio']:.2f}, down "
        f"x{report['down_ratio']:.3f}, up x{report['up_ratio']:.3f}; planning: {requests['all']} "
        f"requests, at most {requests['most_of_a_shard']} for each of {requests['shards']} shards; "
        f"{'the same bytes' if report['same'] else 'DIFFERENT BYTES'}"
    )


if __name__ == "__main__":
    sys.exit(main())
