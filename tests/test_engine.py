"""The local engine's arithmetic: float64 bases, and CUDA where there is a card."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import Refused


def job(folder, dtype, rows=700, columns=513):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    a, b = torch.randn(8, columns) * 0.1, torch.randn(rows, 8) * 0.1
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file({"x.weight": weight, "y.weight": weight.clone()}, folder / "base" / "model.safetensors")
    factors = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 12}))
    return weight.double() + 1.5 * b.double() @ a.double()


def merged(folder, out="out", **options):
    adapterkit.merge(folder / "base", [folder / "adapter"], out=folder / out, verify=True, **options)
    return load_file(folder / out / "model.safetensors")


def test_a_float64_base_is_merged_in_float64(tmp_path):
    exact = job(tmp_path, torch.float64)
    found = merged(tmp_path)
    assert found["x.weight"].dtype == torch.float64
    assert (found["x.weight"] - exact).abs().max() < 1e-13


def test_a_device_that_is_not_there_is_refused(tmp_path):
    job(tmp_path, torch.bfloat16)
    for device in (f"cuda:{torch.cuda.device_count()}", "tpu", "cuda:x"):
        with pytest.raises(Refused, match="device"):
            merged(tmp_path, device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_gives_the_rounded_value_and_the_same_bytes_every_time(dtype, tmp_path):
    exact = job(tmp_path, dtype, 3000, 4096)
    first, second = merged(tmp_path, device="cuda"), merged(tmp_path, "again", device="cuda")
    assert torch.equal(first["x.weight"], second["x.weight"])
    assert torch.equal(first["y.weight"], second["y.weight"])
    wrong = first["x.weight"] != exact.to(dtype)
    assert wrong.float().mean() < (1e-4 if dtype != torch.float32 else 0.5)
    assert torch.allclose(first["x.weight"].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
