"""Compare init and stats with PEFT, and with the forward passes of the whole model.

    python examples/benchmarks/init.py                  two layers: some minutes
    python examples/benchmarks/init.py --layers 22      all of TinyLlama's: PEFT's pissa takes 8 min
    python examples/benchmarks/init.py --only olora --repeat 5
    python examples/benchmarks/init.py --json init.json

A Llama of TinyLlama's widths (hidden 2048, intermediate 5632) in bfloat16, adapters of rank 16 on
all linear layers. Its weights' singular values fall as 1/i (decaying), or the weights are Gaussian
(flat: the leading values nearly touch). PEFT's time is that of get_peft_model on the model in
memory; adapterkit's that of the whole `init`, which reads the checkpoint and writes the adapter,
and with `written` the base. Neither counts imports, nor PEFT the loading. Both use all cores.

The error is that of the singular values of a layer's factors against float64's, relative, the
largest. Memory is the peak of anonymous memory of the whole process, sampled every 20 ms; PEFT's
includes the model. Stats: covariances of the layers' inputs, compared with forward passes of the
same batches in the whole model. Processes take turns; all figures are medians.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import common

RANK = 16
SPECTRA = ("decaying", "flat")
VOCABULARY = 4000
TRAILING = ("milora", "mica")  # methods of the smallest singular values
SAMPLES, LENGTH, BATCH = 16, 512, 4  # of stats

OURS = """
import json, sys, time
import adapterkit
base, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
job = lambda **more: adapterkit.init(base, out=out, targets="all-linear", **options, **more)
job(dry_run=True)  # imports
start = time.perf_counter()
job()
print(f"seconds={time.perf_counter() - start}")
"""

PEFT = """
import json, sys, time, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
start = time.perf_counter()
model = get_peft_model(model, config)
seconds = time.perf_counter() - start
named = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters()}
layer = {name: p.contiguous() for name, p in named.items() if ".0." in name and "lora_" in name}
save_file(layer, out)
print(f"seconds={seconds}")
"""

STATS = """
import sys, time
import adapterkit
base, data, out, *sizes = sys.argv[1:]
sizes = dict(zip(("samples", "length", "batch"), map(int, sizes)))
job = lambda **more: adapterkit.stats(base, data=data, out=out, **sizes, **more)
job(dry_run=True)  # imports
start = time.perf_counter()
job()
print(f"seconds={time.perf_counter() - start}")
"""

FORWARD = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
base, data, out, samples, length, batch = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
ids = torch.tensor([json.loads(line)["input_ids"] for line in open(data)])
start = time.perf_counter()
with torch.no_grad():
    for part in ids.split(int(batch)):
        model(part, use_cache=False)
print(f"seconds={time.perf_counter() - start}")
"""


# --- checkpoints ----------------------------------------------------------------------------------


