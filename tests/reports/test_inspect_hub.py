"""inspect of what is on the Hub: by headers, without a download."""

import json
import subprocess
import sys

import numpy as np
import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused
from adapterkit.verbs.look import tables
from tests.support import raw_files
from tests.support.hub_server import Hub
from tests.support.inspections import INDEX, inspect, problems_of, run

WIDE = 512


@pytest.fixture
def hub():
    generator = np.random.default_rng(0)
    normal = lambda *shape: raw_files.Stored.of(generator.standard_normal(shape).astype(np.float32))
    layers = [{f"model.layers.{i}.q_proj.weight": normal(WIDE, WIDE)} for i in range(2)]
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    index = {
        "metadata": {},
        "weight_map": {k: name for name, layer in zip(names, layers, strict=True) for k in layer},
    }
    base = {name: raw_files.tensors_file(layer) for name, layer in zip(names, layers, strict=True)}
    base |= {"config.json": b'{"hidden_size": 512}', INDEX: json.dumps(index).encode()}
    tensors = {}
    for i in range(2):
        tensors |= {
            f"{raw_files.PREFIX}model.layers.{i}.q_proj.lora_{k}.weight": normal(*s)
            for k, s in (("A", (64, WIDE)), ("B", (WIDE, 64)))
        }
    with Hub() as hub:
        hub.commit("org/base", base)
        hub.commit(
            "org/adapter",
            {
                f"v1/{k}": v
                for k, v in raw_files.AdapterFiles(raw_files.adapter_config(r=64), tensors)
                .folder()
                .content.items()
            },
        )
        yield hub


def on_hub(hub, tmp_path, *words):
    done = run(*words, "--json", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights_ranges(hub):
    return [
        (asked.range, asked.sent)
        for asked in hub.asked("GET", ".safetensors")
        if not asked.path.endswith(".json")
    ]


def test_a_base_on_the_hub_by_its_headers(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/base")
    assert (
        result["parameters"] == 2 * WIDE * WIDE
        and result["origin"]["repo"] == "org/base"
        and problems_of(result) == []
    )
    asked = weights_ranges(hub)
    # of a megabyte each
    assert len(asked) == 2 and all(part == (0, 65536) and sent <= 65536 for part, sent in asked)


def test_an_adapter_on_the_hub_by_its_header_and_config(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/adapter:v1")
    assert [(m["rank"], m["alpha"], m["scale"]) for m in result["modules"]] == [(64, 8, 0.125)] * 2
    assert not result["statistics"] and all(
        m["norm"] is None and m["trained"] is None for m in result["modules"]
    )
    asked = weights_ranges(hub)
    assert len(asked) == 1 and asked[0][0] == (0, 65536)  # of half a megabyte
    assert "--download" in tables.inspect_table(result)


def test_weights_on_the_hub_are_read_on_request(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/adapter:v1", "--base", "org/base", "--download")
    for name, repo in (("adapter", "org/adapter"), ("base", "org/base")):
        (tmp_path / name).mkdir()
        for path, data in hub.files(repo).items():
            (tmp_path / name / path.removeprefix("v1/")).write_bytes(data)
    assert result["modules"] == inspect(tmp_path / "adapter", base=tmp_path / "base")["modules"]
    assert all(m["relative"] > 0 for m in result["modules"])


def test_factors_on_the_hub_are_not_requested_without_download(hub, tmp_path, lora):
    for words in (["org/adapter:v1", "--plot", tmp_path / "x.html"], [lora, "--base", "org/base"]):
        done = run(*words, **hub.environment(tmp_path / "home"))
        assert (
            done.returncode == 1
            and "give --download" in done.stderr
            and "Traceback" not in done.stderr
        )
    assert weights_ranges(hub) == []


def test_inspect_of_headers_reads_no_factor(lora, llama, tmp_path, monkeypatch):
    """Of an adapter on this machine no factor is read, and torch is not needed; what headers tell
    is the same."""
    whole, read = inspect(lora), LocalFolder.read
    ranges = []
    monkeypatch.setattr(
        LocalFolder, "read", lambda self, *part: ranges.append(part) or read(self, *part)
    )
    result = inspect(lora, headers=True)
    unread = {"trained": None, "norm": None, "effective_rank": None}
    assert result == whole | {
        "statistics": False,
        "modules": [module | unread for module in whole["modules"]],
    }
    assert {name for name, *_ in ranges} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    } and len(ranges) == 2
    assert "--headers" in tables.inspect_table(result)
    assert inspect(llama, headers=True) == inspect(llama) | {"loads": None}
    code = (
        f"import sys, adapterkit; adapterkit.inspect({str(lora)!r}, headers=True); assert 'torch' "
        "not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    for options, word in (
        ({"base": llama}, "--base"),
        ({"plot": tmp_path / "x.html"}, "--plot"),
        ({"download": True}, "--download"),
    ):
        with pytest.raises(Refused, match="headers only") as refusal:
            inspect(lora, headers=True, **options)
        assert word in str(refusal.value)
