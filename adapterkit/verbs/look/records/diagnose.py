"""diagnose: why a model with merged adapters does not answer as it should."""

from collections.abc import Sequence

from adapterkit.core.options import (
    COUNT,
    FILES,
    PROGRESS,
    SOURCE,
    UNWEIGHTED,
    Progress,
    Sources,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.core.records import Json
from adapterkit.core.shared_options import base_option
from adapterkit.core.verb import Verb, function_of


@record
class Diagnose(Verb[Json]):
    """Find the reasons why a merged model answers badly; returns `diagnose` (1, the version of this
    document), `findings`, and for the adapters `coefficients`, each the factor of its delta in
    MODEL - BASE, by least squares over sampled rows, with `unexplained`, the share of the change
    that no adapter explains.

    A finding has `kind`, `problem`, `evidence`, `hint` and `command`. Kinds: `headers` (files,
    parameters that a loader would make up, a stored head that is tied), `not_finite`,
    `quantization` (of floats, or none of packed values), `tokenizer` (of another model, or with
    tokens that have no row), `history` (receipts that show a second merge); with `base` also
    `wrong_base` (weights are missing, or those that no adapter touches differ) and `other_changes`;
    with `adapters` also `adapter` (problems that `inspect` finds), `not_merged`, `merged_twice`,
    `subtracted`, `scale` (the delta without alpha / rank, or with it twice, or with the root of the
    rank) and `strength` (another factor than 1); with `data` also `predictions` (a loss that is not
    finite, or that is nearer to that of the base than of the base with the adapters). Raises
    `Refused` if the files cannot be compared."""

    runner = "verbs.look.diagnosis:diagnose_model"
    command = """Find out why a merged model answers badly.

    Checks its files, values and tokenizer. With --base and --adapter it also measures how much of
    each adapter is in the model: for example none, twice, without its scale, or merged into another
    base. With --data it also compares the model's loss on your texts with theirs. The exit status
    is 1 if it finds a problem.

    \b
    Example:
      adapterkit diagnose merged --base BASE --adapter style
      adapterkit diagnose merged --base BASE --adapter style --data texts.jsonl
    """

    model: StrPath = argument(kw_only=False, check=SOURCE)
    base: StrPath | None = base_option("The base that the model was made from.")
    adapters: Sources = option(
        default=(),
        check=UNWEIGHTED,
        flags=("--adapter",),
        metavar="ADAPTER",
        help="Adapter that should be in the model; repeat for several.",
        needs="base",
    )
    data: StrPath | Sequence[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE",
        help="Samples, to measure whether the model predicts as BASE with the adapters does; "
        "repeat for several.",
        needs="adapters",
    )
    samples: int = option(default=256, check=COUNT, help="Number of samples to draw.", needs="data")
    progress: Progress = option(default=no_progress, check=PROGRESS)


diagnose = function_of(Diagnose)
