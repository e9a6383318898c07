"""From the Hub to the Hub, where it keeps large files as Git LFS does and where it has Xet."""

import json
import os

import pytest
from safetensors.numpy import load, save

import adapterkit
from tests.hub.test_merge import SHARDS, adapter_files, base_files
from tests.support.forks import command as adapterkit_command
from tests.support.hub_models import write


def files_of_one_layer() -> dict[str, bytes]:
    files = adapter_files()
    factors = load(files["adapter_model.safetensors"])
    first = {key: value for key, value in factors.items() if ".layers.0." in key}
    return files | {"adapter_model.safetensors": save(first)}


def command(hub, tmp_path, *words: str) -> None:
    variables = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_any"}
    done = adapterkit_command(*words, "--quiet", env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def merged(each_hub, tmp_path):
    """A merge of an adapter of the first layer, whose shard is the only one that changes."""
    each_hub.commit("org/base", base_files())
    each_hub.commit("org/adapter", files_of_one_layer())
    command(each_hub, tmp_path, "merge", "org/base", "org/adapter", "--out", "hf://me/merged")
    return each_hub


def test_the_bytes_are_those_of_a_local_merge(merged, tmp_path):
    local = (
        write(tmp_path / "base", base_files()),
        write(tmp_path / "adapter", files_of_one_layer()),
    )
    adapterkit.merge(local[0], [local[1]], out=tmp_path / "local")
    found = merged.files("me/merged")
    assert {name: found[name] for name in SHARDS} == {
        name: (tmp_path / "local" / name).read_bytes() for name in SHARDS
    }
    assert {"config.json", "adapterkit.json", "README.md"} < set(found)


def test_unchanged_files_are_not_uploaded(merged):
    size = len(base_files()[SHARDS[0]])
    if merged.xet is None:
        assert merged.uploaded() == [size]
    for name in SHARDS[1:]:
        assert merged.moved(name) < size / 10
    copied = {
        file["filename"]
        for asked in merged.asked("POST", "/lfs-files/duplicate")
        for file in json.loads(asked.body)["files"]
    }
    assert copied == set(SHARDS[1:])


def test_a_pushed_folder_is_the_same(merged, tmp_path):
    words = ("merge", "org/base", "org/adapter", "--out", "out", "--push", "me/two")
    command(merged, tmp_path, *words)
    one, other = merged.files("me/merged"), merged.files("me/two")
    assert {name: one[name] for name in SHARDS} == {name: other[name] for name in SHARDS}
    command(merged, tmp_path, "diff", "me/merged", "me/two")
