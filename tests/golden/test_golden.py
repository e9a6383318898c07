"""One small job of each verb gives the plan, the receipt and the bytes that it gave when
golden.json was written.

What is exact is compared exactly, what was measured or comes from LAPACK within `records.TOLERANCE`
or `records.CLOSE`. After a change that is meant:
`python -m tests.golden.compare --write .`, and look at the difference.
"""

import copy
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core import execute
from adapterkit.core.engine.planned_folder import planned_folder
from adapterkit.core.output.journal import ShardResult, read_result
from adapterkit.core.plan import Plan
from adapterkit.many.workers.ranges import accepts
from tests.support.calls import JOBS as PLAN_FILES
from tests.support.calls import VERBS
from tests.support.documents import ROOT

from . import compare, jobs, records

JOBS = {job.name: job for job in (*jobs.WRITING, *jobs.READING)}
# jobs in whose outputs names, shapes or small files depend on values
UNKNOWN = {
    "quantize-nf4-double",
    "arrow-plain",
    "arrow-peft",
    "extract-rank",
    "extract-energy",
    "resize-size",
    "resize-dora",
}
_, _, TABLES = (ROOT / "docs" / "receipt-keys.md").read_text().partition("\n## Metrics\n")
METRICS = {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", TABLES, re.MULTILINE)))}
GOLDEN: dict[str, Any] = json.loads(compare.GOLDEN.read_bytes())


@pytest.fixture(scope="module")
def noted() -> list[tuple[Plan, ShardResult]]:
    """What was noted of each file of the jobs, as it is read again."""
    return []


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, noted: list[tuple[Plan, ShardResult]]
) -> tuple[Path, dict[str, Any]]:
    """The folder in which all jobs ran, and their records."""
    folder, threads = tmp_path_factory.mktemp("golden"), torch.get_num_threads()
    create = execute.create_receipt

    def create_receipt(plan: Plan, recipe: dict, fingerprint: str, done: dict, *rest: Any):
        again = [read_result(json.loads(json.dumps({"shard": vars(r)}))) for r in done.values()]
        noted.extend((plan, one) for one in again if one is not None)
        assert None not in again
        return create(plan, recipe, fingerprint, done, *rest)

    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(execute, "create_receipt", create_receipt)
            return folder, jobs.run_all(folder)
    finally:
        torch.set_num_threads(threads)


def test_outputs_follow_the_umask_and_cards_name_existing_files(results):
    """Of all verbs that write: no file is for its owner alone, no card speaks of a file that is not
    beside it, and `base_model` is an id of the Hub or missing."""
    mask = os.umask(0)
    os.umask(mask)
    outputs = [results[0] / jobs.output_of(job) for job in jobs.WRITING]
    written = [path for out in outputs for path in (out, *out.rglob("*")) if path.is_file()]
    assert len(written) > len(outputs)
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    cards = [path for path in written if path.name == "README.md"]
    relations = set()
    for card in cards:
        text = card.read_text()
        named = re.findall(r"`([./]*adapterkit\.json)`", text)
        assert all((card.parent / name).exists() for name in named), card
        front = yaml.safe_load(text.split("---")[1])
        relations.add((card.parent.name.partition("-")[0], front.get("base_model_relation")))
        assert all("/" in name for name in front.get("base_model", ())), front
    assert {("quantize", "quantized"), ("merge", "merge"), ("combine", "adapter")} <= relations


def differences(name: str, record: dict[str, Any]) -> list[str]:
    """Where a record differs from the golden one."""
    now = json.loads(json.dumps(records.golden(record, JOBS[name].exact)))
    old, lines = dict(GOLDEN[name]), []
    for key, tolerance in (("summary", records.CLOSE), (None, records.TOLERANCE)):
        pair = (old.pop(key, {}), now.pop(key, {})) if key else (old, now)
        bounds = {"tolerance": tolerance, "small": records.SMALL, "path": name}
        lines += records.differences(*pair, **bounds)
    return lines


