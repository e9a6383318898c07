"""Compare conversions of an SDXL LoRA between kohya's, diffusers' and PEFT's layouts with `cp` and
with diffusers' own converter.

    python examples/benchmarks/convert.py                    rank 64 on all 722 modules of the UNet
                                                             that kohya's trainer takes, 340 MB
    python examples/benchmarks/convert.py --rank 4 --repeat 1 --json convert.json

Each conversion is a process of its own. Its time is compared with that of `cp` (with fsync, like
adapterkit) and of converting a LoRA of one module, which is mostly imports. Its peak memory is also
measured at a quarter of the rank. diffusers converts in one process, timed with and without the
imports. It reads kohya's layout and writes its own, then reads that and writes kohya's. kohya's
scripts are in no package index.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import common

CROSS = 2048  # width of what the cross-attention sees: both text encoders side by side
# kohya's name of a block with attention, its width, its number of transformer blocks
BLOCKS = (
    *((f"input_blocks_{n}_1", 640, 2) for n in (4, 5)),
    *((f"input_blocks_{n}_1", 1280, 10) for n in (7, 8)),
    ("middle_block_1", 1280, 10),
    *((f"output_blocks_{n}_1", 1280, 10) for n in (0, 1, 2)),
    *((f"output_blocks_{n}_1", 640, 2) for n in (3, 4, 5)),
)
CHAIN = ("diffusers", "peft", "kohya")
FSYNC_COPY = """
import os, shutil, sys, time
start = time.perf_counter()
shutil.copyfile(*sys.argv[1:3])
file = os.open(sys.argv[2], os.O_RDONLY)
os.fsync(file)
print(f"seconds={time.perf_counter() - start}")
"""
DIFFUSERS = """
import sys, time
from types import SimpleNamespace
from diffusers import StableDiffusionXLPipeline as Pipeline
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import load_file, save_file
source, folder, back = sys.argv[1:4]
start = time.perf_counter()
state, alphas = Pipeline.lora_state_dict(source, unet_config=SimpleNamespace(layers_per_block=2))
for key in [key for key in state if key.endswith(("lora.up.weight", "_lora.up.weight"))]:
    plain, of_attention = key.replace(".lora.up.weight", ".alpha"), key.replace("up.", "down.")
    alpha = alphas[plain] if plain in alphas else alphas[f"{of_attention}.alpha"]
    state[key] = state[key] * (alpha / state[key].shape[1])
unet = {key.removeprefix("unet."): value for key, value in state.items()}
Pipeline.save_lora_weights(folder, unet_lora_layers=convert_unet_state_dict_to_peft(unet))
state = load_file(f"{folder}/pytorch_lora_weights.safetensors")
save_file(convert_state_dict_to_kohya(state), back)
print(f"seconds={time.perf_counter() - start}")
"""


def module_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """kohya's name and (out, in) of every module of SDXL's UNet that its trainer takes."""
    for block, width, depth in BLOCKS:
        name = f"lora_unet_{block}"
        yield f"{name}_proj_in", (width, width)
        for n in range(depth):
            inner = f"{name}_transformer_blocks_{n}"
            for attention, seen in (("attn1", width), ("attn2", CROSS)):
                yield f"{inner}_{attention}_to_q", (width, width)
                yield f"{inner}_{attention}_to_k", (width, seen)
                yield f"{inner}_{attention}_to_v", (width, seen)
                yield f"{inner}_{attention}_to_out_0", (width, width)
            yield f"{inner}_ff_net_0_proj", (8 * width, width)
            yield f"{inner}_ff_net_2", (width, 4 * width)
        yield f"{name}_proj_out", (width, width)


def make_lora(path: Path, rank: int, modules: int | None = None) -> Path:
    """A LoRA as kohya's trainer saves it in float16, of the first so many modules."""
    import torch
    from safetensors.torch import save_file

    if path.exists():
        return path
    generator, tensors = torch.Generator().manual_seed(rank), {}
    for name, (out, width) in list(module_shapes())[:modules]:
        for factor, shape in (("lora_down", (rank, width)), ("lora_up", (out, rank))):
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[f"{name}.{factor}.weight"] = values.half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2, dtype=torch.float16)
    part = path.with_suffix(".part")
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank / 2),
    }
    save_file(tensors, part, metadata)
    return part.rename(path)


def convert_argv(source: Path, to: str, out: Path) -> list[str]:
    words = ["convert", str(source), "--to", to, "--out", str(out), "--quiet"]
    architecture = ["--architecture", "sdxl"] if to == "kohya" else []
    return [sys.executable, "-m", "adapterkit", *words, *architecture]


