"""Compare merging an adapter with copying the files, PEFT and mergekit, each as a whole process.

    python examples/benchmarks/merge.py                              2 GB, three rounds, a table
    python examples/benchmarks/merge.py --exact --json merge.json    also counts wrongly rounded
                                                                     elements
    python examples/benchmarks/merge.py --mergekit /path/to/mergekit-yaml
    python examples/benchmarks/merge.py --sizes 0.5,2,8 --repeat 1   adapterkit alone: is its memory
                                                                     flat?
    python examples/benchmarks/merge.py --device cuda                on a GPU
    python examples/benchmarks/merge.py --size 0.2 --only cp,adapterkit    a quick look

Competitors take turns within a round; before each run the output is removed, the disk synced and
the input read once, so that all find it in the page cache. `seconds` is the wall time of the
process, interpreter and imports included, except in the rows `in process`, timed inside it once
torch and the tool are imported (what is imported on first use, such as the model's code in
transformers, still counts). PEFT/this divides like by like. `x +imports` divides by copying the
files, fsync and the imports of torch and adapterkit together. Memory is anonymous memory (no file
mappings), sampled every 20 ms; on CUDA without the memory on the GPU. ADAPTERKIT_FSYNC=0 makes
adapterkit skip fsync: for measuring only, a power cut may then leave a checkpoint of zeros.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import common

ROWS = 64  # of every adapted weight, for --exact
IN_PROCESS = ", in process"
FLOOR = ("cp -r + fsync", "imports")  # what a merge in a process of its own does at the least

FSYNC = """
import os, sys, time
start = time.perf_counter()
for folder, _, names in os.walk(sys.argv[1]):
    for path in [*(os.path.join(folder, name) for name in names), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
print(f"seconds={time.perf_counter() - start}")
"""

IMPORTS = "import torch, adapterkit; adapterkit.merge"

ADAPTERKIT = """
import sys, time, torch
from adapterkit import merge
base, adapter, out, hash, device = sys.argv[1:]
start = time.perf_counter()
merge(base, [adapter], out=out, hash=hash, device=device)
print(f"seconds={time.perf_counter() - start}")
"""

PEFT = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, safe, device = sys.argv[1:]
place = {} if device == "cpu" else {"device_map": {"": device}}
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **place)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe == "safe_merge")
model.save_pretrained(out, max_shard_size="1GB")
print(f"seconds={time.perf_counter() - start}")
"""


@dataclass(frozen=True)
class Competitor:
    name: str
    # command lines, one process each; a step that reports its seconds is believed
    steps: tuple[tuple[str, ...], ...]
    env: dict[str, str] = field(default_factory=dict)
    merges: bool = True  # its output is a merged checkpoint, so --exact looks at it
    both: bool = False  # a row for the whole process and one for what it reports


def adapterkit_cli(base: Path, adapter: Path, out: Path, hash: str, device: str) -> Competitor:
    argv = [sys.executable, "-m", "adapterkit", "merge", str(base), str(adapter), "--out", str(out)]
    argv += ["--hash", hash, "--device", device, "--quiet", "--json"]
    return Competitor(f"adapterkit --hash {hash}", (tuple(argv),), adapterkit_env())


def adapterkit_env() -> dict[str, str]:
    """An environment in which this script's checkout precedes an installed adapterkit."""
    return {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(common.REPOSITORY), os.environ.get("PYTHONPATH")])
        )
    }


def competitors(args: argparse.Namespace, base: Path, adapter: Path, out: Path) -> list[Competitor]:
    python, paths, copy = (
        sys.executable,
        (str(base), str(adapter), str(out)),
        ("cp", "-r", str(base), str(out)),
    )
    found = [
        Competitor("cp -r", (copy,), merges=False),
        Competitor(FLOOR[0], (copy, (python, "-c", FSYNC, str(out))), merges=False),
        Competitor(FLOOR[1], ((python, "-c", IMPORTS),), adapterkit_env(), merges=False),
    ]
    for hash in ("sha256", "none"):
        found.append(adapterkit_cli(base, adapter, out, hash, args.device))
    for fsync, note in (("1", ""), ("0", " no fsync")):
        for hash in ("sha256", "none"):
            argv = (python, "-c", ADAPTERKIT, *paths, hash, args.device)
            env = {**adapterkit_env(), "ADAPTERKIT_FSYNC": fsync}
            found.append(Competitor(f"adapterkit {hash}{note}{IN_PROCESS}", (argv,), env))
    if find_spec("peft") and find_spec("transformers"):
        offline = {"HF_HUB_OFFLINE": "1"}
        found.append(
            Competitor(
                "PEFT", ((python, "-c", PEFT, *paths, "plain", args.device),), offline, both=True
            )
        )
        if args.exact:
            safe = (python, "-c", PEFT, *paths, "safe_merge", args.device)
            found.append(Competitor("PEFT safe_merge", (safe,), offline, both=True))
    else:
        print("skipped: PEFT (peft or transformers is not installed here)")
    if args.mergekit and Path(args.mergekit).exists():
        found.append(mergekit(args, base, adapter, out))
    else:
        print("skipped: mergekit (name its script: --mergekit /path/to/mergekit-yaml)")
    names = args.only.split(",") if args.only else [""]
    return [one for one in found if any(one.name.startswith(name) for name in names)]


