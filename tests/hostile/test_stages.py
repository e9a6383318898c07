"""Stages, joins of parts, receipts of older outputs and pipelines with a push that others wrote:
each is done again, or one refusal."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterkit
from adapterkit.core.engine import partition as pieces
from adapterkit.core.errors import AdapterkitError, MultipleErrors
from adapterkit.core.output.journal import entries_of, line_of, read_entry, read_lines
from adapterkit.core.output.stage import Stage
from adapterkit.core.receipt import seal_receipt
from adapterkit.core.system import system
from adapterkit.core.tasks import rows
from adapterkit.many.workers import ranges as rank_parts
from adapterkit.many.workflows.workflow import run_pipeline
from tests.support.raw_files import base, plain

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS, RECEIPT = "model.safetensors", "adapterkit.json"
NAMES = {"README.md", RECEIPT, "config.json", WEIGHTS}
SECRET = b"nobody's business"


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    """The folder of the jobs; beside it lies a file that nothing may touch."""
    folder = tmp_path / "work"
    base().write(folder / "base")
    plain().folder().write(folder / "adapter")
    (tmp_path / "secret").write_bytes(SECRET)
    monkeypatch.chdir(folder)
    return folder


def merge(**options: Any) -> dict[str, Any]:
    return adapterkit.merge("base", ["adapter"], out="out", **options).data


def expected() -> dict[str, bytes]:
    adapterkit.merge("base", ["adapter"], out="alone")
    return contents(Path("alone"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files but for the receipt; none may be a link."""
    assert {path.name for path in folder.iterdir()} == NAMES
    assert not any(path.is_symlink() for path in folder.iterdir())
    return {name: (folder / name).read_bytes() for name in NAMES - {RECEIPT}}


def refused(call: Callable[[], Any], problem: str = ".") -> None:
    with pytest.raises(AdapterkitError, match=problem) as caught:
        call()
    error = caught.value
    assert "\x1b" not in str(error)
    for one in error.errors if isinstance(error, MultipleErrors) else (error,):
        assert one.problem and one.expected and one.where and one.hint, one


# -- a stage of which only the name is missing ---------------------------------------------------

CONTROL = Path(".out.adapterkit")


@pytest.fixture
def unpublished(work: Path, monkeypatch) -> Path:
    """The stage of a merge that was stopped before it got its name."""
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "publish", lambda self: exec("raise KeyboardInterrupt"))
        with pytest.raises(AdapterkitError):
            merge()
    return CONTROL / "out"


def with_receipt(data: bytes) -> None:
    """As whoever may write the stage may write its journal."""
    (CONTROL / "out" / RECEIPT).write_bytes(data)
    change_last(CONTROL, publish=hashlib.sha256(data).hexdigest())


def change_last(control: Path, **more: Any) -> None:
    """Change what the last line of a journal says."""
    journal = control / "journal.jsonl"
    *entries, last = (entry for _, entry in entries_of(read_lines(journal)))
    journal.write_bytes(b"".join(map(line_of, [*entries, last | more])))


def sealed(good: dict, **more: Any) -> bytes:
    timings = {key: value for key, value in good["timings"].items() if key != "seal"}
    return seal_receipt(good | more | {"timings": timings})


def test_receipts_that_others_wrote_into_a_stage(unpublished: Path):
    good, whole = json.loads((unpublished / RECEIPT).read_bytes()), expected()
    more = {"size": len(SECRET), "sha256": None}
    forged = [b"", b"[]", b"{}", b"[" * 100_000, b"\xff", json.dumps(good).encode()]
    forged += [sealed(good, **{key: 7}) for key in ("recipe", "totals", "notes", "keys", "files")]
    forged += [
        sealed(good, files=good["files"] | {name: more})
        for name in ("../../../secret", str(Path("../secret").absolute()), "x")
    ]
    forged.append(sealed(good, files={WEIGHTS: good["files"][WEIGHTS]}))
    forged.append(sealed(good, recipe=good["recipe"] | {"verb": "another"}))
    shutil.copytree(CONTROL, "kept")
    for data in forged:
        with_receipt(data)
        receipt = merge(resume=True, verify=True)
        assert set(receipt["files"]) == NAMES - {RECEIPT} and contents(Path("out")) == whole
        shutil.rmtree("out")
        shutil.copytree("kept", CONTROL, dirs_exist_ok=True)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing"])