def chain(source: Path, work: Path, repeat: int) -> dict[str, dict]:
    """Seconds and peak memory of each conversion of the chain, the files in between kept until the
    next one has read them."""
    rows: dict[str, dict] = {}
    env = {"PYTHONPATH": str(common.REPOSITORY)}
    for _ in range(repeat):
        at, before = source, "kohya"
        common.fresh(work)
        for to in CHAIN:
            out = work / (f"{to}.safetensors" if to == "kohya" else to)
            timing = common.time_process(convert_argv(at, to, out), env)
            row = rows.setdefault(f"{before} to {to}", {"seconds": [], "peak": 0})
            row["seconds"].append(timing.wall)
            row["peak"] = max(row["peak"], timing.peak)
            at, before = out, to
    rows["back"] = {"equal": same_tensors(source, work / "kohya.safetensors")}
    return rows


def same_tensors(a: Path, b: Path) -> bool:
    """True if two files have the same tensors, byte for byte."""
    import torch
    from safetensors import safe_open

    with safe_open(a, "pt") as first, safe_open(b, "pt") as second:
        keys = set(first.keys())
        return keys == set(second.keys()) and all(
            torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in keys
        )


def measure(work: Path, rank: int, repeat: int, diffusers: bool) -> dict:
    """Every row at one rank."""
    source = make_lora(work / f"kohya-{rank}.safetensors", rank)
    one = make_lora(work / "kohya-one-module.safetensors", 1, modules=1)
    common.warm(work)
    rows = chain(source, work / "run", repeat)
    rows["cp"] = {"seconds": [], "peak": 0}
    rows["imports"] = {"seconds": [], "peak": 0}
    copy, small = work / "run" / "copy.safetensors", work / "run" / "one"
    for _ in range(repeat):
        copy.unlink(missing_ok=True)
        shutil.rmtree(small, ignore_errors=True)
        copied = common.time_process([sys.executable, "-c", FSYNC_COPY, str(source), str(copy)])
        env = {"PYTHONPATH": str(common.REPOSITORY)}
        imported = common.time_process(convert_argv(one, "diffusers", small), env)
        rows["cp"]["seconds"].append(copied.reported)
        rows["imports"]["seconds"].append(imported.wall)
        rows["imports"]["peak"] = max(rows["imports"]["peak"], imported.peak)
    if diffusers:
        rows["diffusers, there and back"] = diffusers_row(source, work / "run", repeat)
    shutil.rmtree(work / "run")
    return {"rank": rank, "bytes": source.stat().st_size, "rows": rows}


def diffusers_row(source: Path, work: Path, repeat: int) -> dict:
    row: dict = {"seconds": [], "inside": [], "peak": 0}
    for _ in range(repeat):
        words = [str(source), str(work / "theirs"), str(work / "theirs.safetensors")]
        argv = [sys.executable, "-c", DIFFUSERS, *words]
        timing = common.time_process(argv, {"HF_HUB_OFFLINE": "1"})
        row["seconds"].append(timing.wall)
        row["inside"].append(timing.reported)
        row["peak"] = max(row["peak"], timing.peak)
    return row


def print_table(result: dict) -> None:
    rows = result["rows"]
    floor = median(rows["cp"]["seconds"]) + median(rows["imports"]["seconds"])
    print(f"\nrank {result['rank']}, {result['bytes'] / 1e6:.0f} MB; x: cp and imports together")
    for name, row in rows.items():
        if name == "back":
            print(f"{'the same tensors after all':28} {row['equal']}")
            continue
        seconds = median(row["seconds"])
        inside = f"{median(row['inside']):8.2f} s without imports" if "inside" in row else ""
        ratio = f"{seconds / floor:6.2f} x" if " to " in name else " " * 8
        print(f"{name:28} {seconds:8.2f} s {ratio} {row['peak'] / 2**20:8.0f} MiB {inside}")


def main() -> None:
    parser = common.parser_of(__doc__, work="adapterkit-benchmark-convert")
    parser.add_argument("--rank", type=int, default=64, help="rank of the large LoRA (64)")
    parser.add_argument("--only", default="", help="adapterkit: leave diffusers out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "diffusers", "safetensors")
    diffusers = args.only != "adapterkit" and common.installed("diffusers") is not None
    report["results"] = [
        measure(args.work, rank, args.repeat, diffusers and rank == args.rank)
        for rank in (max(1, args.rank // 4), args.rank)
    ]
    for result in report["results"]:
        print_table(result)
    lock.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
