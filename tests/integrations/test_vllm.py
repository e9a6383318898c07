"""The resolver of adapters in any format, by vLLM's interface."""

import asyncio
import importlib
import json
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
    assert plugin._max_rank(["serve", "--max-lora-rank", "64"]) == 64
    assert plugin._max_rank(["serve", "--max-lora-rank=8"]) == 8
    assert plugin._max_rank(["serve"]) == 16


def test_vllm_finds_it():
    (entry,) = entry_points(group="vllm.general_plugins", name="adapterkit")
    assert entry.value == "adapterkit.integrations.vllm:register"
