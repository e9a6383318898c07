"""Outputs of strangers: what their receipts and files of weights name, and what adapterkit's own
say of the user."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Damaged, Refused
from adapterkit.core.inputs.weights_file import named_adapter
from adapterkit.core.receipt import seal_receipt
from tests.support.raw_files import AdapterFiles, base, normal, plain

pytestmark = pytest.mark.usefixtures("one_thread")

RECEIPT = "adapterkit.json"


@pytest.fixture
def gift(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A stranger's folder with an output, its base and its adapter; outside of it lie a private
    model with the headers of that base, and an older output of the user. Neither changes, and no
    network is asked."""
    base().write(tmp_path / "private" / "base")
    plain().folder().write(tmp_path / "private" / "adapter")
    work = tmp_path / "downloads"
    base().write(work / "base")
    plain().folder().write(work / "adapter")
    monkeypatch.chdir(tmp_path)
    adapterkit.merge(work / "base", work / "adapter", out=tmp_path / "mine")
    adapterkit.merge(work / "base", [work / "adapter"], out=work / "gift")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    before = {path: path.stat() for path in tmp_path.rglob("*") if work not in path.parents}
    yield work / "gift"
    after = {path: path.stat() for path in tmp_path.rglob("*") if work not in path.parents}
    assert {path: stat.st_mtime_ns for path, stat in after.items() if path.is_file()} == {
        path: stat.st_mtime_ns for path, stat in before.items() if path.is_file()
    }


def forged(output: Path, change: Callable[[Any], object]) -> None:
    """Change a receipt and seal it again, as everybody can."""
    receipt = json.loads((output / RECEIPT).read_text())
    change(receipt)
    receipt["timings"].pop("seal")
    (output / RECEIPT).write_bytes(seal_receipt(receipt))


def refused(call: Callable[[], object], problem: str) -> str:
    with pytest.raises(Refused, match=problem) as caught:
        call()
    for one in getattr(caught.value, "errors", (caught.value,)):
        assert one.problem and one.expected and one.where and one.hint, one
    return str(caught.value)


def test_an_honest_output_is_made_again(gift: Path):
    assert adapterkit.rerun(gift)["files"] > 2
    assert adapterkit.rerun(gift, inputs=gift.parent)["files"] > 2


@pytest.mark.parametrize("more", [
    {"engine": "ray"}, {"engine": "ray", "ray_address": "evil.example:6379"},
    {"ray_address": "evil.example:6379"}, {"push": "evil/stolen"}, {"overwrite": True},
    {"resume": True}, {"dry_run": True}, {"device": "cuda"}, {"memory": "1KB"}, {"verify": True},
    {"disk_limit": "1KB"}, {"hash": "none"}, {"out": "../mine"}, {"out": "hf://evil/stolen"},
    {"progress": "os.system"}, {"accept": "os.system"},
])  # fmt: skip
def test_a_call_with_options_of_the_user_is_refused(gift: Path, more: dict):
    forged(gift, lambda receipt: receipt["call"].update(more))
    text = refused(lambda: adapterkit.rerun(gift, out=gift.parent / "again"), "it holds")
    assert all(name in text for name in more)
    assert not (gift.parent / "again").exists()


@pytest.mark.parametrize("name", [
    "../private/{name}", "{root}/private/{name}", "private/{name}", "./{name}", "{name}/", "", ".",
    "..", "a\0b", "\\\\evil.example\\share", "//evil.example/share", "~/private", "{name}\n",
    "x" * 5000, {"{root}/private/{name}": 1.0}, [["{root}/private/{name}", 1.0]], True, None,
    {"base": 1},
])  # fmt: skip
@pytest.mark.parametrize("key", ["base", "adapters"])
def test_names_of_inputs_lead_nowhere_else(gift: Path, key: str, name: Any, tmp_path: Path):
    """Not to a path, and not to a folder of the working directory that looks like a Hub id."""
    text = json.dumps(name).replace("{root}", str(tmp_path))
    name = json.loads(text.replace("{name}", "base" if key == "base" else "adapter"))
    forged(gift, lambda receipt: receipt["call"].update({key: name}))
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.rerun(gift)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 2000


def test_an_input_that_is_a_link_elsewhere(gift: Path, tmp_path: Path):
    """It is refused where it is found by name; named itself it is the user's."""
    work = gift.parent
    shutil.rmtree(work / "base")
    (work / "base").symlink_to("../private/base")
    for more in ({}, {"inputs": work}):
        call = lambda more=more: adapterkit.rerun(gift, **more)
        refused(call, "base, or it is a link that leads elsewhere")
    assert adapterkit.rerun(gift, inputs=[work / "base", work / "adapter"])["files"] > 2