def mergekit(args: argparse.Namespace, base: Path, adapter: Path, out: Path) -> Competitor:
    """`model+lora` in a passthrough: mergekit merges with PEFT into a cache (inside `out`), then
    copies that."""
    recipe = args.work / "mergekit.yaml"
    model = json.dumps(f"{base}+{adapter}")
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {model}\ndtype: bfloat16\n")
    argv = [
        args.mergekit,
        str(recipe),
        str(out),
        "--lora-merge-cache",
        str(out / "cache"),
        "--quiet",
    ]
    argv += ["--lora-merge-dtype", "bfloat16", "--out-shard-size", "1B"]
    argv += [] if args.device == "cpu" else ["--device", args.device]
    return Competitor("mergekit", (tuple(argv),), {"HF_HUB_OFFLINE": "1"})


def mergekit_versions(script: str | None) -> dict[str, str]:
    """Versions inside mergekit's own environment, which need not be this one."""
    python = Path(script).absolute().parent / "python" if script else None
    if python is None or not python.exists():
        return {}
    names = ("mergekit", "torch", "peft", "transformers")
    code = f"from importlib.metadata import version\nprint(*map(version, {names}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=False))


def run_once(one: Competitor, base: Path, adapter: Path, out: Path) -> tuple[dict[str, float], int]:
    """Row -> seconds, and the peak in bytes, of one run; the output stays."""
    common.fresh(out.parent)  # with it goes what an interrupted run may have left beside the output
    os.sync()
    common.warm(base, adapter)
    timings = [common.time_process(list(argv), one.env) for argv in one.steps]
    seconds = sum(timing.wall if timing.reported is None else timing.reported for timing in timings)
    wall = sum(timing.wall for timing in timings)
    rows = {one.name: wall, one.name + IN_PROCESS: seconds} if one.both else {one.name: seconds}
    return rows, max(timing.peak for timing in timings)


def measure(
    found: list[Competitor], args: argparse.Namespace, base: Path, adapter: Path, out: Path
) -> dict[str, dict]:
    """Every competitor once per round; one that fails is named and left out of the next rounds."""
    results: defaultdict[str, dict[str, Any]] = defaultdict(
        lambda: {"seconds": [], "peak_anonymous_bytes": []}
    )
    for round_number in range(args.repeat):
        for one in list(found):
            try:
                rows, peak = run_once(one, base, adapter, out)
            except common.ProcessFailed as error:
                print(f"failed: {one.name}: {error}", file=sys.stderr)
                found.remove(one)
                results[one.name] = {"failed": True}
                continue
            for name, seconds in rows.items():
                print(f"round {round_number + 1}  {name:42} {seconds:8.2f} s", file=sys.stderr)
                results[name]["seconds"].append(round(seconds, 4))
                results[name]["peak_anonymous_bytes"].append(peak)
            if args.exact and one.merges and round_number == 0:
                results[one.name]["misrounded"] = misrounded(base, adapter, out)
    shutil.rmtree(out.parent)
    return dict(results)


# --- exactness ------------------------------------------------------------------------------------


