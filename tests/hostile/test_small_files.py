"""Files that are read as a whole are ordinary ones, of so many bytes; other ones are refused, or
count as not there, before they are read."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterkit
from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.errors import Refused
from adapterkit.many.workflows.workflow import run_pipeline
from tests.support.raw_files import base, plain

pytestmark = pytest.mark.usefixtures("one_thread")

HUGE = 1 << 30
RECEIPT = "adapterkit.json"


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    base().write(tmp_path / "base")
    plain().folder().write(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def awake() -> Iterator[None]:
    """What waits for a pipe ends with the test."""

    def end(*arguments: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def merge(**options: Any) -> dict[str, Any]:
    return adapterkit.merge("base", ["adapter"], out="out", **options).data


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def test_a_file_of_weights_of_blocks_of_a_gigabyte_is_refused(work: Path, frugal):
    from adapterkit.bases.images.block_weights import inlined

    huge(work / "blocks.txt")
    with frugal(), pytest.raises(Refused, match="blocks.txt"):
        inlined("blocks.txt:MIDD")


def test_an_output_with_a_receipt_of_a_gigabyte_is_not_replaced(work: Path, frugal):
    merge()
    huge(work / "out" / RECEIPT)
    with frugal(), pytest.raises(Refused):
        merge(overwrite=True)


def test_a_pipeline_over_an_output_with_a_receipt_of_a_gigabyte_is_refused(work: Path, frugal):
    merge()
    huge(work / "out" / RECEIPT)
    step = '[[step]]\nverb = "merge"\ninputs = ["base", "adapter"]\nout = "out"\n'
    (work / "steps.toml").write_text(step)
    with frugal():
        assert [row["state"] for row in run_pipeline("steps.toml")["steps"]] == ["refused"]


@pytest.mark.parametrize("name", ["steps.toml", "plan.json"])
def test_a_pipe_to_run_is_refused_and_not_waited_for(work: Path, name: str, awake):
    os.mkfifo(work / name)
    with pytest.raises(Refused, match="not a regular file"):
        adapterkit.run(name)


def test_a_receipt_with_a_name_of_300_letters_lacks_this_file(work: Path):
    merge()
    path = work / "out" / RECEIPT
    receipt = json.loads(path.read_bytes())
    receipt["files"]["x" * 300] = {"size": 1, "sha256": None}
    path.write_text(json.dumps(receipt))
    with pytest.raises(adapterkit.AdapterkitError, match="lacks files"):
        merge(resume=True)


def test_a_small_file_is_read_through_a_link(work: Path):
    (work / "there").write_bytes(b"12345")
    (work / "link").symlink_to("there")
    assert read_small(work / "link", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_small(work / "link", 4)
