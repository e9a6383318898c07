"""stats: collect statistics of the inputs of a model's linear layers on data, for initializing,
quantizing or refitting."""

from collections.abc import Sequence

from adapterkit.core.options import (
    COMPAT,
    COUNT,
    FILES,
    SOURCE,
    OptionRecord,
    StrPath,
    argument,
    kinds,
    option,
    record,
)
from adapterkit.core.shared_options import OUTPUT_FILE, seed_option
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    activations_option,
    length_option,
    targets_option,
    whole_option,
)


@record
class StatsOptions(OptionRecord):
    """The statistics and samples to collect."""

    what: str | Sequence[str] = option(
        default=("covariance",),
        check=kinds(("covariance", "mean", "pca", "gradient")),
        metavar="KINDS",
        help="Statistics to collect, separated by commas: covariance, mean, pca, gradient.",
    )
    samples: int = option(default=256, check=COUNT, help="Number of samples to draw.")
    length: int | None = length_option()
    targets: str | Sequence[str] | None = targets_option("all-linear", "Modules to measure")
    batch: int = option(default=8, check=COUNT, help="Samples per batch.")
    seed: int = seed_option("Seed for drawing the samples.")
    whole_model: bool = whole_option()
    components: int = option(
        default=256, check=COUNT, help="Number of principal components of each module (pca)."
    )
    compat: str | None = option(
        default=None,
        check=COMPAT,
        help="Divide the inputs by their largest value, as PEFT does for CorDA.",
    )


@record
class Stats(WritingVerb, StatsOptions):
    """Collect statistics of the inputs of a model's linear layers on some texts, one layer of the
    model in memory at a time.

    `data`: files. `.txt`: paragraphs separated by blank lines, or else each line is a sample.
    `.jsonl`: each line is one, with `text`; or with `prompt` and `completion`, of which the
    completion's tokens count; or with `messages`, for the tokenizer's chat template, of which the
    assistant's count if the template marks them; or with `input_ids`, and `labels` which are -100
    if a token does not count. `.parquet`, or a folder of `datasets`: each row is one, of these
    columns. `samples` of them are drawn by `seed`, without replacement; each is cut to `length`
    tokens (default: 512, or the model's positions). Only the tokenizer's own tokens are added.

    `what`, texts or one with commas: covariance E[x xᵀ], mean E[x], pca (the leading `components`
    principal directions of the centered inputs, with their variances), gradient (dLoss/dW of the
    model's loss, the mean over the batches of `batch` samples). `targets`: `all-linear` (the
    default: all linear layers except the output), ends of modules' names separated by commas, or a
    regex. `whole_model`: run the whole model in memory, to the same numbers within rounding.
    `compat="peft"`: the covariance as PEFT's CorDA computes it, of inputs divided by their largest,
    one sample after the other regardless of `batch`. `memory`: bytes of activations in memory,
    beyond which they go to disk (default: a quarter of the machine's).

    `out` is one safetensors file that appears completely or not at all, here or in one commit to
    the Hub (hf://org/name[@branch]:path/file.safetensors), for which `disk_limit` bounds the local
    disk use. Its metadata describe its contents, and its receipt is next to it as
    NAME.adapterkit.json. Several processes share the samples (`write_plan`, `engine="ray"`). Raises
    `Refused` before anything is written; `Failed` for inputs that are not finite."""

    planner = "verbs.stats.plan:plan_stats"
    command = """Collect statistics of a model's layers on your texts.

    Covariances, means and principal components of the layers' inputs, and gradients, for example
    for `init --method eva` and every --stats option. The model runs one layer at a time.

    \b
    Example:
      adapterkit stats ./model --data texts.jsonl --out stats.safetensors
      adapterkit stats ./model --data chats.jsonl --what pca,gradient --out stats.safetensors
      adapterkit stats org/model --data texts.jsonl --out hf://me/statistics:model.safetensors
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    data: StrPath | Sequence[StrPath] = option(
        check=FILES,
        metavar="FILE",
        help="File of samples (.txt, .jsonl or .parquet), or a folder that datasets wrote; repeat "
        "for several.",
    )
    out: StrPath = option(
        check=OUTPUT_FILE,
        metavar="FILE.safetensors|hf://ORG/NAME:FILE.safetensors",
        help="Output file, or a file on the Hub. It appears when it is complete.",
    )
    memory: str | int | None = activations_option()


stats = function_of(Stats)