def test_a_folder_that_looks_like_a_commit_is_not_read(gift: Path, tmp_path: Path):
    """What is opened is what was looked at: the id with the commit that the receipt says."""
    commit = "b" * 40
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / f"name@{commit}").symlink_to("../private/base")

    def forge(receipt: Any) -> None:
        receipt["call"]["base"] = "org/name"
        receipt["recipe"]["inputs"].append({"repo": "org/name", "revision": commit})

    forged(gift, forge)
    refused(lambda: adapterkit.rerun(gift), "there is no '?org/name")


def test_a_receipt_does_not_allow_pickles(gift: Path):
    """Of a conversion of one: the user says it again."""
    source, out = gift.parent / "pickled", gift.parent / "converted"
    shutil.copytree(gift.parent / "adapter", source)
    stored = source / "adapter_model.safetensors"
    torch.save(load_file(stored), source / "adapter_model.bin")
    stored.unlink()
    adapterkit.convert(source, to="peft", out=out, allow_pickle=True)
    refused(lambda: adapterkit.rerun(out), "is a pickle")
    assert adapterkit.rerun(out, allow_pickle=True)["files"] > 1
    forged(out, lambda receipt: receipt["call"].update(allow_pickle=True))
    refused(lambda: adapterkit.rerun(out), "it holds allow_pickle")


@pytest.mark.parametrize("change", [
    lambda recipe: recipe["options"].pop("weights"), lambda recipe: recipe["options"].update(x=1),
    lambda recipe: recipe["options"].update(weights=7), lambda recipe: recipe["inputs"].clear(),
    lambda recipe: recipe["inputs"].append({"files": {}}),
    lambda recipe: recipe.update(inputs=[{}]), lambda recipe: recipe["inputs"][0].update(files=[1]),
    lambda recipe: recipe["options"].update(weights_file=[1]),
])  # fmt: skip
def test_a_forged_receipt_verifies_nothing(gift: Path, change: Callable[[Any], object]):
    forged(gift, lambda receipt: change(receipt["recipe"]))
    with pytest.raises(AdapterkitError):
        adapterkit.verify(gift, base=gift.parent / "base", adapters=[gift.parent / "adapter"])


def test_the_user_must_name_inputs_again(gift: Path, tmp_path: Path):
    (gift.parent / "models").mkdir()
    (gift.parent / "base").rename(gift.parent / "models" / "base")
    refused(lambda: adapterkit.rerun(gift), "there is no base")
    models, adapter = gift.parent / "models", gift.parent / "adapter"
    assert adapterkit.rerun(gift, inputs=[models / "base", adapter])["files"] > 2
    words = ["rerun", str(gift), "--inputs", str(models), "--inputs", str(adapter)]
    assert CliRunner().invoke(main, words).exit_code == 0


def test_other_bytes_of_an_input_are_refused_before_anything_is_computed(gift: Path):
    """Of the same headers, by the hashes: an adapter always has them."""
    other = plain()
    key = next(iter(other.tensors))
    other.tensors[key] = normal(*other.tensors[key].shape, seed=99)
    AdapterFiles(other.config, other.tensors).folder().write(gift.parent / "adapter")
    text = refused(lambda: adapterkit.rerun(gift, out=gift.parent / "again"), "other bytes")
    assert "adapter/adapter_model.safetensors" in text and not (gift.parent / "again").exists()


def test_a_base_that_is_not_the_hashed_one(gift: Path):
    """Where a receipt has the sha256 of a base, its headers are not enough."""
    has = lambda receipt: receipt["inputs"]["0 base"].update({"model.safetensors": "0" * 64})
    forged(gift, has)
    refused(lambda: adapterkit.rerun(gift), "other bytes: base/model.safetensors")


def test_another_model_with_the_same_headers_is_found_by_its_bytes(gift: Path, tmp_path: Path):
    tensors = gift.parent / "base" / "model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(Damaged, match="files differ"):
        adapterkit.rerun(gift)


@pytest.mark.parametrize("out", ["hf://me/public", "hf:/me/public"])
def test_nothing_is_sent_before_it_is_compared(gift: Path, out: str):
    refused(lambda: adapterkit.rerun(gift, out=out), "hf:/")