def open_tensors(folder: Path) -> dict:
    """Key -> an open file that has it."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def misrounded(base: Path, adapter: Path, out: Path) -> dict[str, float | int]:
    """How many sampled elements are not the bf16 number nearest to W + s*b@a, computed in
    float64."""
    weights, factors, merged = open_tensors(base), open_tensors(adapter), open_tensors(out)
    if missing := weights.keys() - merged.keys():
        raise SystemExit(
            f"the output lacks {len(missing)} of the base's tensors, the first {min(missing)}"
        )
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale, chosen = config["lora_alpha"] / config["r"], random.Random(0)
    wrong, seen, worst = 0, 0, 0.0
    for key_a in sorted(key for key in factors if "lora_A" in key):
        key, key_b = (
            key_a.removeprefix("base_model.model.").replace("lora_A.", ""),
            key_a.replace("lora_A", "lora_B"),
        )
        count = weights[key].get_slice(key).get_shape()[0]
        rows = sorted({0, count - 1, *chosen.sample(range(count), min(ROWS, count))})
        a = factors[key_a].get_tensor(key_a).double().numpy()  # (r, in)
        b = factors[key_b].get_tensor(key_b).double().numpy()[rows]  # (rows, r)
        exact = nearest_bf16(read_rows(weights[key], key, rows) + scale * (b @ a))  # (rows, in)
        differs = exact != read_rows(merged[key], key, rows)
        wrong, seen, worst = (
            wrong + int(differs.sum()),
            seen + differs.size,
            max(worst, float(differs.mean())),
        )
    return {"share": wrong / seen, "worst_weight": worst, "elements": seen}


def read_rows(file, key: str, rows: list[int]):  # (rows, in) float64
    import torch

    part = file.get_slice(key)
    return torch.cat([part[row : row + 1] for row in rows]).double().numpy()


def nearest_bf16(values):  # float64 -> float64
    """Round to 8 significant bits, ties to even. Not `.to(torch.bfloat16)`, which rounds twice, by
    way of float32."""
    import numpy as np

    mantissa, exponent = np.frexp(values)  # values = mantissa * 2**exponent, |mantissa| in [0.5, 1)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)


# --- the report -----------------------------------------------------------------------------------


def print_table(results: dict[str, dict], nbytes: int) -> None:
    medians = {
        name: median(result["seconds"]) for name, result in results.items() if result.get("seconds")
    }

    def ratio(above: float | None, below: float | None) -> str:
        return f"{above / below:.2f}" if above and below else "-"

    floor = [medians[name] for name in FLOOR if name in medians]
    floor = sum(floor) if len(floor) == len(FLOOR) else None
    widths = (42, 22, 6, 6, 11, 10, 10, 9, 11)
    heads = (
        "seconds [min-max]",
        "GB/s",
        "x cp",
        "x cp+fsync",
        "x +imports",
        "PEFT/this",
        "peak MiB",
        "misrounded",
    )
    rows: list[tuple[str, ...]] = [(f"{nbytes / common.GB:.2f} GB", *heads)]
    for name, mid in medians.items():
        result, seconds = results[name], results[name]["seconds"]
        peft = medians.get("PEFT" + IN_PROCESS if name.endswith(IN_PROCESS) else "PEFT")
        rows.append(
            (
                name,
                f"{mid:.2f} [{min(seconds):.2f}-{max(seconds):.2f}]",
                f"{nbytes / mid / common.GB:.2f}",
                ratio(mid, medians.get("cp -r")),
                ratio(mid, medians.get(FLOOR[0])),
                ratio(mid, floor),
                ratio(peft, mid),
                f"{median(result['peak_anonymous_bytes']) / 2**20:.0f}",
                f"{result['misrounded']['share']:.1e}" if "misrounded" in result else "-",
            )
        )
    print()
    for first, *rest in rows:
        print(
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
        )


def prepare(args: argparse.Namespace, size: float) -> tuple[Path, Path]:
    """The checkpoint and the adapter for a size, generated on first use."""
    base = common.make_base(args.work / f"base-{size:g}GB-{args.shard:g}", size, args.shard)
    config = json.loads((base / "config.json").read_text())
    return base, common.make_adapter(
        args.work / f"adapter-{size:g}GB-{args.factors}", config, args.factors
    )


def one_size(args: argparse.Namespace) -> dict:
    base, adapter = prepare(args, args.size)
    out = args.work / "run" / "out"
    results = measure(competitors(args, base, adapter, out), args, base, adapter, out)
    print_table(results, common.folder_bytes(base))
    return {
        "bytes": common.folder_bytes(base),
        "adapter_bytes": common.folder_bytes(adapter),
        "results": results,
    }


def many_sizes(args: argparse.Namespace) -> dict:
    """adapterkit alone; the peak should not follow the size."""
    sizes = {}
    for size in map(float, args.sizes.split(",")):
        base, adapter = prepare(args, size)
        out = args.work / "run" / "out"
        one = adapterkit_cli(base, adapter, out, "sha256", args.device)
        sizes[f"{size:g}"] = {
            "bytes": common.folder_bytes(base),
            "results": measure([one], args, base, adapter, out),
        }
    for result in sizes.values():
        print_table(result["results"], result["bytes"])
    return {"sizes": sizes}


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    parser.add_argument("--size", type=float, default=2, help="GB of the checkpoint (2)")
    parser.add_argument("--sizes", help="GB, comma-separated: adapterkit alone at each size")
    parser.add_argument("--shard", type=float, default=1, help="GB of the largest shard (1)")
    parser.add_argument(
        "--factors", choices=("float32", "bfloat16"), default="float32", help="dtype of the adapter"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:i, for all that can use it"
    )
    parser.add_argument(
        "--only", help="competitors whose names start with one of these, comma-separated"
    )
    parser.add_argument(
        "--mergekit", default=shutil.which("mergekit-yaml"), help="mergekit's script, in any venv"
    )
    parser.add_argument(
        "--exact", action="store_true", help="count the elements that are not correctly rounded"
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    metrics = common.environment("adapterkit", "torch", "safetensors", "transformers", "peft")
    metrics["mergekit_versions"] = mergekit_versions(args.mergekit)
    report = {
        **metrics,
        **{name: getattr(args, name) for name in ("shard", "factors", "repeat", "device")},
    }
    report |= many_sizes(args) if args.sizes else {"size": args.size, **one_size(args)}
    lock.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return int('"failed": true' in json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