def test_a_replaced_file_in_a_stage_is_not_published(unpublished: Path, name: str, kind: str):
    path, kept, whole = unpublished / name, Path("../kept"), expected()
    path.rename(kept)
    if kind == "link":
        path.symlink_to(kept.absolute())
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    merge(resume=True, verify=True)
    assert contents(Path("out")) == whole


def test_foreign_files_in_a_stage_are_not_published(unpublished: Path):
    whole = expected()
    (unpublished / "pytorch_model.bin").write_bytes(b"pickle")
    (unpublished / "link").symlink_to(Path("../secret").absolute())
    (unpublished / "deep").mkdir()
    (unpublished / "deep" / "link").symlink_to("/etc")
    merge(resume=True)
    assert contents(Path("out")) == whole and Path("../secret").read_bytes() == SECRET


@pytest.mark.parametrize("old", [
    "../../../secret", "../../secret", "deep/../../../secret",
])  # fmt: skip
def test_older_files_named_by_a_journal_outside_the_folder_are_not_removed(
    work: Path, monkeypatch, old: str
):
    """Where the files move into a folder one by one, its older ones are removed."""
    monkeypatch.setattr(system, "is_mount", lambda path: path.name == "out")
    Path("out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "publish", lambda self: exec("raise KeyboardInterrupt"))
        with pytest.raises(AdapterkitError):
            merge()
    change_last(Path("out/.adapterkit"), old=[old, str(Path("../secret").absolute())])
    merge(resume=True)
    assert contents(Path("out")) == expected() and Path("../secret").read_bytes() == SECRET


# -- parts ---------------------------------------------------------------------------------------


@pytest.fixture
def parts(work: Path, monkeypatch) -> Path:
    """The folder of the ranks of a merge in two parts, both made."""
    monkeypatch.setattr(rank_parts, "LEAST", 1)
    monkeypatch.setattr(pieces, "RUN", 64)
    monkeypatch.setattr(rows, "ELEMENTS", 16)
    adapterkit.write_plan("p.json", "merge", "base", ["adapter"], out="out")
    for rank in ("0/2", "1/2"):
        adapterkit.run("p.json", worker=rank)
    (folder,) = (CONTROL / "ranks").iterdir()
    return folder


def finished(whole: dict[str, bytes]) -> None:
    """By a rank and finish, whatever was there."""
    adapterkit.run("p.json")
    adapterkit.finish("p.json", verify=True)
    assert contents(Path("out")) == whole


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing", "short", "long"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_replaced_range_of_a_file_is_not_published(parts: Path, kind: str, number: int):
    whole = expected()
    path = sorted((parts / "out").glob(f"{WEIGHTS}@*"))[number]
    kept = path.rename(Path("../kept"))
    data = kept.read_bytes()
    if kind == "link":
        path.symlink_to(kept.absolute())
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(data[:-1] if kind == "short" else data + b"\0")
    refused(lambda: adapterkit.finish("p.json"), "files are missing")
    if kind == "folder":
        path.rmdir()
    finished(whole)
    assert kept.read_bytes() == data


@pytest.mark.parametrize("joined", [1, 1 << 70])
@pytest.mark.parametrize("kind", ["link", "pipe", "missing", "short"])
def test_a_join_that_others_began(parts: Path, joined: int, kind: str):
    """So many bytes are where the file grows, they say; what lies there may be no file."""
    whole, grown = expected(), parts / "out" / f"{WEIGHTS}.part"
    (parts / "marks" / f"{grown.name}.json").write_bytes(line_of({"joined": joined}))
    if kind == "link":
        grown.symlink_to(Path("../secret").absolute())
    elif kind == "pipe":
        os.mkfifo(grown)
    elif kind == "short":
        grown.write_bytes(b"x")
    adapterkit.finish("p.json", verify=True)
    assert contents(Path("out")) == whole and Path("../secret").read_bytes() == SECRET


def test_more_parts_than_the_file_has(parts: Path):
    """Of other places, of one byte, of none: the file is tiled with what is whole."""
    whole = expected()
    marker = min((parts / "marks").glob(f"{WEIGHTS}@0-*.json"))
    entry = read_entry(marker)
    for start, stop in [(0, 1), (1, 2), (2, 2), (3, 1), (5, 9), (0, 1 << 70)]:
        name = f"{WEIGHTS}@{start}-{stop}"
        size = max(0, min(stop - start, 100))
        (parts / "out" / name).write_bytes(b"\0" * size)
        shard = entry["shard"] | {"file": name, "size": size, "metrics": {}}
        (parts / "marks" / f"{name}.json").write_bytes(line_of(entry | {"shard": shard}))
    adapterkit.finish("p.json", verify=True)
    assert contents(Path("out")) == whole


# -- pipelines -----------------------------------------------------------------------------------

STEP = '[[step]]\nverb = "merge"\ninputs = ["base", "adapter"]\nout = "out"\n'


def states() -> list[str]:
    return [row["state"] for row in run_pipeline("steps.toml")["steps"]]


@pytest.mark.parametrize("change", [
    {"files": 7}, {"files": {WEIGHTS: 7}}, {"files": {WEIGHTS: {"size": "x"}}}, {"notes": 7},
    {"notes": [7]}, {"timings": {}}, {"totals": []}, {"recipe": "x"}, {"adapterkit": 2},
])  # fmt: skip
def test_an_older_output_whose_receipt_is_none(work: Path, change: dict):
    Path("steps.toml").write_text(STEP)
    assert states() == ["done"] and states() == ["done before"]
    receipt = Path("out", RECEIPT)
    receipt.write_text(json.dumps(json.loads(receipt.read_bytes()) | change))
    assert states() == ["refused"]
    refused(lambda: merge(resume=True), "did not write|output folder holds|lacks files")
    refused(lambda: adapterkit.verify("out"))


@pytest.mark.parametrize("change", [
    {"files": 7}, {"files": {"../../secret": {"size": len(SECRET), "sha256": None}}},
    {"files": {"../../secret": 7}}, {"keys": {WEIGHTS: 7}}, {"recipe": {"verb": "merge"}},
    {"recipe": {"verb": 7, "options": [], "inputs": {}}},
])  # fmt: skip
def test_a_sealed_receipt_that_is_none(work: Path, change: dict):
    merge()
    receipt = Path("out", RECEIPT)
    receipt.write_bytes(sealed(json.loads(receipt.read_bytes()), **change))
    refused(lambda: adapterkit.verify("out"))
    refused(lambda: adapterkit.verify("out", base="base", adapters=["adapter"]))


@pytest.mark.parametrize("pipeline", [7, [], {}, {"inputs": 7}, {"id": [], "inputs": None}])
def test_a_receipt_of_another_pipeline(work: Path, pipeline: Any):
    """It is no output of this one: neither done nor replaced."""
    Path("steps.toml").write_text(STEP)
    assert states() == ["done"]
    receipt = Path("out", RECEIPT)
    data = json.loads(receipt.read_bytes())
    receipt.write_text(json.dumps(data | {"pipeline": pipeline, "fingerprint": "x"}))
    assert states() == ["refused"]


@pytest.mark.parametrize("push", [
    '"x"', '"../x"', '"org/x@main"', '"hf://org/x"', '"org/x:y"', "7", '["org/x"]', "true",
    '"\\u001b[31m/x"', '""',
])  # fmt: skip
def test_a_push_to_no_repository(work: Path, push: str):
    """It is refused in planning: before any step is carried out, or the Hub asked."""
    second = STEP.replace('"out"', '"second"')
    text = f"{STEP}\n{second}options = {{ push = {push} }}\n"
    Path("steps.toml").write_text(text)
    rows = run_pipeline("steps.toml", allow_push=True)["steps"]
    assert [row["state"] for row in rows] == ["planned", "refused"]
    assert "\x1b" not in rows[1]["message"] and not Path("out").exists()


def test_a_push_of_an_output_on_the_hub(work: Path):
    text = STEP.replace('"out"', '"hf://org/x"') + 'options = { push = "org/y" }\n'
    Path("steps.toml").write_text(text)
    (row,) = run_pipeline("steps.toml", dry_run=True)["steps"]
    assert row["state"] == "refused" and "one destination" in row["message"]