def make_base(folder: Path, layers: int, spectrum: str) -> Path:
    """Write the checkpoint, one shard a layer, unless it is there already. The layers' weights are
    the first one's with rows and columns in another order: the same singular values."""
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        return folder
    config = common.config_for(2) | {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    part = common.fresh(folder.with_name(folder.name + ".part"))
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * common.STD
    first = {
        module: draw(*shape) if spectrum == "flat" else decaying(shape, generator)
        for module, shape in common.layer_shapes(config).items()
    }
    shards: dict[str, dict] = {}
    for key, shape in common.model_shapes(config):
        number = int(key.split(".")[2]) if key.startswith("model.layers.") else layers
        module = key.removeprefix(f"model.layers.{number}.").removesuffix(".weight")
        if len(shape) == 1:
            tensor = torch.ones(shape)
        elif module in first:
            rows, columns = (torch.randperm(size, generator=generator) for size in shape)
            tensor = first[module][rows][:, columns] if number else first[module]
        else:
            tensor = draw(*shape)
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        shards.setdefault(name, {})[key] = tensor.bfloat16()
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, part / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": common.folder_bytes(part)}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (part / "config.json").write_text(json.dumps(config, indent=2))
    return part.rename(folder)


def decaying(shape: tuple[int, int], generator):
    """Singular values that fall as 1/i, as large together as those of Gaussian weights."""
    import torch

    k = min(shape)
    s = 1 / torch.arange(1, k + 1)
    s *= common.STD * (shape[0] * shape[1]) ** 0.5 / s.norm()
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
    return u * s @ v.T


def true_values(base: Path) -> dict:
    """Module of the first layer -> all singular values, falling, float64; kept in a file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = base.with_name(base.name + "-values.safetensors")
    if not file.exists():
        values = {}
        first = next(path for path in sorted(base.glob("*.safetensors")))
        with safe_open(first, "pt") as stored:
            for key in stored.keys():
                weight = stored.get_tensor(key).double()
                if weight.ndim == 2 and ".layers.0." in key:
                    gram = (
                        weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
                    )
                    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
                    values[key.removesuffix(".weight")] = squares.sqrt()
        save_file(values, file)
    return load_file(file)


def make_data(file: Path) -> Path:
    """Samples of random tokens, as `stats` reads them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    file.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    return file


# --- init -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to initialize; `method` says which values its factors have."""

    name: str
    method: str
    code: str
    options: dict


def ways(only: str | None) -> list[Way]:
    implicit, written = {"residual": "implicit"}, {"residual": "write"}
    ours = lambda method, more: {"method": method, "rank": RANK, "alpha": RANK, **more}
    theirs = lambda method: {"r": RANK, "lora_alpha": RANK, "init_lora_weights": method}
    rows = [
        Way("pissa, implicit", "pissa", OURS, ours("pissa", implicit)),
        Way("pissa, written", "pissa", OURS, ours("pissa", written)),
        Way("PEFT pissa", "pissa", PEFT, theirs("pissa")),
        Way("PEFT pissa_niter_16", "pissa", PEFT, theirs("pissa_niter_16")),
        Way("olora, implicit", "olora", OURS, ours("olora", implicit)),
        Way("olora, written", "olora", OURS, ours("olora", written)),
        Way("PEFT olora", "olora", PEFT, theirs("olora")),
        Way("milora, implicit", "milora", OURS, ours("milora", implicit)),
        Way("milora, written", "milora", OURS, ours("milora", written)),
        Way("mica", "mica", OURS, ours("mica", {})),
        Way("PEFT mica", "mica", PEFT, theirs("mica")),
    ]
    return [way for way in rows if only is None or way.method in only.split(",")]


def measure(base: Path, work: Path, layers: int, repeat: int, only: str | None) -> dict[str, dict]:
    """Way -> seconds a layer, the peak, the error of the singular values."""
    out, chosen = work / "run", ways(only)
    rows: dict[str, dict] = {way.name: {"seconds": [], "peak": []} for way in chosen}
    for turn in range(repeat):
        for way in chosen:
            common.fresh(out)
            place = out / ("out" if way.code is OURS else "layer.safetensors")
            argv = [sys.executable, "-c", way.code, str(base), str(place), json.dumps(way.options)]
            timing = common.time_process(argv, environment())
            rows[way.name]["seconds"].append((timing.reported or timing.wall) / layers)
            rows[way.name]["peak"].append(timing.peak)
            if turn == 0 and way.method in ("pissa", "milora"):
                file = place if place.is_file() else place / "adapter/adapter_model.safetensors"
                rows[way.name]["error"] = error(file, true_values(base), way.method)
    common.fresh(out)
    return {
        name: row | {"seconds": median(row["seconds"]), "peak": median(row["peak"])}
        for name, row in rows.items()
    }


def error(file: Path, exact: dict, method: str) -> float:
    """The largest error of the singular values of b @ a, relative to the value."""
    import torch
    from safetensors.torch import load_file

    factors, worst = load_file(file), 0.0
    for module, values in exact.items():
        a, b = (
            factors[f"base_model.model.{module}.{name}.weight"].double()
            for name in ("lora_A", "lora_B")
        )
        core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        expected = values[-RANK:] if method in TRAILING else values[:RANK]
        worst = max(worst, float((torch.linalg.svdvals(core) / expected - 1).abs().max()))
    return worst


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(common.REPOSITORY), os.environ.get("PYTHONPATH")]))
    threads = str(len(os.sched_getaffinity(0)))
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}


