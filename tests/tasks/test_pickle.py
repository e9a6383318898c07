"""A plan of every verb survives pickle, so that it can be run by another process."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterkit.core.engine.local import local
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.plan import Plan
from tests.golden import jobs

NAMES = [job.name for job in jobs.WRITING if job.verb != "stats"]  # which has no tasks
RUN = (
    "quantize-nf4-double", "dequantize-w8a16", "merge-several", "merge-nf4", "combine-ties",
    "subtract-several", "arrow-plain", "init-quantized", "loftq-mixed", "extract-energy",
    "resize-size", "rebase-rank", "convert-same", "edit-words",
)  # fmt: skip


def copy_of(plan: Plan) -> Plan:
    return pickle.loads(pickle.dumps(plan))


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file but the receipt, which has timings."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != jobs.RECEIPT:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same_plan(name: str, plans: dict[str, Plan]):
    plan, copy = plans[name], copy_of(plans[name])
    assert copy.recipe() == plan.recipe()
    assert copy.totals() == plan.totals()


def test_every_verb_is_run():
    assert {name.partition("-")[0] for name in NAMES} == {name.partition("-")[0] for name in RUN}


@pytest.mark.parametrize("name", RUN)
def test_a_copy_writes_the_same_bytes(
    name: str, plans: dict[str, Plan], tmp_path: Path, one_thread: None
):
    first = run(plans[name], Stage(FolderOutput(tmp_path / "plan")), local()).data
    second = run(copy_of(plans[name]), Stage(FolderOutput(tmp_path / "copy")), local()).data
    assert dict(contents(tmp_path / "copy")) == dict(contents(tmp_path / "plan"))
    assert {**first, "timings": None} == {**second, "timings": None}
