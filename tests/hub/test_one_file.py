"""Image models in one file from and to the Hub."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from tests.support.hub_client import TOKEN
from tests.support.one_file import factors_of, write_adapter, write_family


@pytest.mark.slow
def test_from_the_hub_to_the_hub(hub, connect, tmp_path: Path):
    """With factors, and a difference that these do not hold."""
    base = write_family("wan_t2v", tmp_path / "wan.safetensors")
    lora = write_adapter(factors_of("wan_t2v", every=3), tmp_path / "lora.safetensors")
    key = "diffusion_model.blocks.0.self_attn.norm_q.diff"
    factors = {
        f"diffusion_model.blocks.0.ffn.0.lora_{word}.weight": torch.ones(shape)
        for word, shape in (("down", (2, 16)), ("up", (24, 2)))
    }
    save_file({key: torch.ones(16)} | factors, tmp_path / "diff.safetensors")
    adapterkit.merge(base, [lora, tmp_path / "diff.safetensors"], out=tmp_path / "out.safetensors")
    hub.commit("org/base", {"w/wan.safetensors": base.read_bytes(), "other.safetensors": b"x"})
    files = {path.name: path.read_bytes() for path in (lora, tmp_path / "diff.safetensors")}
    hub.commit("org/loras", files)
    client = connect(hub, HF_TOKEN=TOKEN)
    merge = (
        "__import__('adapterkit').merge('org/base:w/wan.safetensors', "
        "['org/loras:lora.safetensors', 'org/loras:diff.safetensors'], out={!r}).data['notes']"
    )
    client(merge.format("hf://org/new:there/merged.safetensors"))
    client(merge.format(str(tmp_path / "here.safetensors")))
    merged = (tmp_path / "out.safetensors").read_bytes()
    assert hub.files("org/new")["there/merged.safetensors"] == merged
    assert "there/merged.safetensors.adapterkit.json" in hub.files("org/new")
    assert (tmp_path / "here.safetensors").read_bytes() == merged
    error = client.refusal(merge.format("hf://org/new-folder"))
    assert "ends in .safetensors" in error.parts["expected"]