# --- stats ----------------------------------------------------------------------------------------


def measure_stats(work: Path, depths: Iterable[int], repeat: int) -> dict[int, dict]:
    """Layers -> seconds and peak of stats and of the forward passes, and their ratio."""
    data, rows = make_data(work / "samples.jsonl"), {}
    for layers in depths:
        base = make_base(work / f"init-flat-{layers}", layers, "flat")
        runs: dict[str, list] = {"stats": [], "forward passes": []}
        for _ in range(repeat):
            for name, code in zip(runs, (STATS, FORWARD), strict=True):
                out = common.fresh(work / "run") / "stats.safetensors"
                sizes = (str(size) for size in (SAMPLES, LENGTH, BATCH))
                argv = [sys.executable, "-c", code, str(base), str(data), str(out), *sizes]
                runs[name].append(common.time_process(argv, environment()))
        row: dict = {
            name: {
                "seconds": median(one.reported or one.wall for one in timings),
                "peak": median(one.peak for one in timings),
            }
            for name, timings in runs.items()
        }
        pairs = zip(runs["stats"], runs["forward passes"], strict=True)
        row["ratio"] = median(
            (ours.reported or ours.wall) / (theirs.reported or theirs.wall)
            for ours, theirs in pairs
        )
        rows[layers] = row
    common.fresh(work / "run")
    return rows


# --- the report -----------------------------------------------------------------------------------


def print_init(spectrum: str, rows: dict[str, dict]) -> None:
    heads = ("s a layer", "PEFT / ours", "peak MiB", "error")
    print(f"\n{spectrum:22}", *(head.rjust(12) for head in heads))
    for name, row in rows.items():
        peer = rows.get(f"PEFT {name.partition(',')[0]}", {}).get("seconds")
        cells = [
            f"{row['seconds']:.3f}",
            f"{peer / row['seconds']:.1f}" if peer and not name.startswith("PEFT") else "",
            f"{row['peak'] / 2**20:.0f}",
            f"{row['error']:.1e}" if "error" in row else "",
        ]
        print(f"{name:22}", *(cell.rjust(12) for cell in cells))


def print_stats(rows: dict[int, dict]) -> None:
    heads = ("stats s", "forward s", "ratio", "stats MiB", "forward MiB")
    print(f"\n{'stats, layers':22}", *(head.rjust(12) for head in heads))
    for layers, row in rows.items():
        ours, theirs = row["stats"], row["forward passes"]
        cells = [f"{ours['seconds']:.2f}", f"{theirs['seconds']:.2f}", f"{row['ratio']:.2f}"]
        cells += [f"{side['peak'] / 2**20:.0f}" for side in (ours, theirs)]
        print(f"{layers:<22}", *(cell.rjust(12) for cell in cells))


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of the checkpoints (2)")
    parser.add_argument("--depths", default="2,4,8", help="layers of the models of stats (2,4,8)")
    parser.add_argument("--only", help="methods, with commas between; `stats` is one")
    parser.add_argument("--spectra", default=",".join(SPECTRA), help="decaying,flat")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "peft", "transformers")
    report |= {"rank": RANK, "layers": args.layers, "repeat": args.repeat, "init": {}}
    for spectrum in args.spectra.split(",") if args.only != "stats" else ():
        base = make_base(args.work / f"init-{spectrum}-{args.layers}", args.layers, spectrum)
        true_values(base)
        common.warm(base)
        rows = measure(base, args.work, args.layers, args.repeat, args.only)
        report["init"][spectrum] = rows
        print_init(spectrum, rows)
    if args.only is None or "stats" in args.only.split(","):
        depths = [int(depth) for depth in args.depths.split(",")]
        report["stats"] = measure_stats(args.work, depths, args.repeat)
        print_stats(report["stats"])
    lock.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
