"""score: measure the loss of checkpoints on texts, as they are stored and with adapters on them."""

from collections.abc import Sequence

from adapterkit.core.options import (
    FILE,
    FILES,
    FLAG,
    PROGRESS,
    SOURCE,
    UNWEIGHTED,
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
from adapterkit.core.verb import Verb, function_of
from adapterkit.verbs.score.options import SampleOptions


@record
class Score(Verb[Json], SampleOptions):
    """Measure the loss per token of models on texts, one layer of a model in memory at a time.

    loss = Σ -log p(token | tokens before) / Σ tokens, in nats, over the tokens that count: all of a
    text except the first, a completion's, or an assistant's (`data` as in `stats`). perplexity =
    exp(loss).

    `models` are checkpoints in any format that is read, GGUF files too. With `adapters` each is
    also measured with their exact sum, W + Σ weight·scale·b@a, unless its receipt says that it
    contains them. The tokenizer is the first model's. Samples run one by one, so a result does not
    depend on the other samples. `against` is a model, with the adapters if there are any, from
    whose predictions p the distance is measured: KL(p ‖ q) per token, and the share of positions
    where both have the same most probable token.

    Returns

    - `score`: 1, the version of this document; `data`: `files`, `sha256` of the tokens, `samples`,
      `tokens` that count, `length`
    - `rows`, the model of least loss first: `model` and `adapters`; `loss` (`value`, and the bounds
      `low` and `high` of its 95 % interval over samples), `perplexity`; `more`: what it loses more
      than the first row, paired by sample, with its interval, and `within_noise` if that contains
      0; with `against` also `kl` with its interval, and `same_top1`
    - `against`: the reference's name, or null; `notes`

    With `out` the document is written there, and finished rows are kept next to it until it is
    complete, so that `resume` continues. Raises `Refused` before a model runs, with all problems;
    `Failed` for predictions that are not finite."""

    runner = "verbs.score.job:score_models"
    tier = "experimental"
    command = """Measure the loss of models on your texts, without loading them.

    Runs each model one layer at a time, as it is stored and with adapters on it, and prints loss
    and perplexity per token with intervals, the best model first. The models may have different
    formats. With --against, the table has each model's distance from a reference.

    \b
    Example:
      adapterkit score ./merged --data texts.jsonl
      adapterkit score ./base ./merged --adapter ./my-adapter --data texts.jsonl
      adapterkit score q4.gguf q8.gguf --against ./base --data texts.jsonl --out scores.json
    """

    models: Sources = argument(kw_only=False, check=UNWEIGHTED, metavar="MODEL...")
    data: StrPath | Sequence[StrPath] = option(
        check=FILES,
        metavar="FILE",
        help="File of samples (.txt, .jsonl or .parquet), or a folder that datasets wrote; repeat "
        "for several.",
    )
    adapters: Sources = option(
        default=(),
        check=WEIGHTED,
        flags=("--adapter",),
        metavar="ADAPTER[=W]",
        help="Measure each model with this adapter on it too; repeat for several.",
    )
    against: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="REFERENCE",
        help="Measure the distance from this model's predictions too.",
    )
    out: StrPath | None = option(
        default=None, check=FILE, metavar="FILE.json", help="File to write the results to."
    )
    resume: bool = option(
        default=False, check=FLAG, help="Continue an interrupted run.", needs="out"
    )
    overwrite: bool = option(
        default=False, check=FLAG, help="Replace an earlier file of results.", needs="out"
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


score = function_of(Score)
