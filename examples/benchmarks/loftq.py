"""Compare LoftQ and quantize with bitsandbytes and the full singular value decomposition, and with
transformers.

    python examples/benchmarks/loftq.py                      one LoftQ iteration on a layer of 2048,
                                                             whole commands on 2 GB
    python examples/benchmarks/loftq.py --size 1 --repeat 1  sooner
    python examples/benchmarks/loftq.py --json loftq.json

One iteration quantizes a weight to nf4 in blocks of 64, decodes it and takes the best approximation
of rank 16 of what is lost. adapterkit runs as its engine does: as many weights at a time as there
are cores, each in one thread; a weight's time is the wall time of two rounds over their number, its
parts are the threads' shares of that. The other side is PEFT's way: bitsandbytes and
torch.linalg.svd(full_matrices=False), one weight at a time on all cores (PEFT itself asks for a
GPU). Both work on the same weights, and their errors, ‖W - Q - b@a‖ / ‖W‖ in Frobenius norm, must
agree. Processes take turns; all figures are medians.

Whole commands, imports included, on a Llama of these widths: `adapterkit loftq`,
`adapterkit quantize`, and transformers' from_pretrained(quantization_config=...) with
save_pretrained. Memory is anonymous memory, sampled every 20 ms; next to it is that of a dry
run, which has planned and imported everything but read no weight.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import common

RANK = 16
AGREE = 1e-4  # relative difference of the errors
SHAPES = {  # of a layer: name -> (out, in), how many
    "q_proj, o_proj": ((2048, 2048), 2),
    "k_proj, v_proj": ((256, 2048), 2),
    "gate_proj, up_proj": ((5632, 2048), 2),
    "down_proj": ((2048, 5632), 1),
}
PARTS = ("quantize", "decode", "low_rank")

WEIGHTS = """
import json, sys, time
from collections import defaultdict
import torch

shapes, rank, std, cores = json.loads(sys.argv[1])

def weights(shape, count):
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = (torch.randn(shape, generator=generator) * std for _ in range(count))
    return [weight.bfloat16().float() for weight in drawn]

def timed(part, function):
    def run(*args, **named):
        start = time.perf_counter()
        result = function(*args, **named)
        spent[part] += time.perf_counter() - start  # of one thread: each has its own
        return result
    return run
"""

OURS = """
from concurrent.futures import ThreadPoolExecutor
from threading import local
from adapterkit.bases.quantized.codecs.bnb4 import Bnb4
from adapterkit.bases.quantized import loftq
from adapterkit.core.weights.codec import PlainWeight

class Spent(local):
    def __init__(self): self.parts = defaultdict(float)
    def __getitem__(self, part): return self.parts[part]
    def __setitem__(self, part, seconds): self.parts[part] = seconds

class Timed:
    def __init__(self, packed):
        self.encode, self.decode = timed("quantize", packed.encode), timed("decode", packed.decode)

def one(weight):
    torch.set_num_threads(1)
    spent.parts = defaultdict(float)
    packed = Bnb4.for_encoding("nf4", PlainWeight("w", tuple(weight.shape), "BF16", False), {})
    with torch.inference_mode():
        return loftq.alternate(weight, Timed(packed), rank, 1).after, spent.parts

spent = Spent()
loftq.subspace.near_optimal_svd = timed("low_rank", loftq.subspace.near_optimal_svd)
pool, found = ThreadPoolExecutor(cores), {}
list(pool.map(one, weights((256, 256), 2 * cores)))
for name, shape in shapes.items():
    many = weights(shape, 2 * cores)  # threads seldom end together
    start = time.perf_counter()
    results = list(pool.map(one, many))
    seconds = (time.perf_counter() - start) / len(many)
    runs = cores * len(many)
    parts = {part: sum(each[part] for _, each in results) / runs for part in results[0][1]}
    found[name] = {"seconds": seconds, **parts, "error": results[0][0]}
print(json.dumps(found))
"""

THEIRS = """
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

def decompose(matrix):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.sqrt(torch.diag(s)[:, :rank]), torch.sqrt(torch.diag(s)[:rank]) @ vh

def one(weight):
    packed, state = timed("quantize", quantize_4bit)(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    rest = weight - timed("decode", dequantize_4bit)(packed, state)
    b, a = timed("low_rank", decompose)(rest)
    return rest, b, a

torch.set_num_threads(cores)
spent, found = defaultdict(float), {}
one(weights((256, 256), 1)[0])
for name, shape in shapes.items():
    weight = weights(shape, 1)[0]
    spent = defaultdict(float)
    start = time.perf_counter()
    rest, b, a = one(weight)
    seconds = time.perf_counter() - start
    error = float((rest - b @ a).double().norm() / weight.double().norm())
    found[name] = {"seconds": seconds, **spent, "error": error}
print(json.dumps(found))
"""

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, out = sys.argv[1:]
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(
    base, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
)
model.save_pretrained(out)
"""


# --- one iteration --------------------------------------------------------------------------------


def iterations(repeat: int, cores: int) -> dict[str, dict[str, dict]]:
    """Side -> name -> medians of a weight's seconds, whole and in parts, and its error."""
    runs: dict[str, list[dict]] = {"adapterkit": [], "bitsandbytes + svd": []}
    said = json.dumps(
        [{name: shape for name, (shape, _) in SHAPES.items()}, RANK, common.STD, cores]
    )
    for _ in range(repeat):
        for side, code in zip(runs, (OURS, THEIRS), strict=True):
            runs[side].append(last_line([sys.executable, "-c", WEIGHTS + code, said]))
    return {
        side: {name: medians([run[name] for run in found]) for name in SHAPES}
        for side, found in runs.items()
    }


def last_line(argv: list[str]) -> dict:
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise common.ProcessFailed("\n".join(done.stderr.splitlines()[-12:]))
    return json.loads(done.stdout.splitlines()[-1])


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(row[key] for row in rows) for key in rows[0]}


