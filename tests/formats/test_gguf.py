"""GGUF adapters against those that llama.cpp's converter makes of the same PEFT adapters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterkit

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "golden" / "gguf"
EXPERTS = ("mixtral", "qwen3_moe")
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/f32.gguf"))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF")}


def peft_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_converter_writes(case: str, tmp_path: Path):
    home = GOLDEN / case
    adapterkit.convert(home / "adapter", to="gguf", base=home / "base", out=tmp_path / "a.gguf")
    ours, theirs = tensors(tmp_path / "a.gguf"), tensors(home / "f32.gguf")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name
    expected = metadata(home / "f32.gguf")
    unread = ("general.name", "general.quantization_version")  # llama.cpp does not ask for them
    assert metadata(tmp_path / "a.gguf") == {k: v for k, v in expected.items() if k not in unread}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_the_adapter(case: str, tmp_path: Path):
    home, out = GOLDEN / case, tmp_path / "out"
    to = "peft-per-expert" if case in EXPERTS else "peft"
    adapterkit.convert(home / "f32.gguf", to=to, base=home / "base", out=out)
    ours, theirs = peft_tensors(out), peft_tensors(home / "adapter")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    read, written = (json.loads((folder / "adapter_config.json").read_text()) for folder in (
        out, home / "adapter"
    ))  # fmt: skip
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "alora_invocation_tokens"):
        assert read.get(key) == written[key], key
