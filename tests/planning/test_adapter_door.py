"""What jobs on adapters in PEFT's layout load, and what a folder in the place of others says."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.overlay import Copied, Overlay, Unmade, identities_of
from adapterkit.core.errors import Refused
from tests.support import raw_files

# the rules of programs are in the cards of adapters; DoRA is PEFT's own
LOADED = """
import re, sys
import adapterkit
products = r"(adapters\\.formats\\.(?!card$|engines$|tables$)|bases\\.hub\\.folder)"
products += r"|adapterkit\\.adapters\\.kinds\\.(?!planning$|dora_deltas$)"
for job in JOBS:
    try:
        eval(job)
    except adapterkit.Refused as error:
        print(f"{job} refuses {error}")
    for name in filter(re.compile(r"adapterkit\\." + products).match, sorted(sys.modules)):
        print(f"{job} loads {name}")
"""
JOBS = {
    "plain": [
        "adapterkit.resize('{a}', rank=1, out='{out}', dry_run=True)",
        "adapterkit.combine(['{a}', '{a}'], method='linear', out='{out}', dry_run=True)",
        "adapterkit.subtract(['{a}'], general=['{a}'], out='{out}', dry_run=True)",
        "adapterkit.rebase('{a}', initial='{a}', out='{out}', dry_run=True)",
        "adapterkit.arrow(['{a}', '{a}'], out='{out}', dry_run=True)",
        "adapterkit.inspect('{a}')",
    ],
    "decomposed": ["adapterkit.resize('{a}', rank=1, out='{out}', dry_run=True)"],
    "everything_else": ["adapterkit.resize('{a}', rank=1, out='{out}', dry_run=True)"],
    "token_rows": ["adapterkit.inspect('{a}')"],
}


def test_jobs_on_adapters_of_peft_load_no_other_format(tmp_path: Path):
    """DoRA, embeddings, whole values and token rows are PEFT's own, too."""
    jobs = []
    for name, own in JOBS.items():
        path = raw_files.GOLDEN[name]().folder().write(tmp_path / name)
        jobs += [job.format(a=path, out=tmp_path / "out") for job in own]
    ended = subprocess.run(
        [sys.executable, "-c", f"JOBS = {jobs!r}\n{LOADED}"], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr + ended.stdout


@pytest.fixture
def source(tmp_path: Path) -> LocalFolder:
    return LocalFolder(raw_files.plain().folder().write(tmp_path / "adapter"))


def overlay(source: LocalFolder) -> Overlay:
    known = {
        "small.json": b"{}",
        "in/adapter_config.json": Copied(source, "adapter_config.json"),
        "weights.safetensors": Unmade(b"header", 100),
    }
    return Overlay("later", "there/later", {"name": "later"}, known, place="there/later")


def test_an_overlay_has_bytes_copies_and_headers(source: LocalFolder):
    folder = overlay(source)
    size = source.files()["adapter_config.json"]
    assert folder.files() == {
        "small.json": 2, "in/adapter_config.json": size, "weights.safetensors": 100,
    }  # fmt: skip
    assert folder.read("small.json", 1, 9) == b"}"
    assert json.loads(folder.read("in/adapter_config.json", 0, size))["peft_type"] == "LORA"
    assert folder.path("in/adapter_config.json") == source.path("adapter_config.json")
    assert folder.read("weights.safetensors", 0, 100) == b"header"
    assert identities_of(folder, "in/adapter_config.json") == {}


def test_values_of_a_planned_folder_are_refused_and_recorded(source: LocalFolder):
    folder = overlay(source)
    with pytest.raises(Refused, match="there/later/weights.safetensors.*not written yet"):
        folder.read("weights.safetensors", 50, 60)
    assert folder.asked == ["weights.safetensors"]


def test_folders_inside_an_overlay_and_it_without_files(source: LocalFolder):
    folder = overlay(source)
    inner, less = folder.subfolder("in"), folder.without(["small.json"])
    assert [*inner.files()] == ["adapter_config.json"] and inner.label == "there/later/in"
    assert [*less.files()] == ["in/adapter_config.json", "weights.safetensors"]
    with pytest.raises(Refused):
        less.read("weights.safetensors", 50, 60)
    assert folder.asked == less.asked == ["weights.safetensors"]
    assert pickle.loads(pickle.dumps(inner)).files() == inner.files()


def test_weights_under_another_name_are_a_view(source: LocalFolder, tmp_path: Path):
    (tmp_path / "adapter" / "mine.safetensors").write_bytes(b"1234")
    file = LocalFolder(tmp_path / "adapter" / "mine.safetensors")
    folder = file.as_weights("adapter_model.safetensors")
    assert folder.files() == {
        "adapter_config.json": source.files()["adapter_config.json"],
        "adapter_model.safetensors": 4,
    }
    assert folder.read("adapter_model.safetensors", 1, 3) == b"23"
    assert [*identities_of(folder, "adapter_model.safetensors")] == ["adapter_model.safetensors"]
    assert folder.label == str(tmp_path / "adapter" / "mine.safetensors")
