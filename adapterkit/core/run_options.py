"""The options that every verb that writes has, told once: where and how its plan runs."""

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.options import (
    DEVICE,
    FLAG,
    PROGRESS,
    SIZE,
    TEXT,
    OptionRecord,
    Progress,
    StrPath,
    choice,
    no_progress,
    option,
    path,
    record,
)
from adapterkit.core.records import Check
from adapterkit.core.registry import load
from adapterkit.doors import ENGINES, HUB

WAIT = 600.0  # seconds for files of other workers that a worker's own need


def _output(value: object, *, endings: tuple[str, ...]) -> StrPath:
    out = path(value)
    if is_on_hub(out):
        load(HUB["output"])(os.fspath(out), endings=endings)
    return out


def _repository(value: object) -> str:
    return load(HUB["repository"])(value)


REPOSITORY = Check("a repository", _repository)
OUTPUT_FOLDER = Check("an output", partial(_output, endings=("",)), kind="file")
OUTPUT_FILE = Check("an output", partial(_output, endings=(".safetensors",)), kind="file")
OUTPUT_MODEL = Check(
    "an output", partial(_output, endings=("", ".gguf", ".safetensors")), kind="file"
)


def model_output_option() -> Any:
    """`out` of a verb whose output is a folder, or a file where the base is one."""
    return option(
        check=OUTPUT_MODEL,
        metavar="DIR|FILE|hf://ORG/NAME[:FILE]",
        help="Output folder, of a base in one file (GGUF, an image model) a file (published "
        "atomically), or a place on the Hub (one commit).",
    )


def adapter_output_option() -> Any:
    """`out` of a verb that makes one adapter of others."""
    return option(
        check=OUTPUT_FOLDER,
        metavar="DIR|FILE.safetensors|hf://ORG/NAME",
        help="Output folder (published atomically), a file in the layout that the (first) adapter "
        "has, or a repository of the Hub (one commit).",
    )


@record
class RunOptions(OptionRecord):
    """Where and how a plan runs."""

    out: StrPath = option(
        check=OUTPUT_FOLDER,
        metavar="DIR|hf://ORG/NAME",
        help="Output folder (published atomically), or a repository of the Hub (one commit).",
    )
    dry_run: bool = option(
        default=False, check=FLAG, help="Print the plan (tensors, bytes, memory, disk) and stop."
    )
    device: str = option(
        default="auto", check=DEVICE, metavar="auto|cpu|cuda[:i]", help="Where to compute."
    )
    memory: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Memory for weights computed at the same time, e.g. 8GB (default: a quarter of RAM).",
    )
    engine: str = option(
        default="local",
        check=choice(tuple(ENGINES)),
        help="Where to run: this machine, or a Ray cluster on a shared file system.",
    )
    ray_address: str | None = option(
        default=None,
        check=TEXT,
        metavar="ADDRESS",
        help="Address of the Ray cluster (default: as Ray finds or starts one).",
        needs="engine=ray",
    )
    disk_limit: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Disk that a job to the Hub may use on this machine, e.g. 20GB.",
    )
    resume: bool = option(
        default=False, check=FLAG, help="Continue an interrupted run of the same job."
    )
    overwrite: bool = option(
        default=False, check=FLAG, help="Replace an earlier output of adapterkit in its place."
    )
    hash: str = option(
        default="sha256",
        check=choice(("sha256", "none")),
        help="Hash of each output file in the receipt.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)

    def __getstate__(self) -> Mapping[str, object]:
        """For pickle, without the progress, which is of this process."""
        return vars(self) | {"progress": no_progress}


RUNNING = frozenset(field.name for field in dataclasses.fields(RunOptions))
