"""Determine a process's number among the workers, from an option or its environment."""

import os
import re
from collections.abc import Mapping

from adapterkit.core.errors import Refused, shown

Numbers = tuple[int, int]  # worker, and how many there are
# The variables of a worker and of their number, of launchers that may start each other, the
# innermost first: one that is started by another leaves that one's variables in the environment.
PAIRS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", "ADAPTERKIT_RANKS"),  # Kubernetes
)
ARRAY = "SLURM_ARRAY_TASK_"
MOST_WORKERS = 999_999  # each plans the shares of all


def worker_of(text: str, environment: Mapping[str, str] | None = None) -> Numbers:
    """The worker's number, from 0, and the number of workers: from a text `I/N`, or with `auto`
    from the variables of Slurm, torchrun, MPI or Kubernetes; 0 of 1 without any. `Refused` if these
    are incomplete."""
    if text == "auto":
        worker, worker_count = _from(os.environ if environment is None else environment)
        if worker_count > MOST_WORKERS:
            raise _refused(f"{worker_count} workers are too many", f"at most {MOST_WORKERS}")
        return worker, worker_count
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise Refused(
            f"--worker {shown(text)} is not valid",
            expected="auto, or I/N with I from 0 to N - 1",
            where="options",
            hint="the first of four is 0/4",
            code="AK101",
        )
    return int(match[1]), int(match[2])


def _from(environment: Mapping[str, str]) -> Numbers:
    """The numbers from the innermost launcher, within an element of a job array, because elements
    are separate workers whatever each of them starts."""
    element, elements = _element(environment)
    worker, worker_count = _within(environment)
    return element * worker_count + worker, elements * worker_count


def _within(environment: Mapping[str, str]) -> Numbers:
    for pair in PAIRS:
        if all(name in environment for name in pair):
            numbers = _numbers(environment, *pair)
            if numbers != (0, 1):  # one process of one: another launcher may have started it
                return numbers
    for pair in PAIRS:
        # of Slurm a batch script may have the first alone, task 0, and salloc's shell the second
        is_set = pair[0] != "SLURM_PROCID" or environment.get(pair[0], "0") != "0"
        if is_set and any(name in environment for name in pair):
            _numbers(environment, *pair)  # refuses incomplete variables
    return 0, 1


def _element(environment: Mapping[str, str]) -> Numbers:
    """The element of Slurm's job array, and the number of elements."""
    if ARRAY + "ID" not in environment:
        return 0, 1
    number, least, most, count, step = (
        _whole(environment, ARRAY + name) for name in ("ID", "MIN", "MAX", "COUNT", "STEP")
    )
    is_whole = step and most - least == (count - 1) * step
    if not is_whole or number not in range(least, most + 1, step):
        raise _refused(
            f"element {number} of a job array of {count} elements from {least} to {most}",
            "an array without gaps",
        )
    return (number - least) // step, count


def _numbers(environment: Mapping[str, str], first: str, second: str) -> Numbers:
    worker, worker_count = _whole(environment, first), _whole(environment, second)
    if not 0 <= worker < worker_count:
        raise _refused(
            f"{first}={worker} with {second}={worker_count}", "a worker below their number"
        )
    return worker, worker_count


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None and name == ARRAY + "STEP":
        return 1
    if text is None:
        raise _refused(f"{name} is not set", "all variables of this launcher")
    if not re.fullmatch(r"\d{1,7}", text.strip(), re.ASCII):
        raise _refused(f"{name}={shown(text)}", "a whole number")
    return int(text)


def _refused(problem: str, expected: str) -> Refused:
    return Refused(
        problem, expected=expected, where="the environment", hint="give --worker I/N", code="AK101"
    )