def test_the_command_of_a_receipt_is_inert(gift: Path):
    """A name may be an option, or hold what a shell would run."""
    for name in ("--push", "$(touch owned)", "`touch owned`", "a'b;touch owned"):
        target = gift.parent / name
        shutil.copytree(gift.parent / "adapter", target)
        adapterkit.merge(gift.parent / "base", target, out=gift.parent / "out", overwrite=True)
        card = (gift.parent / "out" / "README.md").read_text()
        line = next(one for one in card.splitlines() if one.startswith("adapterkit merge"))
        command = adapterkit.rerun(gift.parent / "out")["command"]
        for text in (line.replace("adapterkit", "echo"), command.replace("adapterkit", "echo")):
            words = subprocess.check_output(text, shell=True, cwd=gift.parent, text=True).split()
            assert words[:2] == ["merge", "base"] and words[-2:] == ["--out", "OUT"]
            assert "--push" not in words
        assert not (gift.parent / "owned").exists()


# -- block weights in a file, files of weights -----------------------------------------------------


def test_block_weights_of_a_receipt_read_no_file(gift: Path, monkeypatch):
    (gift.parent / "presets.txt").write_text("secret:1,1,1")
    monkeypatch.chdir(gift.parent)
    (gift.parent / "plain").write_text("secret")
    for text in (f"{gift.parent}/presets.txt:secret", "presets.txt", "1:presets.txt", "..\\x.json",
                 "plain", "1:plain:x"):  # fmt: skip
        forged(gift, lambda receipt, text=text: receipt["call"].update({"lbw": [text]}))
        refused(lambda: adapterkit.rerun(gift), "--lbw names a file")


@pytest.mark.parametrize("name", [
    "../private/adapter", "{root}/private/adapter", "private/adapter", "./adapter", "a\0b",
    "\\\\evil.example\\share", "link",
])  # fmt: skip
def test_a_file_of_weights_only_names_neighbors(gift: Path, name: str, tmp_path: Path):
    work = gift.parent
    (work / "link").symlink_to("../private/adapter")
    table = {"adapters": [name.replace("{root}", str(tmp_path))], "default": [0.5]}
    (work / "w.json").write_text(json.dumps(table))
    out = work / "both"
    calls: list[Callable[[], object]] = [
        lambda: adapterkit.merge(work / "base", weights=work / "w.json", out=out),
        lambda: adapterkit.combine(weights=work / "w.json", out=out),
        lambda: adapterkit.report(weights=work / "w.json", out=work / "page.html"),
    ]
    for call in calls:
        refused(call, "not next to the file of weights")
    assert not out.exists()
    adapterkit.merge(work / "base", work / "adapter", weights=work / "w.json", out=out)


# -- what receipts say of the user -----------------------------------------------------------------


def test_no_path_and_no_command_of_weights_is_in_a_receipt(gift: Path, tmp_path: Path):
    """Of a file that a hand or an older fit wrote, too."""
    home = gift.parent / "home" / "alicejones"
    shutil.copytree(gift.parent / "adapter", home / "adapter")
    known = named_adapter(str(home / "adapter"), LocalFolder(home / "adapter"))
    assert known.name == "adapter"
    table = {
        "adapters": [{"name": str(home / "adapter")}],
        "base": {"name": str(home / "base")},
        "default": [0.5],
        "fit": {"score": "env API_KEY=secret evaluate {}"},
    }
    (home / "w.json").write_text(json.dumps(table))
    presets = {"adapters": [home / "adapter"], "weights": home / "w.json"}
    for verb in (adapterkit.merge, adapterkit.combine):
        first = [gift.parent / "base"] if verb is adapterkit.merge else []
        out = gift.parent / f"by-{verb.__name__}"
        verb(*first, **presets, out=out)
        text = "".join(path.read_text() for path in out.iterdir() if path.suffix != ".safetensors")
        assert "alicejones" not in text and "secret" not in text and "API_KEY" not in text


def test_a_fit_keeps_the_hash_of_its_command(gift: Path, tmp_path: Path, monkeypatch):
    work, home = gift.parent, tmp_path / "downloads" / "alicejones"
    for name in ("one", "two"):
        shutil.copytree(work / "adapter", home / name)
    command = f"env API_KEY=secret {shutil.which('python3')} -S -c print(1) {{}}"
    out = home / "w.json"
    adapters = [home / "one", home / "two"]
    adapterkit.fit(work / "base", adapters, score=command, evaluations=2, out=out)
    text = out.read_text()
    assert "secret" not in text and "alicejones" not in text and "score_sha256" in text
    assert [one["name"] for one in json.loads(text)["adapters"]] == ["one", "two"]
    adapterkit.combine(weights=out, out=home / "both")
    assert "secret" not in (home / "both" / RECEIPT).read_text()
