"""rerun: make an output again from its receipt, and compare it byte for byte."""

import os
from collections.abc import Sequence

from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.errors import Refused
from adapterkit.core.options import (
    FILES,
    FLAG,
    PROGRESS,
    SOURCE,
    Progress,
    StrPath,
    argument,
    no_progress,
    option,
    path,
    record,
)
from adapterkit.core.records import Check, Json
from adapterkit.core.verb import Verb, function_of


def _out(value: object) -> StrPath:
    out = path(value)
    if is_on_hub(out):
        raise Refused(
            f" = {os.fspath(out)!r}",
            expected="a folder or a file here: nothing is sent before it is compared",
            hint="make it here, then: hf upload ORG/NAME DIR",
            code="AK101",
        )
    return out


OUT = Check("a path", _out, kind="file")


@record
class Rerun(Verb[Json]):
    """Make an output again from its receipt, and compare the sha256 of its files with the
    receipt's. Returns `files` (the number of equal ones), `command` and `out`.

    Inputs are searched by name in `inputs`, folders that contain them or inputs themselves; the
    default is the folder around the output. Hub ids are read at the commits of the receipt. The
    receipt may come from a stranger, so its names lead nowhere else, and nothing is uploaded.
    Headers, options and the bytes of inputs with a sha256 must match the receipt. `out` keeps the
    output; without it nothing is kept. Raises `Refused` for a receipt without a call, for one with
    more than the computation, or if the plan differs. Raises `Damaged` with all files that differ,
    because another version, kind of device or CPU's LAPACK gives other last bits.
    """

    runner = "many.workflows.rerun_output:rerun_output"
    command = """Make an output again from its receipt, and compare the bytes.

    Inputs are searched by name next to the output and in --inputs. The new output is deleted
    unless you give --out. The exit status is 1 if a file differs.

    \b
    Example:
      adapterkit rerun merged
      adapterkit rerun merged --inputs ./models --inputs /data/llama --out again
    """

    output: StrPath = argument(kw_only=False, check=SOURCE, metavar="DIR")
    inputs: StrPath | Sequence[StrPath] = option(
        default=(),
        check=FILES,
        metavar="PATH",
        help="Folder that contains the inputs by name, or one of the inputs; repeat for several.",
    )
    out: StrPath | None = option(
        default=None, check=OUT, metavar="DIR", help="Keep the new output in this folder."
    )
    allow_pickle: bool = option(
        default=False,
        check=FLAG,
        help="Allow reading the pickle file that a conversion started from.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


rerun = function_of(Rerun)
