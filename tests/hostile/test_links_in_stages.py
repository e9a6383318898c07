"""Links and hard links in stages, in the folders of ranks and of sums, and in older outputs: what
they lead to is neither read, written nor removed, and the output is whole or there is none."""

import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

import adapterkit
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.output.file_output import FileOutput
from adapterkit.core.output.journal import ShardResult, entries_of, line_of, read_lines, read_result
from adapterkit.core.output.stage import Stage, work_folder
from adapterkit.core.system import system
from adapterkit.many.workers.stage import WorkerStage
from adapterkit.verbs.fit.collection import Evaluations
from adapterkit.verbs.stats.model.activations import ActivationStore
from adapterkit.verbs.stats.sums_files import Ledger
from tests.support.documents import ROOT
from tests.support.plain_pipelines import write_lora, write_pipeline
from tests.support.raw_files import base, plain

pytestmark = pytest.mark.usefixtures("one_thread")

FLUX = ROOT / "conformance/cases/diffusers/flux.safetensors"
WEIGHTS, UNET = "model.safetensors", "unet/diffusion_pytorch_model.safetensors"
CONTROL = Path(".out.adapterkit")
KINDS = ["link", "hard link", "pipe", "folder", "missing", "short"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A folder of the user, whose files nothing may touch; the jobs are in one beside it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_bytes(b"precious")
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "work"))
    yield home
    assert contents(home) == {"precious": b"precious"}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but for the receipt, none of them a link."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    found = {path.relative_to(folder).as_posix(): whole(str(path)) for path in paths}
    return {name: found[name] for name in found if not name.endswith("adapterkit.json")}


def whole(name: str) -> bytes:
    """An ordinary file of one name."""
    assert stat.S_ISREG(Path(name).lstat().st_mode) and Path(name).stat().st_nlink == 1
    return Path(name).read_bytes()


def refused(call: Callable[[], Any], problem: str = ".") -> None:
    with pytest.raises(AdapterkitError, match=problem) as caught:
        call()
    assert caught.value.problem and caught.value.where and caught.value.hint


def stopped(monkeypatch, stage: type[Stage], call: Callable[[], Any]) -> None:
    """A job that was stopped when only the final names were missing."""
    publish = stage.publish

    def stop(self: Stage) -> None:
        if self.out.name.startswith("out"):  # not that of an adapter that is converted for the job
            raise KeyboardInterrupt
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "publish", stop)
        refused(call, "stopped")


