"""Find the shards that a distributed training left next to an adapter, and the command that joins
them: the program that saved them has one."""

import os
import re
from typing import NamedTuple

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, original
from adapterkit.core.commands import filled
from adapterkit.core.errors import Refused

GATHER = "gather the shards and save it again (FSDP, ZeRO-3, tensor parallelism)"


class Program(NamedTuple):
    """A program's shards by the ends of their paths, and its command for their folder."""

    what: str
    ends: re.Pattern[str]
    command: str
    up: str = "."  # from the shards to the folder that the command takes


PROGRAMS = (
    Program(
        "shards of ZeRO",
        re.compile(r"(?:^|[/_])zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt$"),
        # the checkpoint has a copy of this script, but code in a stranger's folder is not advised
        "python -m deepspeed.utils.zero_to_fp32 {folder} joined --exclude_frozen_parameters",
        up="..",
    ),
    Program(
        "shards of FSDP",
        re.compile(r"(?:^|/)pytorch_model_fsdp_\d+/[^/]+\.distcp$"),
        "accelerate merge-weights {folder} joined",
    ),
    Program(
        "shards of torch.distributed.checkpoint",
        re.compile(r"(?:^|/)(?!optimizer_\d+/)[^/]+/[^/]+\.distcp$"),
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} joined.pt",
    ),
)


def training_shards(folder: Folder) -> tuple[str, str] | None:
    """The kind of the shards in a local folder, and the hint that joins the last step's."""
    folder = original(folder)
    if not isinstance(folder, LocalFolder) or folder.single:
        return None
    own = folder.root.resolve().name  # it may be the shards' folder itself
    numbers = lambda name: [int(digits) for digits in re.findall(r"\d+", name)]
    for program in PROGRAMS:
        found = [name for name in folder.files() if program.ends.search(f"{own}/{name}")]
        if found:
            last = os.path.dirname(max(found, key=numbers))
            at = os.path.normpath(os.path.join(folder.label, last, program.up))
            do = f"join them, then convert the result with its {CONFIG}"
            return program.what, f"{do}\n{filled(program.command, folder=at)}"
    return None


def how_to_join(folder: Folder) -> str:
    """The hint for an adapter that lacks the shards of some processes."""
    found = training_shards(folder)
    if found is None:
        return GATHER
    return f"the folder has {found[0]}: {found[1]}"


def shards_alone(folder: Folder) -> Refused | None:
    """The refusal of a folder that has shards instead of an adapter's weights."""
    found = training_shards(folder)
    if found is None:
        return None
    problem, expected = f"no weights of an adapter, but {found[0]}", "a complete adapter"
    return Refused(problem, expected=expected, where=folder.label, hint=found[1], code="AK206")
