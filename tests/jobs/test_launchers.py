"""The lines of docs/machines.md for mpirun and torchrun, under these programs."""

import os
import shlex
import shutil
import subprocess

import pytest

from tests.jobs.conftest import FINISH, PLAN, LinesBench, launcher_lines, workers_in, write_command
from tests.support.documents import ROOT

LINES = {name: line for name, line in launcher_lines().items() if name in ("mpirun", "torchrun")}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # Open MPI starts no more processes than there are cores, and none for root, unless told
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("launcher", LINES)
def test_the_lines_of_scale_make_the_bytes_of_one_process(
    launcher: str, lines_bench: LinesBench, tmp_path
):
    """Each of four processes is another rank, whichever makes a file first."""
    if shutil.which(launcher) is None:
        pytest.skip(f"{launcher} is not installed")
    write_command(tmp_path)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = ""
    for line in (PLAN, LINES[launcher], FINISH):
        done = subprocess.run(
            shlex.split(line),
            cwd=lines_bench.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout + done.stderr
    assert workers_in(printed) == [f"{rank}/4" for rank in range(4)], printed
    lines_bench.check_done()
