"""Makes format_tools.safetensors: what the formats' own tools store, and read back, for a small
weight.

Run by hand, where compressed-tensors, torchao and gptqmodel are installed beside transformers;
tensors_of(tool, w) is also the oracle for larger weights. Names are <tool>.<format>.<tensor>: `w`
is the weight, `decoded` what the tool reads (in the file its sha256), all else as it lies on disk.
"""

import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).with_suffix(".safetensors")
BLOCK = (4, 32)  # of the small weight's block-wise FP8


def weight(out: int = 16, size: int = 64) -> Tensor:
    """Values of very different sizes, a row of zeros, ties of FP4, negative zeros."""
    w = torch.randn(out, size, generator=torch.Generator().manual_seed(7))
    w *= torch.logspace(-3, 2, out)[:, None]
    w[1] = 0
    w[3, :16] = (
        torch.tensor(
            [6, -5, 3.5, -2.5, 1.75, 1.25, 0.75, -0.75, 0.25, -0.25, 0.5, 7, -0.1, 0.1, 5.5, -6]
        )
        / 4
    )
    w[4, 32:] = 0
    return w


def compressed_tensors(w: Tensor) -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
        maybe_pad_tensor_for_block_quant,
    )

    tensors = {}

    def run(name, form, **args):
        weights = QuantizationArgs(**args)
        scheme, state = (
            QuantizationScheme(targets=["Linear"], weights=weights),
            {"weight": w.clone()},
        )
        if weights.strategy == "block":
            (h, width), padded = (
                weights.block_structure,
                maybe_pad_tensor_for_block_quant(w, weights.block_structure),
            )
            parts = padded.view(len(padded) // h, h, -1, width)
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        elif weights.strategy == "tensor":
            low, high = w.amin(), w.amax()
        else:
            parts = w.unflatten(1, (-1, weights.group_size or w.shape[1]))
            low, high = parts.amin(2), parts.amax(2)
        whole = {}
        if weights.strategy == "tensor_group":
            whole["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
        scale, zero = calculate_qparams(
            low, high, weights, global_scale=whole.get("weight_global_scale")
        )
        state |= {"weight_scale": scale, "weight_zero_point": zero, **whole}
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        stored["decoded"] = compressor.decompress(stored, scheme)["weight"]
        tensors.update({f"compressed-tensors.{name}.{key}": value for key, value in stored.items()})

    fp8 = {"num_bits": 8, "type": "float"}
    run("fp8-tensor", "float-quantized", **fp8, strategy="tensor")
    run("fp8-channel", "float-quantized", **fp8, strategy="channel")
    run("fp8-block", "naive-quantized", **fp8, strategy="block", block_structure=list(BLOCK))
    run(
        "nvfp4",
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    run(
        "mxfp4",
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
    )
    for bits in (3, 4, 8):
        run(f"int{bits}", "pack-quantized", num_bits=bits, strategy="group", group_size=32)
    run("int4-zero", "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False)
    run("int8-channel", "int-quantized", num_bits=8, strategy="channel")
    run("int8-zero", "int-quantized", num_bits=8, strategy="channel", symmetric=False)
    return tensors


def transformers(w: Tensor) -> dict[str, Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = {}
    for name in ("float", "ue8m0"):
        config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt=name)
        stored = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": w})
        scale = stored.get("weight_scale_inv", stored.get(".weight_scale_inv"))
        read = Fp8Dequantize(None)._dequantize_one(stored["weight"], scale.float(), torch.float32)
        tensors |= {
            f"transformers.{name}.weight": stored["weight"],
            f"transformers.{name}.weight_scale_inv": scale,
        }
        tensors[f"transformers.{name}.decoded"] = read
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(256, (2, len(w), 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, len(w), 2), generator=generator, dtype=torch.uint8)
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return tensors | {
        "transformers.mxfp4.blocks": blocks,
        "transformers.mxfp4.scales": scales,
        "transformers.mxfp4.decoded": decoded,
    }


def torchao(w: Tensor) -> dict[str, Tensor]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_primitives import MappingType

    tensors = {}
    for mode in (ScaleCalculationMode.FLOOR, ScaleCalculationMode.EVEN):
        x = MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32, mode)
        name = f"torchao.mxfp4-{mode.name.lower()}"
        qdata, scale = x.qdata.view(torch.uint8), x.scale.view(torch.uint8)
        tensors |= {
            f"{name}.qdata": qdata,
            f"{name}.scale": scale,
            f"{name}.decoded": x.dequantize(torch.float32),
        }
    for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
        x = Int8Tensor.from_hp(w.bfloat16(), PerRow(), mapping)
        name = f"torchao.int8-{mapping.name.lower()}"
        tensors |= {
            f"{name}.qdata": x.qdata,
            f"{name}.scale": x.scale,
            f"{name}.decoded": x.dequantize(),
        }
        if x.zero_point is not None:
            tensors[f"{name}.zero_point"] = x.zero_point
    return tensors


def gptqmodel(w: Tensor) -> dict[str, Tensor]:
    os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    tensors, generator = {}, torch.Generator().manual_seed(2)
    out, size = (n + -n % 32 for n in w.shape)
    groups = size // 32

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scale = (torch.rand(groups, out, generator=generator) + 0.5).half()
    for bits in (2, 3, 4, 8):
        module = TorchLinear(
            bits=bits,
            group_size=32,
            sym=False,
            desc_act=True,
            in_features=size,
            out_features=out,
            bias=False,
        )
        module.scales, module.qweight = scale, words(size * bits // 32, out)
        module.qzeros = words(groups, out * bits // 32)
        module.g_idx = torch.randperm(size, generator=generator).to(torch.int32) // 32
        name = f"gptqmodel.gptq{bits}"
        tensors |= {
            f"{name}.{key}": getattr(module, key).clone()
            for key in ("qweight", "qzeros", "scales", "g_idx")
        }
        tensors[f"{name}.decoded2"] = module.dequantize_weight().T.contiguous()
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        tensors[f"{name}.decoded1"] = module.dequantize_weight().T.contiguous()
    qweight, qzeros = words(size, out // 8), words(groups, out // 8)
    read = dequantize_gemm(qweight, qzeros, scale, 4, 32).T.contiguous()
    awq = {"qweight": qweight, "qzeros": qzeros, "scales": scale.clone(), "decoded": read}
    return tensors | {f"gptqmodel.awq.{key}": value for key, value in awq.items()}


def hqq(w: Tensor) -> dict[str, Tensor]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    tensors = {}
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w
    for bits, axis, group in (
        (8, 1, 16),
        (4, 0, 32),
        (4, 1, 64),
        (3, 0, 32),
        (3, 1, 16),
        (2, 1, 16),
        (1, 0, 8),
    ):
        config = BaseQuantizeConfig(
            nbits=bits, group_size=group, axis=axis, view_as_float=bits == 4
        )
        how = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
        module = HQQLinear(linear, config, **how)
        name = f"hqq.{bits}-{axis}-{group}"
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        tensors[f"{name}.decoded"] = module.dequantize()
    return tensors


TOOLS = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
    "gptqmodel": gptqmodel,
    "hqq": hqq,
    "transformers": transformers,
}


def tensors_of(tool: str, w: Tensor) -> dict[str, Tensor]:
    return {"w": w, **TOOLS[tool](w)}


def digest(x: Tensor) -> Tensor:
    text = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8)


if __name__ == "__main__":
    tensors = {
        key: digest(value) if ".decoded" in key else value.contiguous()
        for tool in TOOLS
        for key, value in tensors_of(tool, weight()).items()
    }
    save_file(tensors, GOLDEN, {tool: version(tool) for tool in TOOLS})
