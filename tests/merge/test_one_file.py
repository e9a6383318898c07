"""Image and video models in one file: merged files are base + LoRA in the file's own names."""

import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from tests.support.one_file import FAMILIES, expected, factors_of, write_adapter, write_family

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("one-file")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_diffusers_in_every_layer(family, home):
    """Each layer of each part: fused, renamed and in the file's order of rows."""
    base = write_family(family, home / f"{family}.safetensors")
    factors = factors_of(family)
    adapter = write_adapter(factors, home / f"{family}-lora.safetensors")
    out = home / f"{family}-merged.safetensors"
    adapterkit.merge(base, {adapter: 0.5}, out=out)
    before, after, right = load_file(base), load_file(out), expected(family, factors, 0.5)
    assert [*after] == [*before]
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) >= len({*factors}) / 4
    for key, value in right.items():
        torch.testing.assert_close(after[key], value.float(), rtol=1e-6, atol=1e-6, msg=key)
