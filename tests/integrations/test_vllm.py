"""The resolver of adapters in any format, by vLLM's interface."""

import asyncio
import importlib
import json
import sys
from importlib.metadata import entry_points

import pytest

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle


@pytest.fixture
def resolve(vllm, lora, llama, tmp_path, monkeypatch):
    """(name) -> the request of an adapter in a folder that is served."""
    root = tmp_path / "adapters"
    adapterkit.convert(lora, to="mlx", out=root / "mine", base=llama)
    oracle.edit_config(lora, tmp_path / "secret")
    monkeypatch.setenv("ADAPTERKIT_LORA_DIR", str(root))
    monkeypatch.setenv("ADAPTERKIT_LORA_CACHE", str(tmp_path / "cache"))
    plugin = importlib.import_module("adapterkit.integrations.vllm")

    plugin.register()
    return lambda name: asyncio.run(vllm["adapterkit"].resolve_lora(str(llama), name))


def test_an_adapter_of_another_format_is_converted_once(resolve, lora, llama, tmp_path):
    request = resolve("mine")
    adapterkit.convert(lora, to="vllm", base=llama, out=tmp_path / "plain")
    assert adapterkit.diff(request.lora_path, tmp_path / "plain")["same"]
    assert request.lora_name == "mine" and request.lora_int_id > 0
    again = resolve("mine")
    assert (again.lora_path, again.lora_int_id) == (request.lora_path, request.lora_int_id)
    assert len([*(tmp_path / "cache").iterdir()]) == 1


@pytest.mark.parametrize("name", ["absent", "../secret", "/etc", ".", "", "org/adapter"])
def test_names_that_are_not_served_resolve_to_none(resolve, name):
    assert resolve(name) is None


def test_an_adapter_above_the_server_s_rank_is_refused(resolve, vllm, tmp_path):
    vllm["adapterkit"].max_rank = 1
    with pytest.raises(Refused, match="--max-lora-rank") as caught:
        resolve("mine")
    assert "adapterkit resize" in caught.value.hint
    damaged = tmp_path / "adapters" / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(adapterkit.AdapterkitError):
        resolve("damaged")


def test_it_stays_away_unless_asked(vllm, monkeypatch):
    for name in ("ADAPTERKIT_LORA_DIR", "ADAPTERKIT_LORA_HUB"):
        monkeypatch.delenv(name, raising=False)
    plugin = importlib.import_module("adapterkit.integrations.vllm")

    plugin.register()
    assert vllm == {}


@pytest.fixture
def settings(vllm, tmp_path, monkeypatch):
    """(argv) -> the settings that the plugin takes from a server's command line."""
    plugin = importlib.import_module("adapterkit.integrations.vllm")
    monkeypatch.setenv("ADAPTERKIT_LORA_DIR", str(tmp_path))
    monkeypatch.setenv("ADAPTERKIT_LORA_CACHE", str(tmp_path / "cache"))

    def of(*argv):
        monkeypatch.setattr(sys, "argv", ["vllm", "serve", "base", *argv])
        plugin.register()
        resolver = vllm["adapterkit"]
        return resolver.max_rank, resolver.serving.given.get("lora-target-modules", [])

    return of


def test_the_server_s_own_settings(settings, tmp_path, monkeypatch):
    assert settings("--max-lora-rank", "64", "--enable-lora") == (64, [])
    assert settings("--max_lora_rank=8", "--port", "1") == (8, [])
    assert settings("--lora-target-modules", "q_proj", "v_proj") == (16, ["q_proj", "v_proj"])
    file = tmp_path / "server.yaml"
    file.write_text("max-lora-rank: 32\nlora-target-modules: [o_proj]\nmodel: x\n")
    assert settings("--config", str(file)) == (32, ["o_proj"])
    assert settings("--config", str(file), "--max-lora-rank", "128") == (128, ["o_proj"])
    monkeypatch.setenv("ADAPTERKIT_MAX_LORA_RANK", "256")
    assert settings("--max-lora-rank", "64") == (256, [])


def test_modules_that_the_server_leaves_out_are_refused(resolve, vllm, monkeypatch, tmp_path):
    plugin = importlib.import_module("adapterkit.integrations.vllm")
    for targets, refused in (("qkv_proj", True), ("all_linear", True), (None, False)):
        argv = ["serve"] + (["--lora-target-modules", targets] if targets else [])
        monkeypatch.setattr(sys, "argv", argv)
        plugin.register()
        if not refused:
            assert resolve("mine")
            continue
        with pytest.raises(Refused, match="are not in the server's --lora-target-modules"):
            resolve("mine")


def test_vllm_finds_it():
    (entry,) = entry_points(group="vllm.general_plugins", name="adapterkit")
    assert entry.value == "adapterkit.integrations.vllm:register"
