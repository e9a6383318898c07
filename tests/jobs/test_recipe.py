"""Recipes of mergekit: what mergekit writes, and refusals by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from tests.jobs.mergekit.inputs import RECIPES, recipe, sampled, write_inputs

GOLDEN = json.loads(Path(__file__).with_name("mergekit").joinpath("golden.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_inputs(folder)
    return folder


def run(text: str, home: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    file = out.with_suffix(".yml")
    file.write_text(text)
    adapterkit.run(file, out=out, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_as_mergekit(name: str, home: Path, tmp_path: Path) -> None:
    """Of methods that draw at density 1: then the draws of both do not matter."""
    ours = run(recipe(name, home), home, tmp_path / "out")
    base = load_file(home / "base/model.safetensors")
    changed = [key for key in base if not torch.equal(base[key], ours[key].to(base[key]))]
    assert ours.keys() == base.keys() and len(changed) >= 9
    bits = 8 if name == "della" else 21  # written in bfloat16
    for key, numbers in GOLDEN[name].items():
        given = torch.tensor(sampled(ours)[key])
        torch.testing.assert_close(
            given, torch.tensor(numbers), rtol=2.0**-bits, atol=2e-6, msg=f"{key}: {given}"
        )
