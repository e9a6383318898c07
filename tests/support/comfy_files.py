"""Wan models in one file in ComfyUI's quantized formats, made by the published formulas, and what
they decode to in float64."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
WIDTH, INNER = 64, 96
PREFIX = "model.diffusion_model."
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
LINEAR = {
    f"blocks.0.{name}": (out, width)
    for name, out, width in [
        *((f"{kind}_attn.{x}", WIDTH, WIDTH) for kind in ("self", "cross") for x in "qkvo"),
        ("ffn.0", INNER, WIDTH),
        ("ffn.2", WIDTH, INNER),
    ]
}


def plain_wan(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """One block of Wan 2.1, with drawn weights."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (WIDTH, 4, 1, 2, 2),
        "patch_embedding.bias": (WIDTH,),
        "time_embedding.0.weight": (WIDTH, 8),
        "blocks.0.modulation": (1, 6, WIDTH),
        "blocks.0.self_attn.norm_q.weight": (WIDTH,),
        "head.head.weight": (16, WIDTH),
    }
    for module, shape in LINEAR.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    draw = lambda shape: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    return {PREFIX + key: draw(shape) for key, shape in shapes.items()}


# codes and scales of one weight, by its format; by what follows the module's name


def fp8(dtype: torch.dtype) -> Callable[[Tensor], Tensors]:
    def make(w: Tensor) -> Tensors:
        scale = w.abs().amax() / torch.finfo(dtype).max
        return {"weight": (w / scale).to(dtype), "weight_scale": scale}

    return make


def mxfp8(w: Tensor) -> Tensors:
    groups = w.view(len(w), -1, 32)
    power = (groups.abs().amax(2) / 448).clamp(min=2.0**-127).log2().ceil()
    codes = (groups / 2.0 ** power[:, :, None]).to(torch.float8_e4m3fn).view(w.shape)
    scale = in_tiles((power + 127).to(torch.uint8)).view(torch.float8_e8m0fnu)
    return {"weight": codes, "weight_scale": scale}


def nvfp4(w: Tensor) -> Tensors:
    factor = w.abs().amax() / (448 * 6)
    groups = w.view(len(w), -1, 16)
    scale = (groups.abs().amax(2) / 6 / factor).to(torch.float8_e4m3fn)
    units = (groups / (scale.float() * factor)[:, :, None]).view(len(w), -1, 1).double()
    codes = (units - E2M1).abs().argmin(2).to(torch.uint8)
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    tiles = in_tiles(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": tiles, "weight_scale_2": factor}


def int8(by_row: bool) -> Callable[[Tensor], Tensors]:
    def make(w: Tensor) -> Tensors:
        scale = (w.abs().amax(1, keepdim=True) if by_row else w.abs().amax()) / 127
        return {"weight": (w / scale).round().to(torch.int8), "weight_scale": scale}

    return make


MAKERS: Mapping[str, tuple[str, Callable[[Tensor], Tensors]]] = {
    "fp8": ("float8_e4m3fn", fp8(torch.float8_e4m3fn)),
    "fp8-e5m2": ("float8_e5m2", fp8(torch.float8_e5m2)),
    "mxfp8": ("mxfp8", mxfp8),
    "nvfp4": ("nvfp4", nvfp4),
    "int8": ("int8_tensorwise", int8(False)),
    "int8-rows": ("int8_tensorwise", int8(True)),
}
LOST = {"fp8": 0.04, "fp8-e5m2": 0.08, "mxfp8": 0.04, "nvfp4": 0.13, "int8": 0.012, "cast": 0.04}
LOST |= {"int8-rows": 0.01, "cast-e5m2": 0.08}


def in_tiles(scale: Tensor) -> Tensor:
    """Each scale put where its row and column say, as cuBLAS has them."""
    rows, columns = (
        math.ceil(n / size) * size for n, size in zip(scale.shape, (128, 4), strict=True)
    )
    out = torch.zeros(rows * columns, dtype=scale.dtype)
    row, column = torch.meshgrid(*map(torch.arange, scale.shape), indexing="ij")
    out[_place(row, column, columns)] = scale
    return out.view(rows, columns)


def _place(row: Tensor, column: Tensor, columns: int) -> Tensor:
    tile = row // 128 * (columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def decoded(parts: Tensors) -> Tensor:
    """What the parts of one weight mean, in float64."""
    codes, scale = parts["weight"], parts.get("weight_scale", parts.get("scale_weight"))
    if scale is None:
        return codes.double()
    if scale.dim() < 2 or scale.shape[1] == 1:
        return codes.double() * scale.double()
    if "weight_scale_2" in parts:
        pairs = torch.stack([codes >> 4, codes & 15], 2).flatten(1)
        values, size = E2M1[pairs.int()], 16
        units = parts["weight_scale_2"].double() * scale.double()
    else:
        values, size = codes.double(), 32
        units = 2.0 ** (scale.view(torch.uint8).double() - 127)
    row, column = torch.meshgrid(*map(torch.arange, values.shape), indexing="ij")
    return values * units.flatten()[_place(row, column // size, scale.shape[1])]


def said_of(layer: dict) -> Tensor:
    """The JSON beside a layer."""
    return torch.tensor(list(json.dumps(layer).encode())).byte()


# files


def write(kind: str, path: Path, said: str = "beside", prefix: str = PREFIX) -> Path:
    """The model with its linear layers in a format; `said`: how the file says so, which for casts
    is not at all."""
    tensors, metadata = plain_wan(), {"modelspec.title": "a model"}
    layers = {}
    if kind.startswith("cast"):
        dtype = torch.float8_e5m2 if kind == "cast-e5m2" else torch.float8_e4m3fn
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    else:
        name, make = MAKERS[kind]
        for module in LINEAR:
            parts = make(tensors.pop(f"{PREFIX}{module}.weight").float())
            layers[module] = {"format": name}
            tensors |= {f"{PREFIX}{module}.{leaf}": value for leaf, value in parts.items()}
            if said == "beside":
                tensors[f"{PREFIX}{module}.comfy_quant"] = said_of(layers[module])
            if said == "old":
                scale = tensors.pop(f"{PREFIX}{module}.weight_scale")
                tensors[f"{PREFIX}{module}.scale_weight"] = scale
                tensors[f"{PREFIX}{module}.scale_input"] = torch.tensor(0.5)
    if said == "old":
        tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    if said.startswith("header"):
        start = PREFIX if said == "header" else ""
        named = {start + module: own for module, own in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": named})
    renamed = {key.replace(PREFIX, prefix, 1): value.contiguous() for key, value in tensors.items()}
    save_file(renamed, path, metadata)
    return path


def weights(tensors: Tensors) -> Tensors:
    """Every weight of a file in float64."""
    found: dict[str, Tensors] = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        found.setdefault(module, {})[leaf] = value
    return {
        f"{module}.weight": decoded(parts) for module, parts in found.items() if "weight" in parts
    }


def lora(path: Path, size: float = 0.3) -> tuple[Path, Tensors]:
    """An adapter of all linear layers in ComfyUI's names, and its products in float64."""
    generator, tensors, deltas = torch.Generator().manual_seed(1), Tensors(), Tensors()
    for module, (out, width) in LINEAR.items():
        a = torch.randn(4, width, generator=generator) * size / 4
        b = torch.randn(out, 4, generator=generator) * size / 4
        tensors |= {f"diffusion_model.{module}.lora_A.weight": a}
        tensors |= {f"diffusion_model.{module}.lora_B.weight": b}
        deltas[f"{PREFIX}{module}.weight"] = b.double() @ a.double()
    save_file(tensors, path)
    return path, deltas
