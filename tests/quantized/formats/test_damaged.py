"""Quantized tensors and configs that do not say what they hold are refused by name."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.quantization_config import QuantizationMethod

import adapterkit
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.weights.unread import read_methods
from tests.support import quantized_llama
from tests.support.formats import INT, Q, stored
from tests.support.quantized_llama import FORMS, change

LIES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    # of a format: tensors changed, settings changed, what the refusal says
    "scale missing": ("int4", {Q + "weight_scale": None}, None, "without .weight_scale"),
    "shape missing": ("int4", {Q + "weight_shape": None}, None, "without .weight_shape"),
    "shape lies": ("int4", {Q + "weight_shape": torch.tensor([64, 96])}, None, "sizes that agree"),
    "negative shape": (
        "int4",
        {Q + "weight_shape": torch.tensor([64, -64])},
        None,
        "sizes that agree",
    ),
    "rows lie": ("int4", {Q + "weight_shape": torch.tensor([32, 64])}, None, "sizes that agree"),
    "NaN scale": (
        "int4",
        {Q + "weight_scale": torch.full((64, 2), float("nan")).bfloat16()},
        None,
        "NaN or infinite",
    ),
    "infinite scale": (
        "int8",
        {Q + "weight_scale": torch.full((64, 1), float("inf"))},
        None,
        "NaN or infinite",
    ),
    "integer scale": ("int4", {Q + "weight_scale": torch.ones(64, 2).int()}, None, "I32 scales"),
    "too few scales": (
        "int4",
        {Q + "weight_scale": torch.ones(64, 1).bfloat16()},
        None,
        r"scales \(64, 1\)",
    ),
    "scales of rows": (
        "fp8-channel",
        {Q + "weight_scale": torch.ones(32, 1)},
        None,
        r"scales \(32, 1\)",
    ),
    "zeros missing": (
        "int4-zero",
        {Q + "weight_zero_point": None},
        None,
        "without .weight_zero_point",
    ),
    "zeros of a symmetric weight": (
        "int4",
        {Q + "weight_zero_point": torch.ones(8, 2).int()},
        None,
        "symmetric, with",
    ),
    "zeros too few": (
        "int4-zero",
        {Q + "weight_zero_point": torch.ones(7, 2).int()},
        None,
        r"I32 \(7, 2\)",
    ),
    "g_idx beyond": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.full((64,), 2).int()},
        None,
        "out of range",
    ),
    "g_idx negative": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.arange(64).int() // 32 - 1},
        None,
        "out of range",
    ),
    "g_idx short": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.zeros(63).int()},
        None,
        r"I32 \(63,\)",
    ),
    "twice": ("int4", {Q + "weight": torch.ones(64, 64).bfloat16()}, None, "each weight once"),
    "two formats": ("int4", {Q + "qweight": torch.ones(8, 64).int()}, None, "next to weights of"),
    "codes alone": ("fp8-tensor", {Q + "weight_scale": None}, None, "without .weight_scale"),
    "E5M2": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).to(torch.float8_e5m2)},
        None,
        "F8_E5M2",
    ),
    "codes of another": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).to(torch.int8)},
        None,
        "format float-quantized",
    ),
    "codes of three axes": (
        "fp8-tensor",
        {Q + "weight": torch.ones(4, 16, 64).to(torch.float8_e4m3fn)},
        None,
        r"shape \(4, 16, 64\)",
    ),
    "codes without columns": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 0).to(torch.float8_e4m3fn)},
        None,
        r"shape \(64, 0\)",
    ),
    "floats with a scale": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).bfloat16()},
        None,
        "BF16 codes",
    ),
    "no divisor": (
        "nvfp4",
        {Q + "weight_global_scale": None},
        None,
        "without .weight_global_scale",
    ),
    "divisor 0": ("nvfp4", {Q + "weight_global_scale": torch.zeros(1)}, None, "not above 0"),
    "many divisors": ("nvfp4", {Q + "weight_global_scale": torch.ones(2)}, None, "one F32"),
    "E4M3 NaN": (
        "nvfp4",
        {Q + "weight_scale": torch.full((64, 4), 127).byte().view(torch.float8_e4m3fn)},
        None,
        "NaN or",
    ),
    "E8M0 NaN": ("mxfp4", {Q + "weight_scale": torch.full((64, 2), 255).byte()}, None, "NaN or"),
    "bits 0": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 0}}}},
        "0 bits",
    ),
    "bits 99": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 99}}}},
        "99 bits",
    ),
    "bits true": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": True}}}},
        "bits that",
    ),
    "bits lie": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 8}}}},
        "of 8 bits",
    ),
    "group 48": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"group_size": 48}}}},
        "divide",
    ),
    "group 0": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"group_size": 0}}}},
        "divide",
    ),
    "no groups": ("int4", {}, {"config_groups": {}}, "config_groups"),
    "a preset": ("int4", {}, {"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
    "not compressed": ("int4", {}, {"quantization_status": "frozen"}, "quantization_status frozen"),
    "no status": ("int4", {}, {"quantization_status": None}, "quantization_status None"),
    "another format": ("int4", {}, {"format": "int-quantized"}, "format int-quantized"),
    "marlin": ("int4", {}, {"format": "marlin-24"}, "format marlin-24"),
    "sparse": (
        "int4",
        {},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse-24-bitmask",
    ),
    "rotated": ("int4", {}, {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    "modelopt without": ("modelopt-nvfp4", {Q + "weight_scale_2": None}, None, "without _scale_2"),
    "modelopt shape": (
        "modelopt-nvfp4",
        {Q + "weight_scale": torch.ones(64, 3).to(torch.float8_e4m3fn)},
        None,
        r"\(64, 3\)",
    ),
    "modelopt factor": (
        "modelopt-nvfp4",
        {Q + "weight_scale_2": torch.tensor(float("nan"))},
        None,
        "NaN or infinite",
    ),
    "modelopt AWQ": (
        "modelopt-nvfp4",
        {Q + "pre_quant_scale": torch.ones(64)},
        None,
        "pre_quant_scale",
    ),
    "modelopt unknown": ("modelopt-nvfp4", {}, {"quant_algo": "W4A8_AWQ"}, "quant_algo W4A8_AWQ"),
    "fp4 scales of blocks": (
        "fp8",
        {Q + "weight": torch.ones(64, 32).to(torch.int8)},
        None,
        "a power of 2 for each 32 values",
    ),
    "fp4 scales alone": ("fp4", {Q + "scale": None}, None, Q + "weight"),
    "fp8 scales lie": ("fp8", {Q + "weight_scale_inv": torch.ones(2, 3)}, None, r"\(2, 3\)"),
    "fp8 scales alone": ("fp8", {Q + "weight_scale_inv": None}, None, "without _scale_inv"),
    "fp8 unknown names": (
        "fp8",
        {Q + "weight_scale_inv": None, Q + "weight_scales": torch.ones(2, 2)},
        None,
        "without _scale_inv",
    ),
    "fp8 blocks": ("fp8", {}, {"weight_block_size": [0, 32]}, "blocks"),
    "gptq marlin": ("gptq4", {}, {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
    "gptq planar": ("gptq4", {}, {"checkpoint_format": "gptq_p"}, "checkpoint_format gptq_p"),
    "gptq is marlin": ("gptq4", {}, {"is_marlin_format": True}, "marlin"),
    "gptq int64": ("gptq4", {}, {"pack_dtype": "int64"}, "pack_dtype int64"),
    "gptq bits": ("gptq4", {}, {"bits": 5}, "bits 5"),
    "gptq bits lie": ("gptq4", {}, {"bits": 8}, "words of 8 bits"),
    "gptq groups": ("gptq4", {}, {"group_size": 16}, "2 groups of 64"),
    "gptq g_idx": ("gptq4", {Q + "g_idx": torch.full((64,), 9).int()}, None, "groups out of range"),
    "gptq zeros": ("gptq4", {Q + "qzeros": None}, None, "without .qzeros"),
    "gptq NaN": (
        "gptq4",
        {Q + "scales": torch.full((2, 64), float("nan")).half()},
        None,
        "NaN or infinite",
    ),
    "auto-round": (
        "auto-round-gptq",
        {},
        {"packing_format": "auto_round:gptq"},
        "AutoRound's packing_format gptq",
    ),
    "awq gemv": ("awq", {}, {"version": "gemv"}, "groups that divide"),
    "awq gemv groups": ("awq-gemv", {}, {"group_size": 64}, "groups that divide"),
    "awq gemv fast": ("awq-gemv", {}, {"version": "gemv_fast"}, "version gemv_fast"),
    "hqq packing": (
        "hqq",
        {Q + "packing": torch.tensor(list(b"4bit_i8"), dtype=torch.uint8)},
        None,
        "hqq's 4bit_i8",
    ),
    "hqq shape": ("hqq", {Q + "shape": torch.tensor([64, 96])}, None, r"of \(64, 96\)"),
    "hqq zeros": ("hqq", {Q + "zero": None}, None, "without zero"),
    "awq marlin": ("awq", {}, {"version": "marlin"}, "version marlin"),
    "awq 8 bits": ("awq", {}, {"bits": 8}, "bits 8"),
    "awq zeros": ("awq", {Q + "qzeros": None}, None, "without .qzeros"),
    "awq groups": ("awq", {}, {"group_size": 16}, "groups that divide"),
    "unknown": ("int8", {}, {"quant_method": "aqlm"}, "aqlm"),
    "another's": ("int4", {}, {"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq"),
}


@pytest.mark.parametrize("lie", LIES)
def test_contradictory_metadata_is_refused(
    base: Callable[[str], Path], lie: str, tmp_path: Path
) -> None:
    name, tensors, settings, text = LIES[lie]
    shutil.copytree(base(name), tmp_path / "base")
    change(tmp_path / "base", tensors, settings)
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


METHODS = [method.value for method in QuantizationMethod if method != "compressed-tensors"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_do_not_fit_their_method_are_refused_by_its_name(
    base: Callable[[str], Path], method: str, tmp_path: Path
) -> None:
    shutil.copytree(base("fp8-channel"), tmp_path / "base")
    change(tmp_path / "base", {}, {"quant_method": method})
    for call in (adapterkit.dequantize, partial(adapterkit.quantize, to="nf4")):
        with pytest.raises(AdapterkitError) as caught:
            call(tmp_path / "base", out=tmp_path / "out")
        message = str(caught.value)
        assert method in message or method in ("fp8", "mxfp8"), message  # these say what is missing
        assert ("adapterkit dequantize" in message) <= (method in read_methods())


def test_all_contradictions_are_listed_together(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(base("int4"), tmp_path / "base")
    k = "model.layers.1.self_attn.k_proj."
    change(
        tmp_path / "base",
        {Q + "weight_scale": torch.ones(64, 1).bfloat16(), k + "weight_shape": None},
    )
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert Q + "weight" in str(caught.value) and k[:-1] in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "MXTensor", "NVFP4Tensor"]
)
def test_layouts_of_torchao_are_named(kind: str, tmp_path: Path) -> None:
    def renamed(key: str, parts: quantized_llama.Parts) -> dict[str, str]:
        return {
            key: quantized_llama.said_of("Int4Tensor")(key, parts)[key].replace("Int4Tensor", kind)
        }

    quantized_llama.base(replace(FORMS["torchao-Int4Tensor"], metadata=renamed), tmp_path / "base")
    with pytest.raises(AdapterkitError, match=f"torchao's {kind}"):
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")


def test_scales_of_zero_are_legal(base: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(base("int8"), tmp_path / "base")
    change(tmp_path / "base", {Q + "weight_scale": torch.zeros(64, 1)})
    adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert not stored(tmp_path / "out")[Q + "weight"].any()
