"""Plan files, pipelines, shared stages and launchers' variables that others wrote."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterkit
from adapterkit.core.errors import AdapterkitError, Failed, MultipleErrors, Refused
from adapterkit.core.output.journal import line_of, read_entry
from adapterkit.many.workers.launcher import worker_of
from adapterkit.many.workflows.workflow import run_pipeline
from tests.support.raw_files import base, plain

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "model.safetensors"
NO_JSON = (b"", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b'{"a"')
NONSENSE = (None, "x", [], {}, True, -1, 1e400, "\x1b[31m", "../../x")


def refused(call: Callable[[], Any], problem: str = ".") -> None:
    """It ends in an error with all of its four parts, and leaves the terminal alone."""
    with pytest.raises(AdapterkitError, match=problem) as caught:
        call()
    error = caught.value
    assert isinstance(error, Refused) and "\x1b" not in str(error)
    for one in error.errors if isinstance(error, MultipleErrors) else (error,):
        assert one.problem and one.expected and one.where and one.hint, one


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_relative_to(folder / "work")}


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The folder of the jobs; beside it nothing changes."""
    folder = tmp_path / "work"
    base().write(folder / "base")
    plain().folder().write(folder / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    before = everything(tmp_path)
    yield folder
    assert everything(tmp_path) == before


def planned(**options: Any) -> Path:
    file = Path("out.plan.json")
    adapterkit.write_plan(file, "merge", "base", ["adapter"], out="out", **options)
    return file


def ranks_folder() -> Path:
    (folder,) = Path(".out.adapterkit/ranks").iterdir()
    return folder


def either(file: Path, problem: str = ".") -> None:
    refused(lambda: adapterkit.run(file), problem)
    refused(lambda: adapterkit.finish(file), problem)


# -- plan files ----------------------------------------------------------------------------------


def test_a_plan_file_that_is_no_json(work: Path):
    for content in NO_JSON:
        Path("p.json").write_bytes(content)
        either(Path("p.json"), "not JSON|no plan file")
    text = planned().read_text()
    Path("p.json").write_text(text.rstrip()[:-1] + ', "verb": "merge"}')
    either(Path("p.json"), "twice")
    either(Path("base"))
    either(Path("missing"))


@pytest.mark.parametrize("key", ["verb", "arguments", "fingerprint", "recipe", "inputs", "hash"])
def test_a_plan_file_with_nonsense(work: Path, key: str):
    plan = json.loads(planned().read_text())
    for value in NONSENSE:
        Path("p.json").write_text(json.dumps(plan | {key: value}))
        either(Path("p.json"))
        assert not Path("out").exists()


@pytest.mark.parametrize("more, problem", [
    ({"dry_run": True}, "it holds dry_run"),
    ({"resume": True, "engine": "ray"}, "it holds engine, resume"),
    ({"progress": "x"}, "it holds progress"),
    ({"overwrite": True}, "it holds overwrite"),
    ({"lbw": ["../private.json"]}, "--lbw names a file"),
    ({"out": "hf://org/name"}, "not absolute"),
    ({"out": "../out"}, "not absolute"),
    ({"out": None}, "not absolute"),
    ({"out": "/a\0b"}, "--out"),
    ({"base": "a\0b"}, "--base"),
    ({"device": "card"}, "--device"),
    ({"memory": "1e400GB"}, "--memory"),
    ({"ray_address": "somewhere:1"}, "it holds ray_address"),
    ({"push": "org/x"}, "it holds push"),
    ({"adapters": [[["x"]]]}, "--adapters"),
    ({"adapters": {"adapter": "x"}}, "--adapters"),
])  # fmt: skip
def test_a_plan_file_with_other_arguments(work: Path, more: dict, problem: str):
    plan = json.loads(planned().read_text())
    plan["arguments"] |= more
    Path("p.json").write_text(json.dumps(plan))
    either(Path("p.json"), problem)


@pytest.mark.parametrize("verb", ["os", "os.system", "verify", "../verbs/merge", "Merge"])
def test_a_plan_file_of_what_is_no_writing_verb(work: Path, verb: str):
    plan = json.loads(planned().read_text())
    Path("p.json").write_text(json.dumps(plan | {"verb": verb}))
    either(Path("p.json"), "a verb that writes")


def test_a_plan_file_that_cannot_be_made_leaves_no_stage(work: Path):
    write = lambda file: adapterkit.write_plan(file, "merge", "base", ["adapter"], out="out")
    for file in ("missing/p.json", "base", "a\0b"):
        refused(lambda file=file: write(file))
    assert not Path(".out.adapterkit").exists()


# -- what lies in a shared stage -----------------------------------------------------------------


def test_markers_and_files_that_are_no_files(work: Path, tmp_path: Path):
    file = planned()
    for place in ("marks/" + WEIGHTS + ".json", "out/" + WEIGHTS):
        adapterkit.run(file)
        path = ranks_folder() / place
        path.rename("kept")
        os.mkfifo(path)
        refused(lambda: adapterkit.finish(file), "files are missing")
        path.unlink()
        path.symlink_to(Path("kept").absolute())
        refused(lambda: adapterkit.finish(file), "files are missing")
    adapterkit.run(file)
    adapterkit.finish(file, verify=True)
    assert not Path("out", WEIGHTS).is_symlink()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"reason": "\\u001b[31m"}', *NO_JSON])
