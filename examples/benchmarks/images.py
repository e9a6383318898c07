"""Compare merging an adapter into a single-file image model with copying the file: seconds, and
whether the memory stays flat.

    python examples/benchmarks/images.py                       SD 1.5 (2.1 GB) and SDXL (6.9 GB)
    python examples/benchmarks/images.py --models sd15 --repeat 1                   a quick look
    python examples/benchmarks/images.py --json images.json

The file has the keys and shapes of the real U-Net in float16, filled with random numbers, and one
tensor for each text encoder and the autoencoder, of their sizes. The adapter is a LoRA of rank 16
in diffusers' names: of attention alone, and of all layers. `cp` is a copy and fsync of what it
wrote. Both take turns; before each run the output is removed, the disk synced and the input read
once. `seconds` are the wall time of the process; `in process` is the same without the interpreter's
start and imports. Memory is anonymous.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from diffusers import UNet2DConditionModel
from gguf_merge import measure
from safetensors.torch import save_file

from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.core.checkpoint.header import build_header

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": tuple(name.format("Down") for name in (PLAIN, CROSS, CROSS)),
        "up_block_types": tuple(name.format("Up") for name in (CROSS, CROSS, PLAIN)),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
REST = {  # millions of parameters
    "sd15": {"cond_stage_model": 123, "first_stage_model": 84},
    "sdxl": {
        "conditioner.embedders.0": 123,
        "conditioner.embedders.1": 695,
        "first_stage_model": 84,
    },
}
RANK = 16
TILE = 1 << 22  # numbers that are drawn, and repeated


def shapes_of(model: torch.nn.Module, family: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    names = names_of(family, "unet", "original")
    for key, value in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        named = names.named(module)
        assert named is not None, module
        yield f"model.diffusion_model.{named[1]}.{leaf}", "F16", tuple(value.shape)
    for name, millions in REST[family].items():
        yield f"{name}.all.weight", "F16", (millions, 1_000_000)


def make_model(path: Path, family: str, model: torch.nn.Module) -> Path:
    if path.exists():
        return path
    entries = list(shapes_of(model, family))
    header, _ = build_header(entries, {"modelspec.architecture": family})
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * common.STD
    data = tile.half().numpy().tobytes()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(header)
        for _, _, shape in entries:
            size = 2 * math.prod(shape)
            for at in range(0, size, len(data)):
                file.write(data[: min(len(data), size - at)])
    return part.rename(path)


def make_adapter(path: Path, model: torch.nn.Module, *, attention: bool) -> Path:
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        if attention and ".attn" not in name:
            continue
        out, *tail = layer.weight.shape
        a = torch.randn(RANK, *tail, generator=generator) * common.STD
        b = torch.randn(out, RANK, *(1 for _ in tail[1:]), generator=generator) * common.STD
        tensors |= {f"unet.{name}.lora_A.weight": a.half(), f"unet.{name}.lora_B.weight": b.half()}
    save_file(tensors, path)
    return path


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--models", default="sd15,sdxl")
    args = parser.parse_args()
    report = common.environment("adapterkit", "torch", "diffusers")
    report |= {"repeat": args.repeat, "models": {}}
    args.work.mkdir(parents=True, exist_ok=True)
    with common.alone(args.work):
        for family in args.models.split(","):
            folder = args.work / f"images-{family}"
            folder.mkdir(exist_ok=True)
            with torch.device("meta"):
                model = UNet2DConditionModel(**UNETS[family])
            base = make_model(folder / f"{family}.safetensors", family, model)
            adapters = {
                "attention": make_adapter(
                    args.work / f"{family}-a.safetensors", model, attention=True
                ),
                "all layers": make_adapter(
                    args.work / f"{family}-l.safetensors", model, attention=False
                ),
            }
            rows = measure(base, adapters, args.work, args.repeat, "merged.safetensors")
            name = f"{base.stat().st_size / common.GB:.2f} GB, {family}"
            report["models"][name] = rows
            common.print_rows(name, rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
