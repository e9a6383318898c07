"""The options that every verb that writes has, told once: where and how its plan runs."""

import os
from typing import Any

from adapterkit.hub.ids import is_on_hub
from adapterkit.options import (
    DEVICE,
    FLAG,
    PROGRESS,
    SIZE,
    TEXT,
    OptionCheck,
    OptionRecord,
    Progress,
    StrPath,
    choice,
    no_progress,
    option,
    path,
    record,
)

WAIT = 600.0  # seconds for files of other ranks that a rank's own need


def _output(name: str, value: Any, *, file: bool) -> StrPath:
    out = path(name, value)
    if is_on_hub(out):
        from adapterkit.hub.destination import parse_output

        parse_output(os.fspath(out), file=file)
    return out


def _repository(name: str, value: Any) -> str:
    from adapterkit.hub.push import repository

    return repository(name, value)


REPOSITORY = OptionCheck(_repository)
OUTPUT_FOLDER = OptionCheck(lambda name, value: _output(name, value, file=False), "file")
OUTPUT_FILE = OptionCheck(lambda name, value: _output(name, value, file=True), "file")


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
        check=choice(("local", "ray")),
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
        default=False,
        check=FLAG,
        help="Replace an earlier output of adapterkit in its place.",
    )
    hash: str = option(
        default="sha256",
        check=choice(("sha256", "none")),
        help="Hash of each output file in the receipt.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)
