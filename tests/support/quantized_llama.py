"""Quantized checkpoints of a tiny Llama, made of the kernels' own encoders; what tools make is in
format_tools.safetensors."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.kernels.quant import affine, fp4, integers
from adapterkit.kernels.quant.fp8 import encode_fp8
from adapterkit.kernels.quant.gptq import AWQ_ORDER
from tests.support import comfy_files
from tests.support.usual import usual

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """One format: the tensors that take the place of `X.weight`, by what follows `X`, and the
    config's quantization_config."""

    make: Callable[[Tensor], Parts]
    settings: dict[str, Any]
    lost: float  # what requantization may lose: ‖Q - W‖ / ‖W‖
    metadata: Callable[[str, Parts], dict[str, str]] | None = None
    writable: bool = True
    files: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # what config.json has besides


def compressed(form: str, weights: dict[str, Any], **more) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def words(
    bits: int, size: int | None, symmetric: bool = True, index: bool = False
) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        order = (
            torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
            if index
            else torch.arange(w.shape[1])
        )
        result = integers.encode_integers(
            w[:, order], bits, size, symmetric=symmetric, scale_dtype=torch.bfloat16
        )
        codes = torch.empty_like(result.codes)
        codes[:, order] = result.codes
        parts = {
            ".weight_packed": integers.pack(codes, bits),
            ".weight_scale": result.scale,
            ".weight_shape": torch.tensor(w.shape),
        }
        if result.zero is not None:
            parts[".weight_zero_point"] = integers.pack_zeros(result.zero, bits)
        if index:
            group = torch.empty(w.shape[1], dtype=torch.int32)
            group[order] = (torch.arange(w.shape[1]) // (size or 1)).int()
            parts[".weight_g_idx"] = group
        return parts

    return make


def int8(symmetric: bool = True) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        result = integers.encode_integers(w, 8, symmetric=symmetric)
        zero = {} if result.zero is None else {".weight_zero_point": result.zero}
        return {".weight": result.codes, ".weight_scale": result.scale, **zero}

    return make


def fp8(
    block: tuple[int, int] | str, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        size = (
            tuple(w.shape if block == "tensor" else (1, w.shape[1]))
            if isinstance(block, str)
            else block
        )
        result = encode_fp8(w, size, scale_dtype=dtype)
        scale = result.scale.view(-1) if block in ("tensor", "rows") else result.scale
        return {
            ".weight": result.codes,
            ".weight_scale": scale,
            ".input_scale": torch.tensor([0.25]),
        }

    return make


def fp8_of_transformers(w: Tensor) -> Parts:
    result = encode_fp8(w, (32, 32), rule="multiply")
    return {".weight": result.codes, ".weight_scale_inv": result.scale}


def fp8_of_powers(block: tuple[int, int], scale: str, dtype: torch.dtype) -> Callable:
    """FP8 with scales that are powers of 2, as DeepSeek-V4 and MXFP8 store them."""

    def make(w: Tensor) -> Parts:
        result = encode_fp8(w, block, rule="power")
        return {".weight": result.codes, scale: result.scale.to(E8M0).view(dtype)}

    return make


def fp4_pairs(w: Tensor) -> Parts:
    """DeepSeek-V4's experts: two values in each byte, with a power of 2 for 32 inputs of a row."""
    codes, scale = fp4.encode_mxfp4(w, rule="up")
    return {".weight": codes.flatten(1).view(torch.int8), ".scale": scale.view(E8M0)}


def nvfp4(w: Tensor) -> Parts:
    result = fp4.encode_nvfp4(w, fp4.TensorScale.fitting(w.abs().amax(), divides=True))
    parts = {
        ".weight_packed": result.codes,
        ".weight_scale": result.scale,
        ".weight_global_scale": result.tensor_scale.value,
    }
    return parts | {".input_global_scale": torch.tensor([3.0])}


def mxfp4(w: Tensor) -> Parts:
    result = fp4.encode_mxfp4(w, rule="even")
    return {".weight_packed": result.codes.flatten(-2), ".weight_scale": result.scale}


def modelopt_nvfp4(w: Tensor) -> Parts:
    result = fp4.encode_nvfp4(w, fp4.TensorScale.fitting(w.abs().amax(), divides=False))
    scales = {
        ".weight_scale": result.scale,
        ".weight_scale_2": result.tensor_scale.value,
        ".input_scale": torch.tensor(0.5),
    }
    return {".weight": result.codes, **scales}


def modelopt_fp8(w: Tensor) -> Parts:
    result = encode_fp8(w, (w.shape[0], w.shape[1]))
    return {
        ".weight": result.codes,
        ".weight_scale": result.scale.view(()),
        ".input_scale": torch.tensor(0.5),
    }


def gptq(
    bits: int, version: int, symmetric: bool = False, index: bool = False, size: int = 32
) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        order = torch.arange(w.shape[1])
        if index:
            order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
        result = integers.encode_integers(
            w[:, order], bits, size, symmetric=symmetric, scale_dtype=torch.float16
        )
        half = 1 << (bits - 1)
        middle = torch.zeros(result.scale.shape) if result.zero is None else result.zero
        zero = middle.T.int() + half - int(version == 1)
        zero = (zero & ((1 << bits) - 1)) - half
        codes, group = torch.empty_like(result.codes), torch.empty(w.shape[1], dtype=torch.int32)
        codes[:, order], group[order] = result.codes, (torch.arange(w.shape[1]) // size).int()
        return {
            ".qweight": integers.pack(codes, bits).T.contiguous(),
            ".qzeros": integers.pack(zero.to(torch.int8), bits),
            ".scales": result.scale.T.contiguous(),
            ".g_idx": group,
        }

    return make


def awq(w: Tensor) -> Parts:
    result = integers.encode_integers(w, 4, 32, symmetric=False, scale_dtype=torch.float16)
    assert result.zero is not None

    def folded(codes: Tensor) -> Tensor:  # (n, out) -> (n, out/8)
        eights = (codes.long() + 8).view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)]
        return (eights << torch.arange(0, 32, 4)).sum(2).to(torch.int32)

    return {
        ".qweight": folded(result.codes.T),
        ".qzeros": folded(result.zero.T),
        ".scales": result.scale.T.contiguous(),
    }


def gemv(w: Tensor) -> Parts:
    """As AutoAWQ's own code packs: one code of eight after another, of groups padded to words."""
    result = integers.encode_integers(w, 4, 32, symmetric=False, scale_dtype=torch.float16)
    assert result.zero is not None

    def packed(codes: Tensor) -> Tensor:
        words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int32)
        for column in range(codes.shape[1]):
            words[:, column // 8] |= (codes[:, column].int() + 8) << (column % 8 * 4)
        return words

    more = (0, -result.zero.shape[1] % 32)
    zero = torch.nn.functional.pad(result.zero, more, value=-8)
    scale = torch.nn.functional.pad(result.scale, more)
    return {".qweight": packed(result.codes), ".qzeros": packed(zero), ".scales": scale}


def hqq(w: Tensor) -> Parts:
    """4 bits, in rows of 32."""
    groups = w.view(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).half()
    codes = (groups / scale.float() + zero.float()).round().clamp(0, 15).to(torch.uint8)
    first, second = codes.chunk(2)
    packing = torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)
    said = {".shape": torch.tensor(w.shape), ".packing": packing, ".nbits": torch.tensor(4)}
    return {".W_q": first << 4 | second, ".scale": scale, ".zero": zero, **said}


