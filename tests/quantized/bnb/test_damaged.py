"""Files of bitsandbytes' formats that contradict themselves are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit
from adapterkit.core.errors import AdapterkitError, MultipleErrors
from adapterkit.kernels.quant import blockwise
from tests.support.bnb import INF, NAN, STATE, K, Q, text
from tests.support.quantized_llama import change

PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}
DOUBLE = PLAIN | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01}
LIES: dict[str, tuple[str, dict[str, Any], str]] = {  # kind, changes, what the refusal says
    "no absmax": ("nf4", {K + ".absmax": None}, "without .absmax"),
    "no quant_map": ("nf4", {K + ".quant_map": None}, "without .quant_map"),
    "no codes": ("nf4", {K: None}, "without "),
    "no state": ("nf4", {K + STATE + "nf4": None}, "k_proj"),
    "no nested_absmax": ("nf4-double", {K + ".nested_absmax": None}, "without .nested_absmax"),
    "no nested_quant_map": (
        "nf4-double",
        {K + ".nested_quant_map": None},
        "without .nested_quant_map",
    ),
    "no JSON": ("nf4", {K + STATE + "nf4": text("{'a': 1}")}, "not a JSON object"),
    "a list": ("nf4", {K + STATE + "nf4": text("[1]")}, "not a JSON object"),
    "an empty object": ("nf4", {K + STATE + "nf4": text("{}")}, "next to weights of bnb4"),
    "no text": ("nf4", {K + STATE + "nf4": torch.zeros(0, dtype=torch.uint8)}, "not a JSON object"),
    "not UTF-8": (
        "nf4",
        {K + STATE + "nf4": torch.full((40,), 255, dtype=torch.uint8)},
        "not a JSON object",
    ),
    "nested deeply": ("nf4", {K + STATE + "nf4": text("[" * 100_000)}, "not a JSON object"),
    "another shape": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [64, 64]})},
        "for (64, 64)",
    ),
    "three numbers": ("nf4", {K + STATE + "nf4": text(PLAIN | {"shape": [64, 2, 64]})}, "state"),
    "shape of floats": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [64.0, 128.0]})},
        "state",
    ),
    "shape below 0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"shape": [-64, -128]})}, "state"),
    "huge shape": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [1 << 40, 1 << 40]})},
        "blocks of 64",
    ),
    "block of 128": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 128})}, "blocks of 128"),
    "block of 0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 0})}, "state"),
    "block of true": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": True})}, "state"),
    "block of 64.0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 64.0})}, "state"),
    "block in a list": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": [64]})}, "state"),
    "af4": ("nf4", {K + STATE + "nf4": text(PLAIN | {"quant_type": "af4"})}, "state"),
    "fp4 in nf4": ("nf4", {K + STATE + "nf4": text(PLAIN | {"quant_type": "fp4"})}, "state"),
    "a state of af4": (
        "nf4",
        {K + STATE + "nf4": None, K + STATE + "af4": text(PLAIN | {"quant_type": "af4"})},
        "kind 'af4'",
    ),
    "two states": ("nf4", {K + STATE + "fp4": text(PLAIN | {"quant_type": "fp4"})}, "k_proj"),
    "dtype of integers": ("nf4", {K + STATE + "nf4": text(PLAIN | {"dtype": "int64"})}, "state"),
    "unknown dtype": ("nf4", {K + STATE + "nf4": text(PLAIN | {"dtype": ["x"]})}, "state"),
    "a table of fp4": ("nf4", {K + ".quant_map": blockwise.quant_map("fp4")}, "another table"),
    "a table with NaN": ("nf4", {K + ".quant_map": torch.full((16,), NAN)}, "another table"),
    "a short table": ("nf4", {K + ".quant_map": torch.zeros(15)}, "quant_map F32 (15,)"),
    "NaN": (
        "nf4",
        {K + ".absmax": torch.ones(128).index_fill_(0, torch.tensor([7]), NAN)},
        "NaN or infinite",
    ),
    "infinity": (
        "fp4",
        {K + ".absmax": torch.ones(128).index_fill_(0, torch.tensor([7]), -INF)},
        "NaN or infinite",
    ),
    "NaN nested": ("nf4-double", {K + ".nested_absmax": torch.tensor([NAN])}, "NaN or infinite"),
    "NaN in the nested table": (
        "nf4-double",
        {K + ".nested_quant_map": torch.full((256,), NAN)},
        "NaN or infinite",
    ),
    "few scales": ("nf4", {K + ".absmax": torch.ones(127)}, "absmax F32 (127,)"),
    "scales in half": ("nf4", {K + ".absmax": torch.ones(128).half()}, "absmax F16"),
    "few nested scales": (
        "nf4-double",
        {K + ".nested_absmax": torch.ones(2)},
        "nested_absmax F32 (2,)",
    ),
    "few nested codes": (
        "nf4-double",
        {K + ".absmax": torch.ones(127, dtype=torch.uint8)},
        "absmax U8 (127,)",
    ),
    "a short nested table": (
        "nf4-double",
        {K + ".nested_quant_map": torch.zeros(255)},
        "nested_quant_map F32 (255,)",
    ),
    "nested scales in half": (
        "nf4-double",
        {K + ".nested_absmax": torch.ones(1).half()},
        "nested_absmax F16",
    ),
    "offset NaN": (
        "nf4-double",
        {K + STATE + "nf4": text(json.dumps(DOUBLE | {"nested_offset": NAN}))},
        "state",
    ),
    "offset in words": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_offset": "0.1"})},
        "state",
    ),
    "nested block": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_blocksize": 128})},
        "state",
    ),
    "nested dtype": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_dtype": "int8"})},
        "state",
    ),
    "said to be plain": ("nf4-double", {K + STATE + "nf4": text(PLAIN)}, "absmax U8"),
    "said to be double": ("nf4", {K + STATE + "nf4": text(DOUBLE)}, "without .nested_absmax"),
    "codes of 8 bytes": ("nf4", {K: torch.ones(512, 1, dtype=torch.int64)}, "codes I64"),
    "few codes": ("nf4", {K: torch.ones(4095, 1, dtype=torch.uint8)}, "codes U8 (4095, 1)"),
    "scales in a matrix": (
        "nf4",
        {K + ".absmax": torch.ones(64, 2).bfloat16()},
        "absmax BF16 (64, 2)",
    ),
    "int8 without codes": ("int8", {Q + ".weight": None}, "without .weight"),
    "int8 without scales": ("int8", {Q + ".SCB": None}, "q_proj"),
    "int8 few scales": ("int8", {Q + ".SCB": torch.ones(127)}, "SCB F32 (127,)"),
    "int8 scales of columns": ("int8", {Q + ".SCB": torch.ones(1, 128)}, "SCB F32 (1, 128)"),
    "int8 scales in half": ("int8", {Q + ".SCB": torch.ones(128).half()}, "SCB F16"),
    "int8 NaN": ("int8", {Q + ".SCB": torch.full((128,), NAN)}, "NaN or infinite"),
    "int8 infinite": ("int8", {Q + ".SCB": torch.full((128,), INF)}, "NaN or infinite"),
    "int8 tiles": ("int8", {Q + ".weight_format": torch.tensor(1, dtype=torch.uint8)}, "format 1"),
    "int8 format in words": (
        "int8",
        {Q + ".weight_format": torch.ones(3, dtype=torch.uint8)},
        "format",
    ),
    "int8 floats": ("int8", {Q + ".weight": torch.ones(128, 128)}, "F32 (128, 128)"),
    "int8 bytes": (
        "int8",
        {Q + ".weight": torch.ones(128, 128, dtype=torch.uint8)},
        "U8 (128, 128)",
    ),
    "int8 cubes": (
        "int8",
        {Q + ".weight": torch.ones(128, 16, 8, dtype=torch.int8)},
        "I8 (128, 16, 8)",
    ),
}


MERGED = (
    "no absmax",
    "block of 128",
    "NaN",
    "offset in words",
    "scales in a matrix",
    "int8 tiles",
    "int8 NaN",
)


@pytest.mark.parametrize("lie", LIES)
def test_contradictory_metadata_is_refused(packed, lora: Path, lie: str, tmp_path: Path) -> None:
    jobs: list[Callable] = [adapterkit.dequantize]
    if lie in MERGED:
        jobs.append(lambda base, **how: adapterkit.merge(base, [lora], **how))
    kind, tensors, message = LIES[lie]
    source = shutil.copytree(packed("llama-bf16", kind), tmp_path / "base")
    change(source, tensors)
    for job in jobs:
        with pytest.raises(AdapterkitError) as caught:
            job(source, out=tmp_path / "out")
        assert message in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_all_contradictions_are_listed_together(packed, lora: Path, tmp_path: Path) -> None:
    source = shutil.copytree(packed("llama-bf16", "nf4-double"), tmp_path / "base")
    layer = "model.layers.1.mlp."
    change(
        source,
        {
            K + ".absmax": None,
            f"{Q}.weight.nested_absmax": torch.tensor([NAN]),
            f"{layer}up_proj.weight{STATE}nf4": text("no"),
            f"{layer}down_proj.weight.quant_map": torch.zeros(16),
        },
    )
    with pytest.raises(MultipleErrors) as caught:
        adapterkit.merge(source, [lora], out=tmp_path / "out")
    for word in (
        K,
        "without .absmax",
        f"{Q}.weight.nested_absmax",
        f"{layer}up_proj",
        f"{layer}down_proj.weight.quant_map",
    ):
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