def put(kind: str, path: Path, home: Path) -> None:
    """Something of a kind in the place of a file, a link one to a file of its size."""
    size = path.stat().st_size
    path.unlink()
    private = home.with_name("private")
    private.write_bytes(b"s" * size)
    if kind == "link":
        path.symlink_to(private)
    elif kind == "hard link":
        os.link(private, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "short":
        path.write_bytes(b"x")


def move_away(folder: Path, home: Path) -> None:
    """A link to the user's folder in the place of a folder; what lay there is there too."""
    for path in folder.iterdir():
        shutil.copy(path, home / path.name)
    shutil.rmtree(folder)
    folder.symlink_to(home)


# -- outputs whose files move one by one -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_in_place_of_an_output_file_is_not_followed(home: Path, monkeypatch, kind: str):
    def convert(out: str = "out.safetensors", **options: Any) -> None:
        adapterkit.convert(FLUX, to="kohya", architecture="flux", out=out, **options)

    convert("alone.safetensors")
    stopped(monkeypatch, Stage, convert)
    put(kind, Path(".out.safetensors.adapterkit/out/out.safetensors"), home)
    convert(resume=True)
    assert whole("out.safetensors") == whole("alone.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_in_place_of_a_moved_file_is_not_followed(home: Path, monkeypatch, kind: str):
    base().write(Path("base"))
    plain().folder().write(Path("adapter"))
    adapterkit.merge("base", ["adapter"], out="alone")
    monkeypatch.setattr(system, "is_mount", lambda path: path.name == "out")
    Path("out").mkdir()
    merge = lambda **options: adapterkit.merge("base", ["adapter"], out="out", **options)
    stopped(monkeypatch, Stage, merge)
    put(kind, Path("out/.adapterkit/out", WEIGHTS), home)
    merge(resume=True, verify=True)
    assert contents(Path("out")) == contents(Path("alone"))


def test_a_hard_link_in_a_stage_is_not_published(home: Path, monkeypatch):
    base().write(Path("base"))
    plain().folder().write(Path("adapter"))
    merge = lambda **options: adapterkit.merge("base", ["adapter"], out="out", **options)
    for name in (WEIGHTS, "config.json"):
        stopped(monkeypatch, Stage, merge)
        put("hard link", CONTROL / "out" / name, home)
        merge(resume=True, verify=True)
        assert b"ss" not in contents(Path("out"))[name]
        shutil.rmtree("out")


# -- folders of parts ------------------------------------------------------------------------------


@pytest.fixture
def pipeline(home: Path) -> Callable[..., Any]:
    """A merge into a pipeline of several parts; it is done once, to "alone"."""
    write_pipeline(Path("base").absolute())
    write_lora(Path("a.safetensors").absolute(), "unet", "text_encoder")
    merge = lambda **options: adapterkit.merge("base", ["a.safetensors"], **options)
    merge(out="alone")
    return merge


@pytest.mark.parametrize("state", ["publish", "resume"])
@pytest.mark.parametrize("part", ["unet", "scheduler", "vae"])
def test_a_linked_folder_in_a_stage(home: Path, pipeline, monkeypatch, part: str, state: str):
    stopped(monkeypatch, Stage, lambda: pipeline(out="out"))
    elsewhere = home.with_name("elsewhere")
    elsewhere.mkdir()
    move_away(CONTROL / "out" / part, elsewhere)
    before = contents(elsewhere)
    if state == "resume":
        journal = CONTROL / "journal.jsonl"
        lines = [line for line, _ in entries_of(read_lines(journal))]
        journal.write_bytes(b"".join(lines[:-1]))
    pipeline(out="out", resume=True, verify=True)
    assert contents(Path("out")) == contents(Path("alone")) and contents(elsewhere) == before


@pytest.mark.parametrize("top", ["out", "marks"])
def test_a_linked_folder_in_that_of_ranks(home: Path, pipeline, top: str):
    adapterkit.write_plan("p.json", "merge", "base", ["a.safetensors"], out="out")
    (folder,) = (CONTROL / "ranks").iterdir()
    move_away(folder / top / "unet", home)
    refused(lambda: adapterkit.run("p.json", worker="0/1"), "cannot write")
    refused(lambda: adapterkit.finish("p.json"), "files are missing")
    assert not Path("out").exists()


@pytest.mark.parametrize("top", ["out", "marks"])
def test_a_folder_of_ranks_that_became_a_link_counts_as_empty(home: Path, pipeline, top: str):
    adapterkit.write_plan("p.json", "merge", "base", ["a.safetensors"], out="out")
    adapterkit.run("p.json")
    (folder,) = (CONTROL / "ranks").iterdir()
    elsewhere = home.with_name("elsewhere")
    elsewhere.mkdir()
    move_away(folder / top / "unet", elsewhere)
    refused(lambda: adapterkit.finish("p.json"), "1 of 3 files are missing")
    assert not Path("out").exists()


def test_a_linked_folder_in_an_older_output_is_not_written_to(home: Path, pipeline, monkeypatch):
    pipeline(out="out")
    receipt = Path("out/adapterkit.json")
    data = json.loads(receipt.read_bytes())
    data["files"]["unet"] = {"size": 1, "sha256": None}
    receipt.write_text(json.dumps(data))
    shutil.rmtree("out/unet")
    Path("out/unet").symlink_to(home)
    monkeypatch.setattr(system, "is_mount", lambda path: path.name == "out")
    refused(lambda: pipeline(out="out", overwrite=True), "did not write: unet\n")


@pytest.mark.parametrize("name", ["x", "unet"])
def test_a_link_in_a_folder_that_files_move_into(home: Path, pipeline, monkeypatch, name: str):
    """An older file, as the journal says, or a part's is behind it."""
    monkeypatch.setattr(system, "is_mount", lambda path: path.name == "out")
    Path("out").mkdir()
    stopped(monkeypatch, Stage, lambda: pipeline(out="out"))
    journal = Path("out/.adapterkit/journal.jsonl")
    *entries, last = (entry for _, entry in entries_of(read_lines(journal)))
    journal.write_bytes(b"".join(map(line_of, [*entries, last | {"old": ["x/precious"]}])))
    Path("out", name).symlink_to(home)
    refused(lambda: pipeline(out="out", resume=True, verify=False), "cannot write")


# -- files with a name that is known before --------------------------------------------------------


def test_a_hard_link_where_a_journal_is_written(home: Path):
    base().write(Path("base"))
    plain().folder().write(Path("adapter"))
    adapterkit.write_plan("p.json", "merge", "base", ["adapter"], out="out")
    adapterkit.run("p.json")
    os.link("precious", CONTROL / "journal.jsonl.part")
    adapterkit.finish("p.json", verify=True)
    assert Path("precious").read_bytes() == b"precious"


def test_a_hard_link_where_activations_wait(home: Path):
    Path("work").mkdir()
    os.link("precious", "work/activations")
    ActivationStore(Path("work"), 0).close()
    assert Path("precious").read_bytes() == b"precious"


@pytest.mark.parametrize("attempt", ["", "0-1-deadbeef"])
def test_a_linked_folder_of_sums(home: Path, attempt: str):
    job: Any = SimpleNamespace(runs=[(0, [])])
    link = Path("work/0" if attempt else "work")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(home)
    refused(lambda: Ledger(job, Path("work").absolute(), attempt), "cannot write")


# -- evaluations of a fit --------------------------------------------------------------------------

FIT = Path(".w.json.adapterkit/work")


def evaluated() -> list[float]:
    stage = Stage(FileOutput(Path("w.json")))
    with stage:
        evaluations = Evaluations(work_folder(stage))
        (values,) = evaluations.of("x", torch.zeros(2), lambda: [torch.ones(3).double()], [(3,)])
    return values.tolist()


def test_a_linked_folder_of_evaluations(home: Path):
    FIT.parent.mkdir()
    FIT.symlink_to(home)
    refused(evaluated, "cannot write")


ONES = torch.ones(3).double()


@pytest.mark.parametrize("data", [
    b"", b"x", save({"z": ONES}), save({"0": torch.zeros(3)}), save({"0": ONES / 0}), save({}),
    save({"0": torch.zeros(3, dtype=torch.int8)}), save({"0": ONES, "1": ONES * 2}),
    save({"0": torch.zeros(4).double()}), "link", "pipe",
], ids=range(11))  # fmt: skip
def test_a_forged_evaluation_is_computed_again(home: Path, data: bytes | str):
    evaluated()
    (path,) = FIT.glob("*.safetensors")
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        put(data, path, home)
    assert evaluated() == [1, 1, 1]


# -- lines whose checksum is right -----------------------------------------------------------------


def summed(text: bytes) -> bytes:
    """A line of that text, which lacks its last brace, with its checksum."""
    return text + b',"crc32":"%08x"}\n' % zlib.crc32(text)


@pytest.mark.parametrize("text", [
    b"{bad", b'{"a":"\xff"', b'{"a":' + b"1" * 5000, b'{"a":' + b"[" * 20_000 + b"]" * 20_000,
    b'{"recipe":7', b'{"publish":7', b'{"old":[7]', b'{"process":null',
    b'{"seconds":NaN', b'{"joined":"1"', b'{"joined":-1', b'{"attempt":[]', b'{"device":7',
], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_a_line_that_is_no_entry_is_not_there(text: bytes):
    good = line_of({"fingerprint": "x"})
    assert [entry for _, entry in entries_of(good + summed(text) + good)] == [{"fingerprint": "x"}]


@pytest.mark.parametrize("change", [
    {"file": 7}, {"size": "1"}, {"size": -1}, {"sha256": 7}, {"metrics": None},
    {"metrics": {"a": 7}}, {"grown": "x"}, {"tensors": -1}, {"handoffs": {"a": 7}},
    {"handoffs": {"a": ["F32", [1]]}}, {"more": 7},
], ids=repr)  # fmt: skip
def test_a_result_of_another_form_is_not_there(change: dict[str, Any]):
    result = vars(ShardResult(WEIGHTS, 1, None, None, {}, handoffs={"a": ["F32", [1], 0]}))
    known = read_result({"shard": result})
    assert known is not None and vars(known) == result
    assert read_result({"shard": result | change}) is None and read_result({"shard": None}) is None


@pytest.mark.parametrize("word", ["attempt", "device", "torch", "seconds"])
def test_a_marker_without_a_word_is_not_there(tmp_path: Path, word: str):
    stage = WorkerStage(tmp_path, "x" * 16, accepts=lambda result: True)
    for folder in (stage.path, stage.marks):
        folder.mkdir(parents=True)
    stage.path.joinpath(WEIGHTS).write_bytes(b"x")
    entry = {"attempt": "a", "device": "cpu", "torch": "2", "seconds": 1.5}
    entry["shard"] = vars(ShardResult(WEIGHTS, 1, None, None, {}))
    marker = stage.marks / f"{WEIGHTS}.json"
    marker.write_bytes(line_of(entry))
    assert stage.marker(WEIGHTS) == entry
    marker.write_bytes(line_of({key: entry[key] for key in entry if key != word}))
    assert stage.marker(WEIGHTS) is None
    stage.marks.joinpath("0-1-deadbeef.heartbeat").write_bytes(line_of({"number": 1}))
    assert not stage.heartbeats()


def test_a_journal_beyond_all_sizes_is_not_read(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(line_of({"fingerprint": "x"}))
    os.truncate(path, 3 << 30)
    assert read_lines(path) == b""
