"""Adapters of other kinds than plain factors in a pipeline: LoHa, LoKr, OFT, differences, DoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from tests.support.plain_pipelines import file_of, random, write_pipeline

GOLDEN = Path(__file__).parents[1] / "formats" / "golden" / "lycoris"
BLOCK = "down_blocks.0.attentions.0"
SHAPES = {
    f"{BLOCK}.proj_in": (8, 8, 1, 1),
    f"{BLOCK}.transformer_blocks.0.attn1.to_q": (8, 8),
    f"{BLOCK}.transformer_blocks.0.attn2.to_k": (8, 12),
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    f"{BLOCK}.transformer_blocks.0.norm1": (8,),
    "down_blocks.0.resnets.0.norm1": (8,),
}


@pytest.fixture
def base(tmp_path):
    """Names of a part of SD 1.5's unet, in the sizes of the golden files."""
    base = write_pipeline(tmp_path / "base")
    tensors = {f"{name}.weight": random(*shape, seed=1) for name, shape in SHAPES.items()}
    tensors |= {f"{name}.bias": random(8, seed=2) for name in SHAPES}
    save_file(tensors, base / "unet" / file_of("unet"), {"format": "pt"})
    return base


def added(base, file, tmp_path, weight=0.5) -> dict[str, torch.Tensor]:
    receipt = adapterkit.merge(base, {file: weight}, out=tmp_path / "out", verify=True)
    before, after = (load_file(top / "unet" / file_of("unet")) for top in (base, tmp_path / "out"))
    changed = {key: after[key] - value for key, value in before.items()}
    changed = {key: value for key, value in changed.items() if value.any()}
    assert receipt.data["verified"]["tensors"] == len(changed)
    return changed


def keys_of(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each module by its name."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in SHAPES}
    for key, value in load_file(file).items():
        name, _, role = key.partition(".")
        modules.setdefault(names[name], {})[role] = value
    return modules


def test_a_loha_is_merged_into_a_pipeline(base, tmp_path):
    file = GOLDEN / "loha.safetensors"
    found = added(base, file, tmp_path)
    modules = keys_of(file)
    assert found.keys() == {f"{name}.weight" for name in modules}
    for name, one in modules.items():
        first, second = (one[f"hada_w{n}_a"] @ one[f"hada_w{n}_b"] for n in (1, 2))
        expected = 0.5 * float(one["alpha"]) / 3 * (first * second)
        torch.testing.assert_close(
            found[f"{name}.weight"], expected.view(SHAPES[name]), rtol=1e-4, atol=1e-5
        )


def test_differences_of_weights_biases_and_norms(base, tmp_path):
    file = GOLDEN / "full.safetensors"
    found, roles = added(base, file, tmp_path), {"diff": "weight", "w_norm": "weight"}
    expected = {
        f"{name}.{roles.get(role, 'bias')}": 0.5 * value
        for name, one in keys_of(file).items()
        for role, value in one.items()
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lokr", "oft", "dora", "locon_tucker"])
def test_kinds_whose_rows_are_checked_again(base, kind, tmp_path):
    assert added(base, GOLDEN / f"{kind}.safetensors", tmp_path, weight=1).keys() == {
        f"{name}.weight" for name in list(SHAPES)[:4]
    }
