"""rerun: an output made again from its receipt, and compared byte for byte."""

from adapterkit.options import (
    FILE,
    PROGRESS,
    SOURCE,
    Progress,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.records import Json
from adapterkit.verb import Verb, function_of


@record
class Rerun(Verb[Json]):
    """Make an output again as its receipt says, and compare its files' sha256 with the receipt's;
    `files`, how many are the same, `command`, and `out`.

    The inputs are looked for by their names in `inputs`, by default beside the output; ids of the
    Hub at the commits of the receipt. They have to be the same, which the fingerprint says. `out`
    keeps the output; else it is made in a folder that goes again. Raises `Refused` for a receipt
    that does not hold its call, or where the plan is another one, and `Damaged` with all files
    that differ: another version, kind of device or CPU's LAPACK gives other last bits.
    """

    runner = "jobs.rerun:rerun_output"
    command = """Make an output again from its receipt, and compare.

    The inputs are looked for by name, beside the output or in --inputs. Nothing is kept without
    --out. The exit status is 1 where a file differs.

    \b
    Example:
      adapterkit rerun merged
      adapterkit rerun merged --inputs ./models --out again
    """

    output: StrPath = argument(check=SOURCE, metavar="DIR")
    inputs: StrPath | None = option(
        default=None, check=FILE, metavar="DIR", help="Where the inputs are, by their names."
    )
    out: StrPath | None = option(
        default=None, check=FILE, metavar="DIR", help="Keep what is made here."
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


rerun = function_of(Rerun)
