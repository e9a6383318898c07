"""Which worker a process is: as it is told, or by the variables of launchers."""

import pytest

from adapterkit.core.errors import Refused
from adapterkit.many.workers.launcher import worker_of
from adapterkit.many.workers.worker import assigned

pytestmark = pytest.mark.quick

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "3"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "4", "ADAPTERKIT_RANKS": "6"}


@pytest.mark.parametrize("environment, expected", [
    ({}, (0, 1)),
    (STEP, (1, 3)),
    ({"SLURM_NTASKS": "3"}, (0, 1)),  # a shell of salloc
    (ARRAY, (2, 4)),
    ({"SLURM_PROCID": "0"}, (0, 1)),  # a batch script
    (ARRAY | {"SLURM_PROCID": "0"}, (2, 4)),
    (TORCHRUN | {"SLURM_PROCID": "0"}, (5, 8)),
    (ARRAY | STEP, (7, 12)),
    (ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (2, 4)),
    (TORCHRUN, (5, 8)),
    (TORCHRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (5, 8)),
    (MPI, (1, 2)),
    (HYDRA | STEP, (1, 3)),
    (KUBERNETES, (4, 6)),
    # one launcher in another: what the inner one starts it numbers itself
    (TORCHRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (5, 8)),  # in a batch script
    (TORCHRUN | STEP, (5, 8)),  # on each node
    (MPI | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (1, 2)),
    (MPI | TORCHRUN, (5, 8)),
    (HYDRA | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (1, 3)),
    (TORCHRUN | KUBERNETES, (5, 8)),
    (TORCHRUN | {"JOB_COMPLETION_INDEX": "4"}, (5, 8)),
    (ARRAY | TORCHRUN | {"SLURM_PROCID": "0"}, (21, 32)),  # elements are apart
    ({"RANK": "0", "WORLD_SIZE": "1"} | STEP, (1, 3)),
    ({"WORLD_SIZE": "3", "MASTER_ADDR": "node1"} | STEP, (1, 3)),  # as scripts of torch export it
])  # fmt: skip
def test_worker_numbers_of_launchers_are_read(
    environment: dict[str, str], expected: tuple[int, int]
):
    assert worker_of("auto", environment) == expected


@pytest.mark.parametrize("environment, problem", [
    ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ({"SLURM_PROCID": "1"}, "SLURM_NTASKS is not set"),
    (ARRAY | {"SLURM_PROCID": "1"}, "SLURM_NTASKS is not set"),
    ({"JOB_COMPLETION_INDEX": "1"}, "ADAPTERKIT_RANKS is not set"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
    (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "a job array of 3 elements from 3 to 9"),
    (ARRAY | {"SLURM_ARRAY_TASK_ID": "8"}, "a job array of 4 elements"),
])  # fmt: skip
def test_an_incomplete_launcher_environment_is_refused(environment: dict[str, str], problem: str):
    with pytest.raises(Refused, match=problem):
        worker_of("auto", environment)


def test_a_given_worker_number_counts_before_the_launcher_s():
    assert worker_of("3/4", TORCHRUN) == (3, 4)
    for text in ("4/4", "1", "a/b", "-1/2", "1/2/3", "0/0", ""):
        with pytest.raises(Refused, match="--worker"):
            worker_of(text, {})


def test_the_longest_first_and_evenly():
    sizes = {"a": 5, "b": 9, "c": 1, "d": 5, "e": 4}
    shares = assigned(sizes.items(), 2)
    assert shares == [["b", "e"], ["a", "d", "c"]]
    assert assigned(reversed(sizes.items()), 2) == shares
    assert assigned(sizes.items(), 7)[5:] == [[], []]
