"""Names in files that are another machine's: on Windows a look at `//host/share` connects to that
host, and signs in there. Here such a name is an ordinary one, and each look at it is noted."""

import builtins
import json
import os
import types
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder, is_plain_path
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.runtime.load.store import Store
from tests.support.raw_files import base, plain
from tests.support.texts import save_tokenizer

HOST = "evilhost"
SHARES = [
    f"\\\\{HOST}\\share\\x", f"//{HOST}/share/x", f"\\/{HOST}\\x", f"/\\{HOST}/x",
    f"\\\\?\\UNC\\{HOST}\\x", f"//?/UNC/{HOST}/x", f"\\??\\UNC\\{HOST}\\x", f"//./{HOST}",
]  # fmt: skip


@pytest.fixture
def looks(monkeypatch) -> list[str]:
    """The paths with the host's name that something looked at."""
    seen: list[str] = []

    def noted(call):
        def look(path, *args, **kwargs):
            if not isinstance(path, int) and HOST in os.fsdecode(path):
                seen.append(os.fsdecode(path))
            return call(path, *args, **kwargs)

        return look

    for name in ("stat", "lstat", "open", "listdir", "scandir", "readlink"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", noted(open))
    return seen


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    base().write(tmp_path / "base")
    plain().folder().write(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(call) -> None:
    with pytest.raises(AdapterkitError) as caught:
        call()
    error = caught.value
    for one in getattr(error, "errors", (error,)):
        assert isinstance(one, Refused) and one.problem and one.expected and one.where and one.hint


@pytest.mark.parametrize("share", SHARES)
def test_a_share_is_no_plain_path(share):
    assert not is_plain_path(share) and not is_plain_path(f"C:{share}")


@pytest.mark.parametrize("share", SHARES)
def test_a_part_of_a_pipeline_of_that_name_is_not_looked_for(work, looks, share):
    pipe = work / "pipe"
    pipe.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", share: ["diffusers", "AutoencoderKL"]}
    (pipe / "model_index.json").write_text(json.dumps(index))
    refused(lambda: adapterkit.merge(pipe, [work / "adapter"], out=work / "out"))
    assert not looks


@pytest.mark.parametrize("share", SHARES)
def test_a_revision_in_a_cache_of_that_name_is_not_looked_for(work, looks, share):
    refs = work / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(share)
    store = Store(types.SimpleNamespace(adapters={}), work, 1)  # type: ignore[arg-type]
    assert store.path("org/name") is None
    (refs / "main").write_bytes(b"\xff\0")
    assert store.path("org/name") is None
    assert store.path(share) is None and store.path("C:adapter") is None
    assert store.path("adapter") == work / "adapter" and not looks


@pytest.mark.parametrize("share", SHARES)
def test_an_adapter_in_a_file_of_weights_is_refused(work, looks, share):
    table = {"adapters": ["adapter", {"name": share}], "default": [1, 1]}
    (work / "w.json").write_text(json.dumps(table))
    refused(lambda: adapterkit.merge("base", weights="w.json", out="out"))
    assert not looks
    # the name alone: the user says where it is
    adapterkit.merge("base", ["adapter", "adapter"], weights="w.json", out="out", dry_run=True)
    assert not looks


@pytest.mark.parametrize("share", SHARES)
def test_a_model_in_a_recipe_is_refused(work, looks, share):
    for reference in (share, f"{share}+adapter", f"base+{share}"):
        models = [{"model": reference, "parameters": {"weight": 1}}, {"model": "base+adapter"}]
        recipe = {"merge_method": "task_arithmetic", "models": models}
        (work / "r.yml").write_text(json.dumps(recipe))
        refused(lambda: adapterkit.run("r.yml", out="out"))
    (work / "r.yml").write_text(json.dumps({**recipe, "base_model": share}))
    refused(lambda: adapterkit.run("r.yml", out="out"))
    assert not looks


@pytest.mark.parametrize("share", SHARES)
def test_a_path_in_a_pipeline_file_is_refused(work, looks, share):
    text, numbered = json.dumps(share), json.dumps(f"1:{share}")
    steps = [
        f"inputs = [{text}, 'adapter']\nout = 'out'",
        f"inputs = ['base', {json.dumps(share + '=0.5')}]\nout = 'out'",
        f"inputs = ['base', 'adapter']\nout = {text}",
        f"inputs = ['base', 'adapter']\nout = 'out'\noptions = {{weights = {text}}}",
        f"inputs = ['base', 'adapter']\nout = 'out'\noptions = {{lbw = {numbered}}}",
    ]
    for step in steps:
        (work / "p.toml").write_text(f"[[step]]\nverb = 'merge'\n{step}\n")
        refused(lambda: adapterkit.run("p.toml", dry_run=True))
        refused(lambda: adapterkit.run("p.toml"))
    assert not looks and not (work / "out").exists()


@pytest.mark.parametrize("key, file", [
    ("vocab_file", "tokenizer_config.json"), ("tokenizer_file", "tokenizer_config.json"),
    ("fast_tokenizer_files", "tokenizer_config.json"), ("configuration_files", "config.json"),
])  # fmt: skip
def test_a_file_that_a_tokenizer_names_is_not_looked_for(tmp_path, looks, key, file):
    from adapterkit.verbs.stats.data.samples import load_tokenizer

    save_tokenizer(tmp_path)
    path = tmp_path / file
    settings: dict = json.loads(path.read_text()) if path.exists() else {"model_type": "llama"}
    for name in (f"//{HOST}/share/tokenizer.4.0.0.json", f"//{HOST}/share/config.4.0.0.json"):
        settings[key] = [name] if key.endswith("files") else name
        path.write_text(json.dumps(settings))
        assert load_tokenizer(LocalFolder(tmp_path)).vocab_size
    assert not looks