def mlx(bits: int, biases: str = ".biases", size: int = 32) -> Callable[[Tensor], Parts]:
    """Of the affine mode, with the codes in words one bit after another."""

    def make(w: Tensor) -> Parts:
        scale, bias = affine.affine_scales(w, bits, size, torch.bfloat16)
        grid = affine.affine_grid(scale, bias, bits, size)
        codes = grid.encoded(w, torch.empty(w.shape, dtype=torch.uint8))
        ones = codes[..., None] >> torch.arange(bits, dtype=torch.uint8) & 1
        octets = ones.view(len(w), -1, 8).int() << torch.arange(8)
        words = octets.sum(2).to(torch.uint8).view(torch.uint32)
        return {".weight": words, ".scales": scale, biases: bias}

    return make


def mlx_floats(mode: str) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        if mode == "mxfp8":
            result = encode_fp8(w, (1, 32), rule="power", scale_dtype=torch.float8_e8m0fnu)
        elif mode == "mxfp4":
            result = fp4.encode_mxfp4(w, rule="up")
        else:
            result = fp4.encode_nvfp4(w, fp4.TensorScale(torch.ones(()), divides=False))
        words = result.codes.reshape(len(w), -1).view(torch.uint8).view(torch.uint32)
        return {".weight": words, ".scales": result.scale.view(torch.uint8)}

    return make


