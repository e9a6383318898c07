"""Weights that are written in float32: each is the rounded float64 value, whatever the base's
dtype, adapters and edits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from tests.support import oracle
from tests.support.oracle import load, stored

ROWS, COLUMNS, RANK = 1500, 1024, 16


def job(folder: Path, dtype: torch.dtype, **config) -> tuple[Tensor, Tensor]:
    """A weight of some chunks and a LoRA on it; the merged value in float64."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64).mul(0.02).to(dtype)
    a = torch.randn(RANK, COLUMNS, generator=generator) * 0.05
    b = torch.randn(ROWS, RANK, generator=generator) * 0.01
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    save_file({"fit.weight": w}, folder / "base/model.safetensors")
    prefix = "base_model.model.fit.lora_"
    tensors = {prefix + "A.weight": a, prefix + "B.weight": b}
    if config.get("use_dora"):
        tensors[prefix + "magnitude_vector"] = torch.rand(ROWS, generator=generator) + 0.5
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    text = {"peft_type": "LORA", "r": RANK, "lora_alpha": 24, "target_modules": ["fit"]} | config
    (folder / "adapter/adapter_config.json").write_text(oracle.json.dumps(text))
    exact = torch.addmm(w.double(), b.double(), a.double(), alpha=24 / RANK)
    if config.get("use_dora"):
        exact *= (tensors[prefix + "magnitude_vector"].double() / exact.norm(dim=1))[:, None]
    return w, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_values_are_the_rounded_float64_ones(
    dtype: torch.dtype, config: dict, tmp_path: Path
) -> None:
    w, exact = job(tmp_path, dtype, **config)
    oracle.merge(
        tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out", dtype="fp32", verify=True
    )
    actual = load_file(tmp_path / "out/model.safetensors")["fit.weight"]
    assert actual.dtype == torch.float32
    assert float((actual != w).float().mean()) > 0.9
    assert float((actual != exact.float()).float().mean()) < 1e-6


def test_float64_stays_float64(tmp_path: Path) -> None:
    _, exact = job(tmp_path, torch.float64)
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out", verify=True)
    actual = load_file(tmp_path / "out/model.safetensors")["fit.weight"]
    assert actual.dtype == torch.float64
    assert float((actual - exact).abs().max()) < 1e-16


def test_verify_sees_the_last_bit_of_a_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.kernels import rows

    job(tmp_path, torch.float32)
    monkeypatch.setattr(
        rows,
        "add_low_rank",
        lambda w, left, right: w.add_((left.float() @ right.float()).to(w.dtype)),
    )
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(adapterkit.core.errors.Damaged, match="row 0, column"):
        adapterkit.verify(tmp_path / "out", base=tmp_path / "base", adapters=[tmp_path / "adapter"])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_bert_and_gpt2_in_float32_are_exact(name: str, cached_folder, tmp_path: Path) -> None:
    build = getattr(oracle, name)
    base = cached_folder(
        f"float32-{name}", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    targets = ["query", "dense"] if name == "bert" else ["c_attn", "c_proj"]
    adapter = cached_folder(
        f"float32-{name}-lora",
        lambda f: oracle.train(load(build, base), f, target_modules=targets, bias="all"),
    )
    oracle.merge(base, adapter, out=tmp_path / "out", verify=True)
    expected = oracle.exact(oracle.peft_model(load(build, base), adapter))
    actual = {key.removeprefix("bert."): value for key, value in stored(tmp_path / "out").items()}
    total = wrong = 0
    for key, one in expected.items():
        value = actual.get(key.removeprefix("bert."), actual.get(key.removeprefix("transformer.")))
        total, wrong = total + value.numel(), wrong + int((value != one.value.float()).sum())
    assert total > 1000 and wrong <= 1e-4 * total
