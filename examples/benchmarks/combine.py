"""Compare combining, resizing and extracting adapters with PEFT and with the full singular value
decomposition.

    python examples/benchmarks/combine.py                      three r=16 adapters on 22 layers of
                                                               2048, a table
    python examples/benchmarks/combine.py --large              also on 32 layers of 4096 (a 7B
                                                               model's shape)
    python examples/benchmarks/combine.py --extract            also extract, against the full SVD of
                                                               each difference
    python examples/benchmarks/combine.py --json combine.json

adapterkit combines all layers, as a whole process (imports included) and in process. PEFT's
`add_weighted_adapter` runs in process on one layer of the same shapes, built by transformers; the
times per layer are compared. `svd` and `ties_svd` are PEFT's names; adapterkit's results are the
same deltas (see the tests). PEFT and others apply the full SVD to each dense delta.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median

import common

ADAPTERS = 3
DENSITY = "0.2"
# hidden, intermediate, heads, layers
SHAPES = {"2048": (2048, 5632, 16, 22), "4096": (4096, 11008, 32, 32)}

ADAPTERKIT = """
import sys, time, torch, json
from adapterkit.core.engine import local
from adapterkit.verbs.combine.planning import {verb} as planner
from adapterkit.verbs.combine.records import {verb}
start = time.perf_counter()
{verb}.{verb}(**json.loads(sys.argv[1]))
print(f"seconds={{time.perf_counter() - start}}")
"""

PEFT = """
import sys, time, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
hidden, inner, heads = map(int, sys.argv[1:4])
kind, density = sys.argv[4], float(sys.argv[5])
config = LlamaConfig(
    hidden_size=hidden,
    intermediate_size=inner,
    num_attention_heads=heads,
    num_key_value_heads=max(1, heads // 4),
    head_dim=128,
    num_hidden_layers=1,
    vocab_size=1000,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="0")
for name in ("1", "2"):
    model.add_adapter(name, lora)
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(0, 0.02)
more = {} if kind == "svd" else {"density": density}
start = time.perf_counter()
with torch.no_grad():
    weights = [1.0, 0.5, 0.7]
    model.add_weighted_adapter(["0", "1", "2"], weights, "new", combination_type=kind, **more)
print(f"seconds={time.perf_counter() - start}")
"""

FULL_SVD = """
import sys, time, torch, json
shapes = json.loads(sys.argv[1])
start = time.perf_counter()
for out, width in shapes:
    delta = torch.randn(out, 16) @ torch.randn(16, width)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    a, b = vh[:8], u[:, :8] * s[:8]
print(f"seconds={time.perf_counter() - start}")
"""


def config_of(shape: str) -> dict:
    hidden, inner, heads, layers = SHAPES[shape]
    config = common.config_for(2) | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    return config | {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}


def adapters_of(work: Path, shape: str) -> list[Path]:
    folders = [work / f"adapter-{shape}-{seed}" for seed in range(ADAPTERS)]
    return [
        common.make_adapter(folder, config_of(shape), "float32", seed=seed)
        for seed, folder in enumerate(folders)
    ]


def adapterkit_row(verb: str, sources: list[str], options: dict, out: Path, repeat: int) -> dict:
    """Seconds of the whole command and of the verb alone, and the peak of anonymous memory."""
    flags = [
        word
        for key, value in options.items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    argv = [
        sys.executable,
        "-m",
        "adapterkit",
        verb,
        *sources,
        *flags,
        "--out",
        str(out),
        "--quiet",
    ]
    named = {"combine": {"adapters": sources}, "resize": {"adapter": sources[0]}}
    arguments = named.get(verb) or {"base": sources[0], "tuned": sources[1]}
    inside = [
        sys.executable,
        "-c",
        ADAPTERKIT.format(verb=verb),
        json.dumps(arguments | options | {"out": str(out)}),
    ]
    env, found = {"PYTHONPATH": str(common.REPOSITORY)}, {"whole": [], "inside": [], "peak": 0}
    for _ in range(repeat):
        for name, command in (("whole", argv), ("inside", inside)):
            shutil.rmtree(out, ignore_errors=True)
            timing = common.time_process(command, env)
            found[name].append(timing.wall if name == "whole" else timing.reported)
            found["peak"] = max(found["peak"], timing.peak)
    shutil.rmtree(out, ignore_errors=True)
    return found


def peft_seconds(shape: str, kind: str) -> float:
    """PEFT's time for one layer."""
    hidden, inner, heads, _ = SHAPES[shape]
    argv = [sys.executable, "-c", PEFT, *map(str, (hidden, inner, heads)), kind, DENSITY]
    return common.time_process(argv, {"HF_HUB_OFFLINE": "1"}).reported or 0.0


def full_svd_seconds(shape: str) -> float:
    """The full SVD of one layer's deltas."""
    shapes = list(common.layer_shapes(config_of(shape)).values())
    return common.time_process([sys.executable, "-c", FULL_SVD, json.dumps(shapes)]).reported or 0.0


def combined(work: Path, shape: str, repeat: int, peft: bool) -> dict:
    """Combinations of three adapters and a resize of one, with PEFT's and others' times for one
    layer."""
    folders, out, rows = (
        [str(folder) for folder in adapters_of(work, shape)],
        work / "run" / "out",
        {},
    )
    weighted = [folders[0], folders[1] + "=0.5", folders[2] + "=0.7"]
    layers = SHAPES[shape][3]
    kinds = {"cat": {}, "svd": {}} | ({"ties_svd": {"density": float(DENSITY)}} if peft else {})
    for kind, options in kinds.items():
        row = adapterkit_row("combine", weighted, {"method": kind, **options}, out, repeat)
        if peft and kind != "cat":
            row["peft_per_layer"] = peft_seconds(shape, kind)
        rows[f"combine {kind}"] = row | {"layers": layers}
    row = adapterkit_row("resize", folders[:1], {"rank": 8}, out, repeat)
    if peft:
        row["full_svd_per_layer"] = full_svd_seconds(shape)
    return rows | {"resize to 8": row | {"layers": layers}}


def extracted(work: Path, repeat: int) -> dict:
    """extract of rank 16 from a 2 GB base and its merge with an adapter."""
    base = common.make_base(work / "base-2GB-1", 2, 1)
    adapter = common.make_adapter(
        work / "adapter-2GB-float32", json.loads((base / "config.json").read_text()), "float32"
    )
    tuned = work / "tuned-2GB"
    if not tuned.exists():
        argv = [
            sys.executable,
            "-m",
            "adapterkit",
            "merge",
            str(base),
            str(adapter),
            "--out",
            str(tuned),
            "--quiet",
        ]
        common.time_process(argv, {"PYTHONPATH": str(common.REPOSITORY)})
    row = adapterkit_row(
        "extract", [str(base), str(tuned)], {"rank": 16}, work / "run" / "out", repeat
    )
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    return {
        "extract rank 16": row | {"layers": layers, "full_svd_per_layer": full_svd_seconds("2048")}
    }


def print_table(title: str, rows: dict[str, dict]) -> None:
    heads = ("whole s", "inside s", "ms/layer", "other s/layer", "ratio", "peak MiB")
    print(f"\n{title:28}", *(head.rjust(14) for head in heads))
    for name, row in rows.items():
        inside = median(row["inside"])
        per_layer = inside / row["layers"]
        other = row.get("peft_per_layer") or row.get("full_svd_per_layer")
        cells = [f"{median(row['whole']):.2f}", f"{inside:.2f}", f"{1000 * per_layer:.1f}"]
        cells += [f"{other:.2f}", f"{other / per_layer:.0f}"] if other else ["-", "-"]
        print(f"{name:28}", *(cell.rjust(14) for cell in [*cells, f"{row['peak'] / 2**20:.0f}"]))


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--large", action="store_true", help="also a 7B model's shape")
    parser.add_argument("--extract", action="store_true", help="also extract")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "peft", "transformers")
    report["results"] = {"22 layers of 2048": combined(args.work, "2048", args.repeat, peft=True)}
    if args.large:
        report["results"]["32 layers of 4096"] = combined(
            args.work, "4096", args.repeat, peft=False
        )
    if args.extract:
        report["results"]["2 GB checkpoint"] = extracted(args.work, args.repeat)
    for title, rows in report["results"].items():
        print_table(title, rows)
    lock.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
