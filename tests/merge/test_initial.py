"""Adapters of a base without their initial factors, merged onto the original."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    oracle.save_base(oracle.llama(hidden_size=32, intermediate_size=64, head_dim=8), folder, "bf16")
    return folder


@pytest.fixture
def trained(base, tmp_path) -> Path:
    """An adapter with an implicit residual, after some training."""
    out = tmp_path / "init"
    adapterkit.init(
        base, method="pissa", rank=4, alpha=6, targets="all-linear", residual="implicit", out=out
    )
    file = out / "adapter" / WEIGHTS
    torch.manual_seed(0)
    tensors = {key: t + 0.05 * torch.randn_like(t) for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return out / "adapter"


def expected(base: Path, trained: Path, weight: float) -> dict[str, torch.Tensor]:
    """round(W + weight·(s·b@a - s·b₀@a₀)), in float64."""
    values = load_file(base / "model.safetensors")
    after, before = load_file(trained / WEIGHTS), load_file(trained / "initial" / WEIGHTS)
    for key in after:
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        other = key.replace("lora_A", "lora_B")
        change = after[other].double() @ after[key].double()
        change -= before[other].double() @ before[key].double()
        values[name] = (values[name].double() + weight * 1.5 * change).bfloat16()
    return values


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_merge_onto_the_original(weight, base, trained, tmp_path):
    receipt = adapterkit.merge(base, [(trained, weight)], out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in expected(base, trained, weight).items():
        wrong = int((merged[name] != value).sum())
        assert wrong <= 1e-3 * value.numel(), name
    names = [one["name"] for one in receipt.data["adapters"]]
    assert names == ["adapter", "initial"]


def test_rebase_uses_the_factors_next_to_the_adapter(base, trained, tmp_path):
    adapterkit.rebase(trained, out=tmp_path / "plain")
    adapterkit.merge(base, [tmp_path / "plain"], out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in expected(base, trained, 1.0).items():
        assert int((merged[name] != value).sum()) <= 1e-3 * value.numel(), name


def test_a_base_that_is_the_residual_loses_nothing_more(base, trained, tmp_path):
    receipt = adapterkit.merge(base, [trained], base_is_residual=True, out=tmp_path / "out")
    assert [one["name"] for one in receipt.data["adapters"]] == ["adapter"]


def test_without_the_initial_factors(base, trained, tmp_path):
    shutil.rmtree(trained / "initial")
    with pytest.raises(Refused, match="without the folder initial/"):
        adapterkit.merge(base, [trained], out=tmp_path / "out")
    with pytest.raises(Refused, match="without the folder initial/"):
        adapterkit.rebase(trained, out=tmp_path / "plain")


def test_initial_factors_of_other_modules(base, trained, tmp_path):
    file = trained / "initial" / WEIGHTS
    tensors = load_file(file)
    kept = {key: t for key, t in tensors.items() if "layers.0.mlp" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    config = trained / "initial" / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["target_modules"] = [n for n in settings["target_modules"] if "layers.0.mlp" not in n]
    config.write_text(json.dumps(settings))
    with pytest.raises(Refused, match=r"only one of .*layers\.0\.mlp"):
        adapterkit.merge(base, [trained], out=tmp_path / "out")


def test_other_verbs_ask_for_a_plain_adapter(trained, tmp_path):
    with pytest.raises(Refused, match="adapterkit rebase"):
        adapterkit.combine([trained, trained], method="linear", out=tmp_path / "out")
