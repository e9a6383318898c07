"""convert from the Hub: the plan reads what it needs by range, then the file is downloaded once."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load, save

import adapterkit
from tests.support.forks import command as adapterkit_command
from tests.support.hub_client import TOKEN
from tests.support.hub_server import Hub

BLOCKS, WIDTH, RANK = 40, 64, 16
NAME = "trained.safetensors"


def kohya_file(blocks=BLOCKS):
    """A LoRA of Flux's projections with an alpha for each module, far apart in the file."""
    generator = np.random.default_rng(0)
    tensors = {}
    for n in range(blocks):
        key = f"lora_unet_double_blocks_{n}_img_attn_proj"
        tensors[f"{key}.alpha"] = np.array(n + 1, np.float32)
        for side, shape in (("down", (RANK, WIDTH)), ("up", (WIDTH, RANK))):
            value = generator.standard_normal(shape).astype(np.float32)
            tensors[f"{key}.lora_{side}.weight"] = value
    return save(tensors)


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.commit("org/lora", {NAME: kohya_file(), "README.md": b"# LoRA\n"})
        yield hub


def command(hub, tmp_path, *words, source="org/lora"):
    variables = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
    return adapterkit_command("convert", source, *words, env=variables, cwd=tmp_path)


def test_a_conversion_is_that_of_the_file(hub, tmp_path):
    done = command(hub, tmp_path, "--to", "diffusers", "--out", "out.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.moved(NAME) < 1.5 * len(kohya_file())  # the header and alphas, then the file
    receipt = json.loads(done.stdout)
    source = receipt["recipe"]["inputs"][0]
    assert (source["repo"], source["revision"]) == ("org/lora", hub.repos["org/lora"].refs["main"])
    (tmp_path / NAME).write_bytes(kohya_file())
    adapterkit.convert(tmp_path / NAME, to="diffusers", out=tmp_path / "local.safetensors")
    written, own = (tmp_path / name for name in ("out.safetensors", "local.safetensors"))
    assert load(written.read_bytes()).keys() == load(own.read_bytes()).keys()
    assert written.read_bytes() == own.read_bytes()


def pipeline_file() -> bytes:
    """A LoRA of Flux and of its text encoder, the smaller part of the file."""
    generator, tensors = np.random.default_rng(1), {}
    names = [f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1" for n in range(2)]
    names += [f"lora_unet_double_blocks_{n}_img_attn_proj" for n in range(19)]
    for name in names:
        tensors[f"{name}.alpha"] = np.array(2, np.float32)
        for side, shape in (("down", (64, 512)), ("up", (512, 64))):
            value = generator.standard_normal(shape).astype(np.float32)
            tensors[f"{name}.lora_{side}.weight"] = value
    return save(tensors)


@pytest.mark.parametrize("out", ["te.safetensors", "hf://me/te"])
def test_only_the_chosen_component_is_downloaded(hub, tmp_path, out: str):
    data = pipeline_file()
    hub.commit("org/both", {NAME: data})
    words = ["--to", "diffusers", "--component", "text_encoder"]
    done = command(hub, tmp_path, *words, "--out", out, source=f"org/both:{NAME}")
    assert done.returncode == 0, done.stderr
    assert hub.moved(NAME) < len(data) // 5
    (tmp_path / "both.safetensors").write_bytes(data)
    here = tmp_path / "here.safetensors"
    options = {"to": "diffusers", "component": "text_encoder"}
    adapterkit.convert(tmp_path / "both.safetensors", out=here, **options)
    on_hub = hub.files("me/te") if "me/te" in hub.repos else {}
    there = on_hub.get("pytorch_lora_weights.safetensors") or (tmp_path / out).read_bytes()
    assert there == here.read_bytes()
