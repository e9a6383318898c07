"""Plans of small jobs of every verb, for the tests of what a plan holds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterkit.plan import Plan
from tests.golden import jobs
from tests.golden.inputs import create_inputs


@pytest.fixture(scope="package")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Plan]]:
    """{golden job: its plan}, in a folder with the inputs of all of them, which is the current one
    meanwhile."""
    folder, before = tmp_path_factory.mktemp("jobs"), Path.cwd()
    needed = {source for job in jobs.WRITING for source in (*job.sources, *job.options.values())
              if isinstance(source, str)}  # fmt: skip
    os.chdir(folder)
    try:
        create_inputs(Path())
        actual = {}
        for job in jobs.WRITING:
            actual[job.name] = jobs.call(job, out=f"planned-{job.name}", dry_run=True)
            if job.name in needed:
                jobs.call(job, out=job.name)
        yield actual
    finally:
        os.chdir(before)
