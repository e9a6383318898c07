"""Options, outputs and paths of a merge that are refused, and whose file a message names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle
from tests.support.oracle import stored
from tests.support.refusals import refused

# -- options and outputs ---------------------------------------------------------------------------

OPTIONS = {
    "tied": {"tied": "loose"},
    "compat": {"compat": "mergekit"},
    "dtype": {"dtype": "float8"},
    "include": {"include": "(q_proj"},
    "exclude": {"exclude": "*"},
    "max_shard_size": {"max_shard_size": "5 potatoes"},
    "tokenizer": {"tokenizer": "adapter"},
    "engine": {"engine": "abacus"},
    "device": {"device": "abacus"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_invalid_options_of_merge_are_refused_by_name(name, llama, lora, tmp_path):
    text = refused(llama, lora, out=tmp_path / "out", match=None, **OPTIONS[name])
    assert OPTIONS[name][name] in text and "--" + name.replace("_", "-") in text


def test_a_merge_without_an_adapter_is_refused(llama, tmp_path):
    refused(llama, out=tmp_path / "out", match="no adapter")


@pytest.mark.parametrize("weight", ["nan", "inf", "heavy", ""])
def test_weights_that_are_no_numbers(weight, llama, lora, tmp_path):
    refused(llama, f"{lora}={weight}", out=tmp_path / "out", match="is not a number")


def test_a_path_that_is_not_there(llama, lora, tmp_path):
    refused(tmp_path / "nowhere", lora, out=tmp_path / "out", match="no such path")
    refused(llama, tmp_path / "nowhere", out=tmp_path / "out", match="no such path")


@pytest.mark.parametrize("wanted", ["models/bsae", "./models/bsae", "models/bsae@main"])
def test_a_path_with_a_typo(wanted, llama, lora, tmp_path, monkeypatch):
    """One that could be a Hub id too: the path that is close comes first in the hint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("models").mkdir()
    Path("models/base").symlink_to(llama)
    near = "./models/base" if wanted.startswith("./") else "models/base"
    text = refused(wanted, lora, out=tmp_path / "out", match="no such")
    assert f"hint: did you mean '{near}'?" in text


def test_a_base_and_an_adapter_in_each_others_place(llama, lora, tmp_path):
    text = refused(lora, llama, out=tmp_path / "out", match="2 problems")
    assert "this is an adapter" in text and "give the base model first" in text
    assert "give an adapter; where a base is given too, it comes first" in text
    text = refused(llama, llama, out=tmp_path / "out", match="but a model")
    assert "give an adapter" in text


def test_output_in_the_way(llama, lora, tmp_path):
    """A folder that holds something is left alone; --overwrite replaces an older output of
    adapterkit only."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(Refused):
        oracle.merge(llama, lora, out=out)
    with pytest.raises(Refused):
        oracle.merge(llama, lora, out=out, overwrite=True)
    assert [f.name for f in out.iterdir()] == ["diary.txt"] and (
        out / "diary.txt"
    ).read_text() == "mine"


@pytest.mark.parametrize("where", ["base", "adapter", "inside", "around"])
def test_output_that_is_an_input(where, llama, lora, tmp_path):
    base, adapter = (
        oracle.edit_config(llama, tmp_path / "all/base"),
        oracle.edit_config(lora, tmp_path / "all/adapter"),
    )
    out = {"base": base, "adapter": adapter, "inside": base / "new", "around": tmp_path / "all"}[
        where
    ]
    before = stored(base) | stored(adapter)
    for overwrite in (False, True):
        with pytest.raises(Refused):
            oracle.merge(base, adapter, out=out, overwrite=overwrite)
    oracle.assert_same(stored(base) | stored(adapter), before)


def test_base_model_name_is_neither_followed_nor_copied(llama, lora, tmp_path):
    adapter = oracle.edit_config(
        lora, tmp_path / "adapter", base_model_name_or_path="/home/somebody/secret/model"
    )
    oracle.merge(llama, adapter, out=tmp_path / "out")
    assert all(b"somebody" not in f.read_bytes() for f in (tmp_path / "out").iterdir())


def test_the_verbs_are_importable():
    from adapterkit import merge, verify

    assert merge is adapterkit.merge and verify.__name__ == "verify"


# -- whose file it is ------------------------------------------------------------------------------


@pytest.fixture
def runs(llama, lora, tmp_path, monkeypatch):
    """Adapters in folders of one name, each with another thing wrong with its files."""
    monkeypatch.chdir(tmp_path)
    for name in ("cut", "json", "unknown", "key", "nan", "good", "other"):
        oracle.edit_config(lora, tmp_path / name / "ckpt")
    weights = lambda name: tmp_path / name / "ckpt/adapter_model.safetensors"
    weights("cut").write_bytes(weights("good").read_bytes()[:-8])
    (tmp_path / "json/ckpt/adapter_config.json").write_text("{")
    oracle.edit_config(lora, tmp_path / "new", brand_new=5)
    (tmp_path / "new/adapter_config.json").replace(tmp_path / "unknown/ckpt/adapter_config.json")
    tensors = stored(lora)
    save_file(tensors | {"x.lora_Q": torch.ones(1)}, weights("key"))
    save_file(
        {key: torch.full_like(value, float("nan")) for key, value in tensors.items()},
        weights("nan"),
    )
    odd = {key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}
    save_file(odd, weights("other"))
    return ["cut", "json", "unknown", "key"]


@pytest.mark.parametrize(
    "how", [lambda text: text, lambda text: f"./{text}", lambda text: str(Path(text).absolute())]
)
def test_an_error_in_a_file_names_it_as_the_user_does(how, runs, llama):
    sources = [how(f"{name}/ckpt") for name in ["good", *runs]]
    for verb, options in (("merge", {}), ("combine", {"method": "linear"}), ("arrow", {})):
        arguments = [llama, sources] if verb == "merge" else [sources]
        with pytest.raises(AdapterkitError) as caught:
            getattr(adapterkit, verb)(*arguments, out="out", **options)
        lines = [
            line.removeprefix("- ") for line in str(caught.value).splitlines() if "ckpt" in line
        ]
        files = (
            "adapter_model.safetensors",
            "adapter_config.json",
            "adapter_config.json",
            "adapter_model.safetensors",
        )
        assert len(lines) == 4, lines
        for line, source, file in zip(lines, sources[1:], files, strict=True):
            assert line.startswith(f"{source}/{file}: "), line
    for name, where in (("nan", "/adapter_model.safetensors: "), ("other", ": ")):
        with pytest.raises(AdapterkitError) as caught:
            adapterkit.merge(llama, [how("good/ckpt"), how(f"{name}/ckpt")], out="out2")
        assert how(f"{name}/ckpt") + where in str(caught.value) and how("good/ckpt") not in str(
            caught.value
        )


def test_a_path_stands_in_messages_only(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        for path in (tmp_path, lora):
            assert str(path).encode() not in file.read_bytes()
