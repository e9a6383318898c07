"""A plain job asks for what it has, once: options, files, the place of its output."""

import json
import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core import calls, options
from adapterkit.core.checkpoint import folder as folders
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.checkpoint.spec import Checkpoint, scan_checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import Refused
from adapterkit.core.merge.verb import Merge
from tests.support.raw_files import base, plain

ADAPTER, BASE = "adapter_config.json", "config.json"


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"base": base().content, "lora": plain().folder().content}.items():
        Path(name).mkdir()
        for file, data in content.items():
            Path(name, file).write_bytes(data)


def merge(**more) -> Merge:
    return Merge(base="base", adapters=["lora"], out="out", **more)


def test_a_merge_reads_the_start_of_each_file_once_and_again_only_to_hash_a_config(
    monkeypatch: pytest.MonkeyPatch,
):
    reads: Counter[str] = Counter()
    read = LocalFolder.read

    def counted(self: LocalFolder, name: str, start: int, stop: int) -> bytes:
        reads[name] += 1
        return read(self, name, start, stop)

    monkeypatch.setattr(LocalFolder, "read", counted)
    merge(dry_run=True).run()
    weights = {"model.safetensors": 1, "adapter_model.safetensors": 1}
    assert reads == {BASE: 2, ADAPTER: 2, **weights}


def test_options_of_a_merge_are_checked_once(monkeypatch: pytest.MonkeyPatch):
    seen: Counter[str] = Counter()
    checked = options.checked

    def counted(name: str, *rest):
        seen[name] += 1
        return checked(name, *rest)

    monkeypatch.setattr(options, "checked", counted)
    merge(dry_run=True, dtype="fp16").run()
    assert seen == dict.fromkeys(("base", "adapters", "out", "dry_run", "dtype"), 1)


def test_a_dry_run_to_a_new_output_makes_no_call_and_checks_no_stage(
    monkeypatch: pytest.MonkeyPatch,
):
    def refused(*_, **__):
        raise AssertionError("there is nothing to look at")

    made: set[str] = set()

    def profile(frame, event: str, _) -> None:
        if event == "call" and frame.f_code.co_filename == calls.__file__:
            made.add(frame.f_code.co_name)

    with monkeypatch.context() as patch:
        patch.setattr("adapterkit.core.execute.state_of", refused)
        patch.setattr("adapterkit.core.plan.Plan.recipe", refused)
        sys.setprofile(profile)
        try:
            merge(dry_run=True).run()
        finally:
            sys.setprofile(None)
    assert made <= {"own_hints"}
    Path("out").mkdir()
    Path("out", "mine").touch()
    with pytest.raises(Refused, match="the output folder holds mine"):
        merge(dry_run=True).run()


def test_outputs_of_a_copied_plan_have_the_call_and_its_command():
    plan = merge(dtype="fp16", progress=lambda done: None).plan()
    call = {"base": "base", "adapters": ["lora"], "dtype": "fp16"}
    for one in (plan, pickle.loads(pickle.dumps(plan))):
        assert one.decided()["call"] == call
        card = one.written_files()["README.md"]
        assert isinstance(card, bytes)
        assert b"adapterkit merge base lora --dtype fp16 --out OUT" in card
    receipt = adapterkit.merge("base", ["lora"], out="out", dtype="fp16")
    assert receipt.data["call"] == call
    written = (Path("out", "README.md")).stat().st_size
    assert written == len(card) == receipt.data["files"]["README.md"]["size"]


def test_a_call_has_the_contents_of_a_file_of_block_weights_at_planning():
    Path("rows.txt").write_text("MINE:1,0.5\n")
    verb = merge(lbw=["rows.txt:MINE"])
    with pytest.raises(Refused):  # the model has no blocks: the file was read
        verb.plan()
    assert verb._with_contents().lbw == ("1,0.5",)
    assert replace(verb, lbw=())._with_contents().lbw == ()


def test_a_folder_keeps_what_was_parsed_up_to_a_size_and_gives_it_to_no_process(
    monkeypatch: pytest.MonkeyPatch,
):
    lora = LocalFolder("lora")
    first = read_json(lora, ADAPTER)
    assert read_json(lora, ADAPTER) is first
    ours, theirs = (read_header(lora, "adapter_model.safetensors", n) for n in (0, 3))
    assert {spec.folder for spec in theirs.tensors} == {3} and ours.raw is theirs.raw
    assert {spec.folder for spec in ours.tensors} == {0}
    assert not pickle.loads(pickle.dumps(lora)).parsed
    monkeypatch.setattr(folders, "MOST_PARSED", Path("base", BASE).stat().st_size + 10)
    small = LocalFolder("base")
    Path("base", "other.json").write_text(json.dumps({"a": "long enough"}))
    assert read_json(small, BASE) is read_json(small, BASE)
    assert read_json(small, "other.json") is not read_json(small, "other.json")


def test_a_checkpoint_that_is_damaged_is_one_record_with_its_errors():
    Path("base", "model.safetensors").write_bytes(b"\x10")
    scan = scan_checkpoint(LocalFolder("base"))
    assert isinstance(scan, Checkpoint) and len(scan.errors) == 1
    assert scan.unread == ("model.safetensors",) and not (scan.shards or scan.complete)
    assert scan.config["hidden_size"] == read_json(LocalFolder("base"), BASE)["hidden_size"]
