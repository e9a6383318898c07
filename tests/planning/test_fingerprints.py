"""Two processes plan the same, whatever order their sets of strings have: ranks recognize a job by
its fingerprint, and each makes some of the files of one plan."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden import inputs, jobs
from tests.support import job_plans

SOURCES = ("quantize-nf4", "quantize-w8a16", "merge-plain")  # whose outputs other jobs read
Plans = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plans, Plans]:
    """What the plan of each golden job says, here and in a process with another hash seed."""
    folder, root = tmp_path_factory.mktemp("jobs"), Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        inputs.create_inputs(Path())
        for job in jobs.WRITING:
            if job.name in SOURCES:
                jobs.call(job, out=jobs.output_of(job))
        here = job_plans.all_plans()
    seed = str(int(os.environ.get("PYTHONHASHSEED", "random") == "1") + 1)
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.job_plans"],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(json.dumps(here)), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [job.name for job in jobs.WRITING])
def test_two_processes_plan_the_same(name: str, planned: tuple[Plans, Plans]):
    here, there = (plans[name] for plans in planned)
    for part, value in here.items():
        assert there[part] == value, part