def test_a_failure_mark_with_any_content_fails_a_job(work: Path, content: bytes):
    file = planned()
    (ranks_folder() / "marks" / "FAILED").write_bytes(content)
    either(file, "the job failed")


@pytest.mark.parametrize("inner", [".", "ranks", "ranks/JOB", "ranks/JOB/out", "ranks/JOB/marks"])
def test_a_stage_that_leads_elsewhere(work: Path, tmp_path: Path, inner: str):
    """Neither ranks nor a new plan write where a link leads."""
    file, elsewhere = planned(), tmp_path / "elsewhere"
    place = Path(".out.adapterkit", inner.replace("JOB", ranks_folder().name))
    place.rename("moved")
    place.symlink_to(elsewhere)
    either(file)
    if inner == ".":
        refused(lambda: planned(overwrite=True), "symbolic link")
    else:
        planned(overwrite=True)
    assert not list(elsewhere.iterdir())


def test_a_journal_that_is_none(work: Path):
    file = planned()
    Path(".out.adapterkit/journal.jsonl").write_bytes(b'{"fingerprint": "x"}\n')
    refused(lambda: adapterkit.finish(file))


def test_parts_that_the_plan_has_none_of(work: Path):
    """A marker of other bytes than the file's, or of another file, says nothing of it."""
    file = planned()
    adapterkit.run(file)
    marker = ranks_folder() / "marks" / f"{WEIGHTS}.json"
    entry, done = read_entry(marker), ranks_folder() / "out" / WEIGHTS
    marker.unlink()
    size = done.stat().st_size
    for name in ("{0}@0-{2}", "{0}@00-{1}", "{0}@-0-{1}", "{0}@{1}-0", "x@0-{1}", "@0-{1}"):
        part = name.format(WEIGHTS, size, size + 1)
        shard = entry["shard"] | {"file": part, "sha256": None, "marks": {}, "metrics": {}}
        path = marker.with_name(f"{part}.json")
        path.write_bytes(line_of(entry | {"shard": shard}))
        done = done.rename(done.with_name(part))
        refused(lambda: adapterkit.finish(file), "files are missing")
    assert adapterkit.run(file).made == [WEIGHTS]
    adapterkit.finish(file, verify=True)
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md", WEIGHTS, "adapterkit.json", "config.json"
    }  # fmt: skip


# -- launchers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [
    "0 0 0 1 0", "0 5 6 2 1", "9 0 1 2 1", "0 1 0 0 1", "2 0 4 2 0", "x 0 0 1 1", "-1 -1 0 2 1",
    "0 0 9999999 10000000 1", "0 0 1999999 2000000 1",
])  # fmt: skip
def test_a_job_array_that_is_none(numbers: str):
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    environment = {f"SLURM_ARRAY_TASK_{n}": v for n, v in zip(names, numbers.split(), strict=True)}
    refused(lambda: worker_of("auto", environment))