def test_every_job_has_a_golden_record():
    assert list(GOLDEN) == list(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_outputs_equal_the_golden_records(name: str, results: tuple[Path, dict[str, Any]]):
    lines = differences(name, results[1][name])
    assert not lines, "\n".join(lines)


def test_a_recorded_result_is_accepted_for_its_file_alone(results, noted):
    """Else a resumed run would make it again, and a rank for ever."""
    for plan, result in noted:
        is_of_plan = accepts(plan, hashed=result.sha256 is not None)
        assert is_of_plan(result), (plan.verb, result)
        assert {name for metric in result.metrics.values() for name in metric} <= METRICS
    assert {plan.verb for plan, _ in noted} == {job.verb for job in jobs.WRITING}


@pytest.mark.parametrize(
    "name", [job.name for job in jobs.WRITING if not jobs.output_of(job).suffix]
)
def test_planned_files_equal_the_written_ones(
    name: str, results: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """Headers and small files as later plans see them before they are there. What depends on values
    is not known."""
    monkeypatch.chdir(results[0])
    planned = planned_folder(name, jobs.call(JOBS[name], out="another", dry_run=True), name)
    assert (planned is None) == (name in UNKNOWN)
    if planned is None:
        return
    files = {path.relative_to(name).as_posix(): path for path in Path(name).rglob("*")}
    files = {file: path for file, path in files.items() if path.is_file()}
    del files[jobs.RECEIPT]
    assert planned.files() == {file: path.stat().st_size for file, path in files.items()}
    for file, path in files.items():
        data, known = path.read_bytes(), planned.read(file, 0, path.stat().st_size)
        is_weights = file.endswith(".safetensors")
        length = 8 + int.from_bytes(data[:8], "little") if is_weights else len(data)
        assert known == data[:length], file


OF_SERVERS = {"compare"}  # tests/score has servers for it


def test_every_verb_has_a_job():
    """Verbs are the functions of the package and the commands that write or print JSON."""
    functions = {*VERBS}
    context = click.Context(main)
    commands = {
        name: {parameter.name for parameter in main.get_command(context, name).params}
        for name in main.list_commands(context)
    }
    writing = {name for name, parameters in commands.items() if "engine" in parameters} - PLAN_FILES
    reading = {name for name, parameters in commands.items() if "as_json" in parameters}
    reading -= writing | PLAN_FILES
    assert {job.verb for job in jobs.WRITING} == writing
    assert {job.verb for job in jobs.READING} == reading - OF_SERVERS
    assert functions == writing | reading


def test_every_planted_difference_is_found(results: tuple[Path, dict[str, Any]]):
    """A scale, an output byte, a key of a receipt, a number of a plan, a note, a status."""
    folder, all_records = results
    path = folder / "extract-rank" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    broken = folder / "broken.safetensors"
    save_file(tensors | {key: tensors[key] * 1.001}, broken)

    def scale(record: dict[str, Any]) -> None:
        record["summary"][path.name] = jobs.summary(broken)

    def output(record: dict[str, Any]) -> None:
        record["files"]["model-00001-of-00002.safetensors"][1] = "0" * 64

    def marks(record: dict[str, Any]) -> None:
        file = record["receipt"]["keys"]["model-00001-of-00002.safetensors"]
        file[next(iter(file))] = "0" * 16

    def key_gone(record: dict[str, Any]) -> None:
        del record["receipt"]["timings"]["seal"]

    def plan(record: dict[str, Any]) -> None:
        record["plan"]["totals"]["bytes_read"] += 1

    def note(record: dict[str, Any]) -> None:
        record["receipt"]["notes"].append("more")

    def status(record: dict[str, Any]) -> None:
        record["exit"] = 0

    for name, damage in {
        "extract-rank": [scale],
        "merge-plain": [output, marks, key_gone, plan, note],
        "diff-models": [status],
    }.items():
        for change in damage:
            record = copy.deepcopy(all_records[name])
            assert not differences(name, record)
            change(record)
            assert differences(name, record), change.__name__


FIRST = {job.verb: job.name for job in reversed(jobs.WRITING)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(job.name, marks=[pytest.mark.slow] * (FIRST[job.verb] != job.name))
        for job in jobs.WRITING
    ],
)
def test_a_receipt_makes_its_output_again(name: str, results: tuple[Path, dict[str, Any]]):
    folder, _ = results
    done = adapterkit.rerun(folder / jobs.output_of(JOBS[name]), inputs=folder)
    assert done["files"] and done["command"].startswith(f"adapterkit {JOBS[name].verb} ")
