"""convert from the Hub: the plan reads what it needs by range, then the file is downloaded once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load, save

import adapterkit
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


def command(hub, tmp_path, *words):
    variables = os.environ | hub.environment(tmp_path / "home")
    line = [sys.executable, "-m", "adapterkit", "convert", "org/lora", *words]
    return subprocess.run(line, capture_output=True, text=True, env=variables, cwd=tmp_path)


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