@pytest.mark.parametrize("rank, ranks", [
    ("0", "1000000000"), ("0", "1000000"), ("²", "3"), ("1\x1b[31m", "2"), ("", ""), ("0", "0"),
    ("1e0", "2"),
])  # fmt: skip
def test_ranks_that_are_none(rank: str, ranks: str):
    refused(lambda: worker_of("auto", {"RANK": rank, "WORLD_SIZE": ranks}))
    refused(lambda: worker_of(f"{rank}/{ranks}", {}))


# -- pipelines -----------------------------------------------------------------------------------

STEP = '[[step]]\nverb = "merge"\ninputs = ["base", "adapter"]\nout = "out"\n'


@pytest.mark.parametrize("text", [
    "", "\0", "\ufeff" + STEP, "a = " + "[" * 100_000, f"{STEP}options = {{seed = {'9' * 5000}}}",
    "[[step]]\nverb = " + "[" * 9000 + "]" * 9000, STEP + 'out = "other"', STEP * 20_000,
    STEP.replace('"merge"', "2020-01-01"), STEP.replace('"merge"', "nan"),
])  # fmt: skip
def test_a_file_that_is_no_pipeline(work: Path, text: str):
    Path("steps.toml").write_text(text)
    refused(lambda: run_pipeline(Path("steps.toml")))


@pytest.mark.parametrize("verb", ["os", "__init__", "verify", "inspect", "../merge", "adapterkit"])
def test_a_pipeline_of_what_is_no_writing_verb(work: Path, verb: str):
    Path("steps.toml").write_text(STEP.replace("merge", verb))
    refused(lambda: run_pipeline(Path("steps.toml")), "verb")


@pytest.mark.parametrize("option", [
    'accept = "x"', "dry_run = true", "overwrite = true", 'progress = "x"', "resume = true",
    'ray_address = "somewhere:6379"', 'engine = "ray"', 'token = "x"',
])  # fmt: skip
def test_options_that_no_pipeline_has(work: Path, option: str):
    """The address of a cluster is one: the driver unpickles what it answers."""
    Path("steps.toml").write_text(f"{STEP}options = {{ {option} }}")
    refused(lambda: run_pipeline(Path("steps.toml")), "is unknown")


@pytest.mark.parametrize("more", [
    'options = { push = "evil/stolen" }', '[[step]]\nverb = "merge"\n'
    'inputs = ["base", "adapter"]\nout = "hf://evil/stolen"',
])  # fmt: skip
def test_a_pipeline_sends_nothing_without_the_user_s_option(work: Path, more: str, monkeypatch):
    """The refusal comes before the first step; a dry run shows where it would go."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    Path("steps.toml").write_text(STEP + more)
    for call in (lambda: run_pipeline("steps.toml"), lambda: adapterkit.run("steps.toml")):
        refused(call, "uploads its output to evil/stolen")
    refused(lambda: adapterkit.run("steps.toml"), "adapterkit run steps.toml --allow-push")
    assert not Path("out").exists()


@pytest.mark.parametrize("change", [
    ('"out"', '"a\\u0000b"'), ('"out"', '"adapter/../base/x"'), ('"out"', '"/"'),
    ('"out"', f'"{"x" * 300}"'), ('"out"', '"steps.toml"'), ('"base"', '"/dev/zero"'),
    ('"base"', '"a\\u0000b"'), ('"base"', '"/proc/self/mem"'), ('"base"', '"\\u001b[31m"'),
])  # fmt: skip
def test_paths_of_a_pipeline(work: Path, change: tuple[str, str]):
    Path("steps.toml").write_text(STEP.replace(*change))
    try:
        (row,) = run_pipeline(Path("steps.toml"))["steps"]
    except Refused:
        return
    assert row["state"] == "refused" and "\x1b" not in row["message"]


# -- Ray -----------------------------------------------------------------------------------------


def test_an_error_of_a_task_is_one_of_the_driver():
    """Also one of a class that only the worker knows."""
    from adapterkit.many.workers.ray import _as_data, _as_error

    class Unreachable(Failed):
        pass

    parts = {"expected": "a network", "where": "org/name", "hint": "run again", "code": "AK610"}
    error = _as_error(json.loads(json.dumps(_as_data(Unreachable("no answer", **parts)))))
    assert type(error) is Failed and str(error) == str(Failed("no answer", **parts))
    assert error.code == "AK610"
