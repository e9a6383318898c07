"""merge from the Hub to the Hub: headers first, shards as they come, one commit at the end."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import load

import adapterkit
from tests.support import hub_models
from tests.support.forks import command as adapterkit_command
from tests.support.hub_client import TOKEN
from tests.support.hub_models import write
from tests.support.hub_server import Hub

LAYERS, WIDTH = 3, 512
SHARDS = hub_models.shards(LAYERS)


def base_files() -> dict[str, bytes]:
    """Shards of over 64 KiB, so that headers are read by range."""
    return hub_models.base_files(LAYERS, WIDTH, "qv")


def adapter_files() -> dict[str, bytes]:
    return hub_models.adapter_files(layers=range(LAYERS), width=WIDTH)


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", {f"v1/{name}": data for name, data in adapter_files().items()})
        yield hub


def command(hub, tmp_path, *words, **environment):
    variables = os.environ | hub.environment(tmp_path / "home") | environment
    line = ["merge", *words, "--out", tmp_path / "out"]
    return adapterkit_command(*line, env=variables, cwd=tmp_path)


def test_from_the_hub_to_the_hub(hub, tmp_path):
    words = ["org/base", "org/adapter:v1", "--json", "--push", "org/merged"]
    done = command(hub, tmp_path, *words, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert [i.get("revision") for i in receipt["recipe"]["inputs"]] == [
        hub.repos[r].refs["main"] for r in ("org/base", "org/adapter")
    ]
    assert set(receipt["inputs"]["0 org/base"]) == set(SHARDS)
    local = write(tmp_path / "base", base_files()), write(tmp_path / "adapter", adapter_files())
    adapterkit.merge(local[0], [local[1]], out=tmp_path / "local")
    pushed = hub.files("org/merged")
    for name in SHARDS:
        assert (
            (tmp_path / "out" / name).read_bytes()
            == (tmp_path / "local" / name).read_bytes()
            == pushed[name]
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} <= set(pushed)
    assert receipt["pushed"]["repo"] == "org/merged"
    assert '- "org/base"' in pushed["README.md"].decode()


def test_headers_are_read_before_any_shard_is_downloaded(hub, tmp_path):
    done = command(hub, tmp_path, "org/base", "org/adapter:v1", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    size = len(base_files()[SHARDS[0]])
    for name in SHARDS:
        assert 0 < hub.moved(name) < size / 10
    assert json.loads(done.stdout)["totals"]["tensors_changed"] == LAYERS


def test_a_shard_is_merged_while_later_ones_are_still_downloaded(hub, tmp_path):
    first = tmp_path / ".out.adapterkit" / "out" / SHARDS[0]
    seen = []

    def hold_the_last(asked):
        if (
            asked.method == "GET"
            and asked.path.endswith(SHARDS[-1])
            and "range" not in asked.headers
        ):
            until = time.monotonic() + 20
            while not first.exists() and time.monotonic() < until:
                time.sleep(0.01)
            seen.append(first.exists())

    hub.faults = hold_the_last
    done = command(hub, tmp_path, "org/base", "org/adapter:v1")
    assert done.returncode == 0, done.stderr
    assert seen and all(seen)


@pytest.mark.parametrize("copies", ["0", "1"])
def test_offline_from_the_cache(hub, tmp_path, copies: str):
    how = {"HF_HUB_DISABLE_SYMLINKS": copies}
    assert command(hub, tmp_path, "org/base", "org/adapter:v1", **how).returncode == 0
    links = [path for path in (tmp_path / "home").rglob("*") if path.is_symlink()]
    assert bool(links) == (copies == "0")
    before = (tmp_path / "out" / SHARDS[0]).read_bytes()
    hub.log.clear()
    done = command(hub, tmp_path, "org/base", "org/adapter:v1", "--overwrite", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == before
    assert not hub.log


def test_offline_without_a_copy_says_how_to_get_it(hub, tmp_path):
    done = command(hub, tmp_path, "org/base", "org/adapter:v1", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "hf download org/adapter" in done.stderr or "hf download org/base" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_merged_weights_are_the_sum(hub, tmp_path):
    assert command(hub, tmp_path, "org/base", "org/adapter:v1=0.5").returncode == 0
    factors, base = (
        load(adapter_files()["adapter_model.safetensors"]),
        load(base_files()[SHARDS[1]]),
    )
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    delta = factors[prefix + "B.weight"].astype(np.float64) @ factors[prefix + "A.weight"].astype(
        np.float64
    )
    found = load((tmp_path / "out" / SHARDS[1]).read_bytes())
    key = "model.layers.1.self_attn.q_proj.weight"
    assert np.allclose(found[key], base[key] + 0.5 * delta, rtol=1e-6, atol=1e-6)