def whole_layer(side: dict[str, dict]) -> dict[str, float]:
    """Seconds of all seven weights of a layer."""
    return {
        key: sum(side[name][key] * count for name, (_, count) in SHAPES.items())
        for key in ("seconds", *PARTS)
    }


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(common.REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


# --- whole commands -------------------------------------------------------------------------------


def commands(base: Path, out: Path, repeat: int, peers: bool) -> dict[str, dict]:
    """Command -> seconds of each round, bytes written, the peak, and the peak of a dry run."""
    loftq, nf4 = ["loftq", str(base), "--rank", str(RANK)], ["quantize", str(base), "--to", "nf4"]
    found = {
        f"loftq --rank {RANK} --iterations 1": verb(*loftq, "--iterations", "1", out=out),
        f"loftq --rank {RANK}": verb(*loftq, out=out),
        "quantize --to nf4": verb(*nf4, out=out),
        "quantize --to nf4 --double-quant": verb(*nf4, "--double-quant", out=out),
    }
    if peers:
        found["transformers, load in nf4 and save"] = [
            sys.executable,
            "-c",
            TRANSFORMERS,
            str(base),
            str(out),
        ]
    rows = {name: {"seconds": [], "peak": 0, "written": 0} for name in found}
    for _ in range(repeat):
        for name, argv in found.items():
            common.fresh(out.parent)
            os.sync()
            common.warm(base)
            timing = common.time_process(argv, environment())
            rows[name]["seconds"].append(timing.wall)
            rows[name] |= {
                "peak": max(rows[name]["peak"], timing.peak),
                "written": common.folder_bytes(out),
            }
    for name, argv in found.items():
        if "adapterkit" in argv:
            rows[name]["peak_dry_run"] = common.time_process(
                [*argv, "--dry-run"], environment()
            ).peak
    common.fresh(out.parent)
    return rows


def verb(*words: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "adapterkit",
        *words,
        "--out",
        str(out),
        "--quiet",
        "--device",
        "cpu",
    ]


# --- the report -----------------------------------------------------------------------------------


def print_iterations(sides: dict[str, dict[str, dict]]) -> None:
    heads = ("shape", "side", "ms", *(part.replace("_", "-") for part in PARTS), "ratio", "error")
    print(
        f"{'one iteration, a weight':22}",
        *(head.rjust(12 if i != 1 else 20) for i, head in enumerate(heads)),
    )
    theirs = list(sides)[1]
    for name in [*SHAPES, "layer"]:
        for side, found in sides.items():
            row = found[name]
            shape = "x".join(map(str, SHAPES[name][0])) if name in SHAPES else ""
            times = [f"{1000 * row[key]:.1f}" for key in ("seconds", *PARTS)]
            ratio = f"{sides[theirs][name]['seconds'] / row['seconds']:.1f}"
            error = f"{row['error']:.6f}" if "error" in row else ""
            cells = [shape, side, *times, ratio, error]
            print(f"{name:22}", *(cell.rjust(12 if i != 1 else 20) for i, cell in enumerate(cells)))


def print_commands(rows: dict[str, dict], nbytes: int) -> None:
    heads = ("seconds", "peak MiB", "dry run", "MB written")
    print(
        f"\n{f'{nbytes / common.GB:.2f} GB, whole process':36}", *(head.rjust(12) for head in heads)
    )
    for name, row in rows.items():
        dry = f"{row['peak_dry_run'] / 2**20:.0f}" if "peak_dry_run" in row else "-"
        cells = [
            f"{median(row['seconds']):.2f}",
            f"{row['peak'] / 2**20:.0f}",
            dry,
            f"{row['written'] / 1e6:.0f}",
        ]
        print(f"{name:36}", *(cell.rjust(12) for cell in cells))


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument(
        "--size", type=float, default=2, help="GB of the checkpoint (2); 0: one iteration only"
    )
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="whole commands: adapterkit's alone"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "bitsandbytes", "transformers")
    sides = iterations(args.repeat, report["cores"])
    ours, theirs = sides.values()
    apart = {name: abs(ours[name]["error"] / theirs[name]["error"] - 1) for name in SHAPES}
    for side in sides.values():
        side["layer"] = whole_layer(side)
    print_iterations(sides)
    print(f"errors differ by {max(apart.values()):.1e} at most, relative")
    report |= {"rank": RANK, "repeat": args.repeat, "iteration": sides, "errors_apart": apart}
    if args.size:
        base = common.make_base(args.work / f"base-{args.size:g}GB-1", args.size, 1)
        nbytes = common.folder_bytes(base)
        report["commands"] = {
            "bytes": nbytes,
            **commands(base, args.work / "run" / "out", args.repeat, args.peers),
        }
        print_commands(
            {name: row for name, row in report["commands"].items() if name != "bytes"}, nbytes
        )
    lock.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(max(apart.values()) > AGREE)


if __name__ == "__main__":
    sys.exit(main())
