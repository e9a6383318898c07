"""What is at an output's place already: finished is what has all of its files, and what is replaced
is what adapterkit wrote."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.errors import Damaged, Refused
from tests.golden.inputs import create_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The golden inputs, in the current folder."""
    folder, before = tmp_path_factory.mktemp("older"), Path.cwd()
    os.chdir(folder)
    request.addfinalizer(lambda: os.chdir(before))
    create_inputs(Path())
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


LOSSES = {"gone": Path.unlink, "cut": cut}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_output_that_lacks_a_shard_is_not_finished(tmp_path: Path, loss: str):
    merge = lambda **more: adapterkit.merge("base", "style", out=tmp_path / "out", **more)
    merge()
    whole = (tmp_path / "out" / SHARD).read_bytes()
    LOSSES[loss](tmp_path / "out" / SHARD)
    with pytest.raises(Damaged, match=f"lacks files, or .*{SHARD}.*") as caught:
        merge(resume=True)
    assert "--overwrite" in caught.value.hint
    assert not merge(resume=True, overwrite=True).finished_before
    assert (tmp_path / "out" / SHARD).read_bytes() == whole
    assert merge(resume=True).finished_before


@pytest.mark.parametrize("loss", LOSSES)
def test_nor_is_that_of_a_plan_file(tmp_path: Path, loss: str):
    plan, out = tmp_path / "p.json", tmp_path / "out"
    adapterkit.write_plan(plan, "merge", "base", "style", out=out)
    adapterkit.run(plan)
    adapterkit.finish(plan)
    assert adapterkit.run(plan).finished and adapterkit.finish(plan).finished_before
    LOSSES[loss](out / SHARD)
    for again in (adapterkit.run, adapterkit.finish):
        with pytest.raises(Damaged, match="lacks files") as caught:
            again(plan)
        assert "make it again with --overwrite" in caught.value.hint


def test_nor_is_one_file(tmp_path: Path):
    out = tmp_path / "x.safetensors"
    convert = lambda **more: adapterkit.convert("style", to="lycoris-wrapper", out=out, **more)
    convert()
    whole = out.read_bytes()
    assert convert(resume=True).finished_before
    cut(out)
    with pytest.raises(Damaged, match="lacks files"):
        convert(resume=True)
    convert(overwrite=True)
    assert out.read_bytes() == whole
    (tmp_path / "x.safetensors.adapterkit.json").write_text("[")
    with pytest.raises(Refused, match="did not write"):
        convert(resume=True)


def test_one_file_that_adapterkit_did_not_write_is_not_replaced(tmp_path: Path):
    out, dry = tmp_path / "x.safetensors", {"dry_run": True}
    convert = lambda **more: adapterkit.convert("style", to="lycoris-wrapper", out=out, **more)
    out.write_bytes(b"mine")
    for more in ({}, {"overwrite": True}, {"resume": True}, {"overwrite": True} | dry, dry):
        with pytest.raises(Refused, match="did not write"):
            convert(**more)
    assert out.read_bytes() == b"mine" and len([*tmp_path.iterdir()]) == 1
    out.unlink()
    beside = tmp_path / "x.safetensors.adapterkit.json"
    beside.write_text("mine")
    with pytest.raises(Refused, match=r"did not write it: x\.safetensors\.adapterkit\.json"):
        convert(overwrite=True)
    assert beside.read_text() == "mine" and not out.exists()


def test_an_input_in_another_layout_is_not_replaced(tmp_path: Path):
    """Read through a conversion, it is an input all the same."""
    adapterkit.convert("style", to="mlx", out=tmp_path / "mlx")
    before = {path: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}
    with pytest.raises(Refused, match="is the input"):
        adapterkit.merge("base", tmp_path / "mlx", out=tmp_path / "mlx", overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}


def test_a_dry_run_refuses_the_place_that_the_job_refuses(tmp_path: Path):
    merge = lambda **more: adapterkit.merge("base", "style", out=tmp_path / "out", **more)
    merge()
    with pytest.raises(Refused, match="the output folder holds"):
        merge(dry_run=True)
    assert merge(dry_run=True, overwrite=True) and merge(dry_run=True, resume=True)


@pytest.mark.parametrize("plan, problem", [
    ("out", "the plan file is the output, or in it"),
    ("out/p.json", "the plan file is the output, or in it"),
    ("notes.txt", "the file is no plan file"),
])  # fmt: skip
def test_a_plan_file_has_a_place_of_its_own(tmp_path: Path, plan: str, problem: str):
    (tmp_path / "notes.txt").write_text("mine")
    write: Callable = lambda file: adapterkit.write_plan(
        file, "merge", "base", "style", out=tmp_path / "out", overwrite=True
    )
    with pytest.raises(Refused, match=problem):
        write(tmp_path / plan)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write(tmp_path / "p.json")
    write(tmp_path / "p.json")
    assert (tmp_path / "notes.txt").read_text() == "mine"
