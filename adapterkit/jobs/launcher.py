"""Which of how many processes this one is: as it is told, or as the launcher's environment says."""

import os
import re
from collections.abc import Mapping

from adapterkit.errors import Refused, shown

Numbers = tuple[int, int]  # rank, and how many there are
PAIRS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
KUBERNETES, COUNT = "JOB_COMPLETION_INDEX", "ADAPTERKIT_RANKS"
ARRAY = "SLURM_ARRAY_TASK_"
MOST_RANKS = 999_999  # each plans the shares of all


def rank_of(text: str, environment: Mapping[str, str] | None = None) -> Numbers:
    """The rank, from 0, and how many there are: of a text `I/N`, or with `auto` of Slurm's,
    torchrun's, MPI's or Kubernetes' variables; 0 of 1 without any. `Refused` where they contradict
    each other or are incomplete."""
    if text == "auto":
        rank, ranks = _from(os.environ if environment is None else environment)
        if ranks > MOST_RANKS:
            raise _refused(f"{ranks} ranks are too many", f"at most {MOST_RANKS}")
        return rank, ranks
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise Refused(
            f"--rank {shown(text)} is not valid",
            expected="auto, or I/N with I from 0 to N - 1",
            where="options",
            hint="the first of four is 0/4",
        )
    return int(match[1]), int(match[2])


def _from(environment: Mapping[str, str]) -> Numbers:
    found = {
        f"{first} and {second}": _numbers(environment, first, second)
        for first, second in PAIRS
        if first in environment or second in environment
    }
    if KUBERNETES in environment:
        found[f"{KUBERNETES} and {COUNT}"] = _numbers(environment, KUBERNETES, COUNT)
    if (slurm := _slurm(environment)) is not None:
        found["Slurm's variables"] = slurm
    # a launcher may have started another one: one process of one says nothing
    several = {name: pair for name, pair in found.items() if pair != (0, 1)}
    if len(set(several.values())) > 1:
        texts = [f"{name} say {rank}/{ranks}" for name, (rank, ranks) in several.items()]
        raise _refused("; ".join(texts), "launchers that agree")
    return next(iter(several.values()), (0, 1))


def _slurm(environment: Mapping[str, str]) -> Numbers | None:
    """The tasks of a job step, of each element of a job array."""
    rank, ranks = 0, 1
    # a batch script is task 0, without their number unless sbatch was given --ntasks
    script = environment.get("SLURM_PROCID") == "0" and "SLURM_NTASKS" not in environment
    if "SLURM_PROCID" in environment and not script:
        rank, ranks = _numbers(environment, "SLURM_PROCID", "SLURM_NTASKS")
    elif ARRAY + "ID" not in environment:
        return None
    if ARRAY + "ID" in environment:
        number, least, most, count, step = (
            _whole(environment, ARRAY + name) for name in ("ID", "MIN", "MAX", "COUNT", "STEP")
        )
        is_whole = step and most - least == (count - 1) * step
        if not is_whole or number not in range(least, most + 1, step):
            raise _refused(
                f"element {number} of a job array of {count} elements from {least} to {most}",
                "an array without gaps",
            )
        element = (number - least) // step
        rank, ranks = element * ranks + rank, count * ranks
    return rank, ranks


def _numbers(environment: Mapping[str, str], first: str, second: str) -> Numbers:
    rank, ranks = _whole(environment, first), _whole(environment, second)
    if not 0 <= rank < ranks:
        raise _refused(f"{first}={rank} with {second}={ranks}", "a rank below their number")
    return rank, ranks


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
    hint = "give --rank I/N"
    return Refused(problem, expected=expected, where="the environment", hint=hint)