def torchao(kind: str) -> Callable[[Tensor], Parts]:
    def make(w: Tensor) -> Parts:
        if kind == "Float8Tensor":
            result = encode_fp8(w, (1, w.shape[1]))
            return {"._weight_qdata": result.codes, "._weight_scale": result.scale}
        if kind == "Int4Tensor":
            scale = w.unflatten(1, (-1, 32)).abs().amax(2).T.div(7).bfloat16().contiguous()
            codes = integers.encode_integers(w, 4, scale=scale.T.float()).codes
            half = integers.pack_nibbles(codes.int() & 15)
            zero = (
                torch.randn(scale.shape, generator=torch.Generator().manual_seed(2))
                .mul_(1e-3)
                .bfloat16()
            )
            return {"._weight_qdata": half, "._weight_scale": scale, "._weight_zero_point": zero}
        size = 32 if kind == "IntxUnpackedToInt8Tensor" else None
        result = integers.encode_integers(
            w, 8, size, symmetric=size is None, scale_dtype=torch.bfloat16
        )
        zero = {} if result.zero is None else {"._weight_zero_point": result.zero}
        return {"._weight_qdata": result.codes, "._weight_scale": result.scale, **zero}

    return make


def said_of(kind: str) -> Callable[[str, Parts], dict[str, str]]:
    """torchao's metadata of one weight."""

    def say(key: str, parts: Parts) -> dict[str, str]:
        out, width = parts["._weight_qdata"].shape
        block = [1, {"Int4Tensor": 32, "IntxUnpackedToInt8Tensor": 32}.get(kind, width)]
        data = {"block_size": block, "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
        data |= {"shape": [out, 2 * width]} if kind == "Int4Tensor" else {}
        return {
            key: json.dumps(
                {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
            )
        }

    return say


def comfyui(kind: str) -> Callable[[Tensor], Parts]:
    """As in ComfyUI's files, which say beside each layer what it is."""

    def make(w: Tensor) -> Parts:
        name, parts_of = comfy_files.MAKERS[kind]
        parts = parts_of(w) | {"comfy_quant": comfy_files.said_of({"format": name})}
        return {f".{leaf}": value for leaf, value in parts.items()}

    return make


E8M0 = torch.float8_e8m0fnu
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
NV = FP4 | {"strategy": "tensor_group", "group_size": 16}
ZERO = {"strategy": "channel", "symmetric": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
UE8M0 = {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
HF = {
    "hf_quant_config.json": {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16},
    }
}
METAL = {"quant_method": "metal", "bits": 8, "group_size": 32}


def of_mlx(make: Callable[[Tensor], Parts], lost: float, **settings: Any) -> Form:
    """As mlx-lm writes config.json: the settings twice, without a method."""
    return Form(make, settings, lost, config={"quantization": settings})


FORMS = {
    "int4": Form(words(4, 32), compressed("pack-quantized", INT4), 0.13),
    "int4-zero": Form(
        words(4, 32, symmetric=False),
        compressed("pack-quantized", INT4 | {"symmetric": False}),
        0.13,
    ),
    "int4-g_idx": Form(
        words(4, 32, index=True), compressed("pack-quantized", INT4 | {"actorder": "group"}), 0.13
    ),
    "int8-words": Form(
        words(8, None),
        compressed(
            "pack-quantized", INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
        ),
        0.01,
    ),
    "int8": Form(
        int8(),
        compressed(
            "int-quantized", INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
        ),
        0.01,
    ),
    "int8-zero": Form(
        int8(False),
        compressed("int-quantized", INT4 | ZERO | {"num_bits": 8, "group_size": None}),
        0.01,
    ),
    "fp8-tensor": Form(
        fp8("tensor"), compressed("float-quantized", FP8 | {"strategy": "tensor"}), 0.04
    ),
    "fp8-channel": Form(
        fp8("channel", torch.bfloat16),
        compressed("float-quantized", FP8 | {"strategy": "channel"}),
        0.04,
    ),
    "fp8-rows": Form(  # as channels, without their second axis
        fp8("rows"), compressed("float-quantized", FP8 | {"strategy": "channel"}), 0.04
    ),
    "fp8-block": Form(
        fp8((32, 48)),
        compressed("naive-quantized", FP8 | {"strategy": "block", "block_structure": [32, 48]}),
        0.04,
    ),
    "nvfp4": Form(nvfp4, compressed("nvfp4-pack-quantized", NV), 0.12),
    "mxfp4": Form(
        mxfp4,
        compressed("mxfp4-pack-quantized", FP4 | {"strategy": "group", "group_size": 32}),
        0.16,
    ),
    "modelopt-nvfp4": Form(
        modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.12
    ),
    "modelopt-file": Form(modelopt_nvfp4, {}, 0.12, files=HF),
    "modelopt-fp8": Form(modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}, 0.04),
    "fp8": Form(
        fp8_of_transformers,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        0.04,
    ),
    "fp8-scale": Form(fp8_of_powers((32, 32), ".scale", E8M0), UE8M0, 0.04),
    "fp8-qscale": Form(fp8_of_powers((32, 32), ".qscale_weight", E8M0), UE8M0, 0.04),
    "mxfp8": Form(
        fp8_of_powers((1, 32), ".weight_scale_inv", torch.uint8), {"quant_method": "mxfp8"}, 0.04
    ),
    "fp4": Form(fp4_pairs, UE8M0, 0.16),
    "gptq4": Form(gptq(4, 1), GPTQ, 0.13),
    "auto-round-gptq": Form(
        gptq(4, 1, symmetric=True),
        AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "sym": True},
        0.13,
    ),
    "auto-round-backend": Form(
        gptq(4, 1), AUTO_ROUND | {"backend": "auto_round:auto_gptq:exllamav2"}, 0.13
    ),
    "auto-round-awq": Form(awq, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, 0.13),
    "gptq8-v2": Form(gptq(8, 2), GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, 0.01),
    "gptq4-g_idx": Form(
        gptq(4, 1, symmetric=True, index=True), GPTQ | {"sym": True, "desc_act": True}, 0.13
    ),
    "awq": Form(
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        0.13,
    ),
    "awq-gemv": Form(
        gemv,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"},
        0.13,
    ),
    "comfyui-nvfp4": Form(comfyui("nvfp4"), {}, 0.12),
    "comfyui-int8": Form(comfyui("int8-rows"), {}, 0.01),
    "mlx4": of_mlx(mlx(4), 0.13, group_size=32, bits=4),
    "mlx3": of_mlx(mlx(3), 0.3, group_size=32, bits=3),
    "mlx-mxfp4": of_mlx(mlx_floats("mxfp4"), 0.16, group_size=32, bits=4, mode="mxfp4"),
    "mlx-nvfp4": of_mlx(mlx_floats("nvfp4"), 0.12, group_size=16, bits=4, mode="nvfp4"),
    "mlx-mxfp8": of_mlx(mlx_floats("mxfp8"), 0.04, group_size=32, bits=8, mode="mxfp8"),
    "metal": Form(mlx(8, biases=".qbiases"), METAL, 0.01),
    "hqq": Form(hqq, {"quant_method": "hqq"}, 0.13, writable=False),
    **{
        f"torchao-{kind}": Form(
            torchao(kind), {"quant_method": "torchao"}, 0, said_of(kind), writable=False
        )
        for kind in ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor")
    },
}

# one form of each codec, for laws whose code does not know the codec
FEW = {"int4-g_idx", "int8-zero", "fp8-channel", "nvfp4", "mxfp4", "fp8", "double", "int8-bnb"}
FEW |= {"gptq4-g_idx", "awq", "comfyui-nvfp4", "fp4", "mlx4"}


def few(names: Iterable[str]) -> list:
    """These names, those beyond FEW marked slow."""
    return usual(names, FEW)


def llama() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def base(form: Form, folder: Path) -> None:
    """A checkpoint of `llama` whose linear layers, but for the head, are in this format."""
    llama().save_pretrained(folder)
    quantize(folder, form)


def quantize(folder: Path, form: Form) -> None:
    tensors, metadata = {}, {"format": "pt"}
    for key, weight in load_file(folder / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEAR:
            parts = form.make(weight.float())
            tensors |= {module + ending: part.contiguous() for ending, part in parts.items()}
            metadata |= form.metadata(key, parts) if form.metadata else {}
        else:
            tensors[key] = weight
    save_file(tensors, folder / "model.safetensors", metadata)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | (
        {"quantization_config": form.settings} if form.settings else {}
    )
    path.write_text(json.dumps(config | form.config), "utf-8")
    for name, content in form.files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")


def change(folder: Path, changes: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
    """Tensors replaced by their key, or removed (None), and settings of the quantization_config."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file(
        {k: v.contiguous() for k, v in tensors.items() if v is not None}, path, {"format": "pt"}
    )
    if settings is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["quantization_config"] = config.get("quantization_config", {}) | settings
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
