"""The verb `verify`: check an output against its receipt. Every byte is hashed; with the inputs,
sampled rows are recomputed in float64."""

from collections.abc import Sequence

from adapterkit.core.options import (
    COUNT,
    FILES,
    PROGRESS,
    SOURCE,
    WEIGHTED,
    Progress,
    Sources,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.core.records import Json
from adapterkit.core.shared_options import GGUF, QUANTIZED, base_option, statistics_option
from adapterkit.core.verb import Verb, function_of


@record
class Verify(Verb[Json]):
    """Check the folder's files against its receipt; with `base` and `adapters`, also rows of a
    merge against its inputs; `stats`: the file of a merge with compensated rounding.

    For a folder on the Hub, the hashes of large files are those that the Hub lists; they are only
    downloaded to recompute rows, or to measure.

    With `data`, the losses of the output, the base, and the base with the adapters on it are
    measured. Without `base`, these are found as `rerun` finds them.

    Returns counts of what was checked; `rows` is 0 without the inputs, and `score`, the document of
    `score`, needs `data`. Raises `Damaged` naming each file with wrong bytes and its first damaged
    tensor, and `Refused` if there is no receipt or the inputs are not those of the receipt."""

    tier = "core"
    runner = "core.verify.report:verify_output"
    command = """Check an output against its receipt.

    Checks every hash, size and key; with the inputs of a merge, also its arithmetic. With --data,
    measures the losses of the output and its inputs, which it finds next to the output.

    \b
    Example:
      adapterkit verify merged
      adapterkit verify merged --base ./base --adapter ./my-adapter
      adapterkit verify merged --data texts.jsonl
    """

    folder: StrPath = argument(kw_only=False, check=SOURCE, metavar="DIR")
    base: StrPath | None = base_option(
        "The base of a merge, to recompute rows of each changed tensor in float64."
    )
    adapters: Sources = option(
        default=(),
        check=WEIGHTED,
        flags=("--adapter",),
        metavar="ADAPTER",
        help="Adapter of the merge; repeat for several, in the order of the merge.",
    )
    stats: StrPath | None = statistics_option("Statistics that the merge used.", section=QUANTIZED)
    imatrix: StrPath | None = statistics_option(
        "Importance matrix that the merge used.", section=GGUF
    )
    data: StrPath | Sequence[StrPath] = option(
        default=(), check=FILES, metavar="FILE", help="Samples to measure on; repeat for several."
    )
    samples: int = option(default=256, check=COUNT, help="Number of samples.", needs="data")
    progress: Progress = option(default=no_progress, check=PROGRESS)


verify = function_of(Verify)
