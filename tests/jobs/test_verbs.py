"""Every verb that writes, by plan file: the bytes, receipt and refusals of the call itself."""

import json
import os
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.core.receipt import Receipt
from adapterkit.many.workflows.verbs import writing_verbs
from tests.faults.conftest import digests
from tests.golden import jobs
from tests.golden.inputs import create_inputs

NAMES = (
    "quantize-nf4 dequantize-nf4 merge-several combine-linear subtract-several arrow-plain "
    "init-pissa init-quantized loftq-nf4 extract-rank resize-size rebase-exact convert-same "
    "edit-words"
).split()
JOBS = {job.name: job for job in jobs.WRITING if job.name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The golden inputs, in the current folder."""
    folder, before = tmp_path_factory.mktemp("verbs"), Path.cwd()
    os.chdir(folder)
    request.addfinalizer(lambda: os.chdir(before))
    create_inputs(Path())
    adapterkit.convert("style", to="mlx", out="mlx")
    return folder


def by_plan(verb: str, *sources, ranks: int = 2, **options) -> Receipt:
    """A call by plan file, from another folder than the one where it was planned."""
    file = Path("job.plan.json").absolute()
    file.unlink(missing_ok=True)
    adapterkit.write_plan(file, verb, *sources, **options)
    assert os.getcwd() not in json.dumps(json.loads(file.read_bytes())["recipe"])
    here = Path.cwd()
    os.chdir("/")
    try:
        for rank in range(ranks):
            adapterkit.run(file, worker=f"{rank}/{ranks}")
        return adapterkit.finish(file)
    finally:
        os.chdir(here)


def test_every_verb_is_here():
    assert {job.verb for job in JOBS.values()} == {*writing_verbs()} - {"stats"}


@pytest.mark.parametrize("name", JOBS)
def test_the_output_of_the_call(folder: Path, name: str):
    job = JOBS[name]
    jobs.call(job, out=name)
    sources = list(job.sources)
    if job.verb == "merge":
        sources = [sources[0], sources[1:]]
    elif job.verb in ("combine", "subtract", "arrow"):
        sources = [sources]
    by_plan(job.verb, *sources, out=f"by-plan-{name}", **job.options)
    assert digests(folder / f"by-plan-{name}") == digests(folder / name)
    assert not list(folder.glob(".by-plan*"))


def test_an_adapter_of_another_format(folder: Path):
    """Each rank converts it for itself; a change of its own file is seen all the same."""
    adapterkit.merge("base", "mlx", out="foreign")
    by_plan("merge", "base", "mlx", out="by-plan-foreign")
    assert digests(folder / "by-plan-foreign") == digests(folder / "foreign")
    adapterkit.write_plan("changed.plan.json", "merge", "base", "mlx", out="changed")
    path = next((folder / "mlx").glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    with pytest.raises(Refused, match=f"{path.name} is not the file that was planned with"):
        adapterkit.run("changed.plan.json")


def test_an_output_that_is_one_file(folder: Path):
    adapterkit.convert("style", to="lycoris-wrapper", out="file.safetensors")
    by_plan("convert", "style", to="lycoris-wrapper", out="by-plan.safetensors")
    assert Path("by-plan.safetensors").read_bytes() == Path("file.safetensors").read_bytes()
    assert not list(folder.glob(".by-plan*"))
    outcome = adapterkit.run("job.plan.json")
    assert outcome.finished and not outcome.made
    assert adapterkit.finish("job.plan.json").finished_before


@pytest.mark.parametrize("adapters", [
    "style=0.75", ["style=0.75"], [("style", 0.75)], ("style", 0.75), {"style": 0.75},
    [["style", 0.75]], Path("style=0.75"),
], ids=repr)  # fmt: skip
def test_weights_in_every_form(folder: Path, tmp_path: Path, adapters):
    adapterkit.write_plan(tmp_path / "p.json", "merge", "base", adapters, out=tmp_path / "out")
    arguments = json.loads((tmp_path / "p.json").read_bytes())["arguments"]
    assert arguments["adapters"] == [[str(folder / "style"), 0.75]]
    assert arguments["base"] == str(folder / "base")


def test_refusals_come_with_the_plan(folder: Path, tmp_path: Path):
    file, out = tmp_path / "p.json", tmp_path / "out"
    write = lambda *words, **options: adapterkit.write_plan(file, *words, out=out, **options)
    with pytest.raises(Refused, match="--verb 'verify'"):
        write("verify", "base")
    with pytest.raises(Refused, match="no such path"):
        write("merge", "base", "nothing")
    with pytest.raises(Refused, match="a plan file cannot store accept"):
        write("loftq", "base", rank=2, quantized_base="base", accept=lambda *_: True)
    with pytest.raises(Refused, match="--plan cannot write to the Hub"):
        adapterkit.write_plan(file, "merge", "base", "style", out="hf://me/merged")
    assert not list(tmp_path.iterdir())
    write("merge", "base", "style")
    with pytest.raises(Refused, match="a file of this name exists"):
        write("merge", "base", "style")
    file.unlink()
    with pytest.raises(Refused, match="was interrupted"):
        write("merge", "base", "style")
    with pytest.raises(Refused, match="the output is that of a plan file"):
        adapterkit.merge("base", "style", out=out, resume=True)
    adapterkit.merge("base", "style", out=out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_output_is_replaced(folder: Path, tmp_path: Path):
    adapterkit.merge("base", "style=0.5", out=tmp_path / "out")
    with pytest.raises(Refused, match="the output folder holds"):
        by_plan("merge", "base", "style", out=tmp_path / "out")
    by_plan("merge", "base", "style", out=tmp_path / "out", overwrite=True)
    adapterkit.merge("base", "style", out=tmp_path / "new")
    assert digests(tmp_path / "out") == digests(tmp_path / "new")


@pytest.mark.parametrize("change, problem", [
    (lambda plan: plan.update(version="0.0"), "the plan is of adapterkit 0.0"),
    (lambda plan: plan.update(adapterkit=9), "no plan file"),
    (lambda plan: plan.update(verb="os.system"), "a verb that writes"),
    (lambda plan: plan.pop("inputs"), "inputs is missing"),
    (lambda plan: plan["arguments"].update(colour=1), "colour is unknown"),
    (lambda plan: plan["arguments"].update(dtype="x"), "--dtype"),
    (lambda plan: plan["arguments"].update(dtype="fp32"), "planned again: options.dtype"),
    (lambda plan: plan["recipe"].update(verb="init"), "does not match its fingerprint"),
])  # fmt: skip
def test_a_plan_file_that_is_not_the_one_that_was_written(
    folder: Path, tmp_path: Path, change, problem: str
):
    file = tmp_path / "p.json"
    adapterkit.write_plan(file, "merge", "base", "style", out=tmp_path / "out")
    plan = json.loads(file.read_bytes())
    change(plan)
    file.write_text(json.dumps(plan))
    with pytest.raises(Refused, match=problem):
        adapterkit.run(file)
    file.write_text("{")
    with pytest.raises(Refused, match="not JSON"):
        adapterkit.finish(file)
