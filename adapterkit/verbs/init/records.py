"""init: create an adapter by any method, and for some methods the residual base. rebase: turn such
an adapter, trained, into standard LoRA on the original base."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.core.options import SOURCE, TEXT, TEXTS, StrPath, argument, choice, option, record
from adapterkit.core.registry import declarations, written_formats
from adapterkit.core.shared_options import (
    QUANTIZED,
    base_option,
    modules_option,
    seed_option,
    settings_option,
    statistics_option,
)
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    EXACT_BY_DEFAULT,
    FOR_AMBIGUOUS_PARAMETERS,
    BlockOptions,
    ScaleOptions,
    energy_option,
    factor_dtype_option,
    rank_option,
    targets_option,
)

MATCHING = "Use another {} for modules whose name, or the end of it, matches."


@record
class Init(WritingVerb, ScaleOptions, BlockOptions):
    """Initialize an adapter on a base: `OUT/adapter`, and for methods that take a component out of
    each weight also `OUT/base`, the residual W' = W - scale·b@a.

    `method`: zero deltas (default, gaussian, orthogonal, mica), random factors (random), components
    of the weights (pissa, arXiv:2404.02948; olora, arXiv:2406.01775; milora, arXiv:2406.09044), or
    from statistics (corda, arXiv:2406.05223; eva, arXiv:2410.07170; lora_ga, arXiv:2407.05000).
    `stats`: the file of `adapterkit.stats`. `settings`: the method's own options, by PEFT's names.

    `targets`, by PEFT's rule: `all-linear`, ends of modules' names separated by commas, or a regex
    for whole names; by default PEFT's for the model's type. `exclude`: such ends, or a regex;
    `layers`: numbers and ranges, `0-11,20`. scale is alpha / rank (alpha / √rank with `rslora`);
    alpha is the rank by default. `rank_for`, `alpha_for`: texts `REGEX=N`, other values for the
    modules whose name, or the end of it, matches; the first match counts.

    `residual`: `write` the residual base, or `implicit`: no base is written, the initial factors
    are in `OUT/adapter/initial`, and `adapterkit.merge` onto the original subtracts them. The
    residual is computed from the factors as written. `quantize`, a format of `adapterkit.quantize`:
    the residual is written quantized (QPiSSA), and the receipt compares each weight's relative
    error with that of direct quantization; weights without factors are quantized directly, those
    that `skip` matches not at all. To use a trained adapter on the original afterwards: `adapterkit
    rebase TRAINED --initial OUT/adapter`. Raises `Refused` before anything is written.

    Unlike PEFT: the base is never loaded, layers on which a method is not defined are refused, and
    no setting of the saved adapter makes PEFT change a base again."""

    tier = "core"
    planner = "verbs.init.plan:plan_init"
    needs = dict.fromkeys(("skip", "block_size", "double_quant"), "quantize")
    command = """Initialize an adapter for training on a base.

    The adapter is written to DIR/adapter. Methods that move a share of each weight into the
    adapter, for example PiSSA, also write the residual base to DIR/base.

    \b
    Example:
      adapterkit init ./model --method gaussian --rank 16 --targets all-linear --out start
      adapterkit init ./model --method pissa --rank 16 --out pissa
      adapterkit init ./model --method olora --rank 16 --residual implicit --out olora
      adapterkit init ./model --method pissa --rank 16 --quantize nf4 --double-quant --out qpissa
      adapterkit init ./model --method eva --rank 16 --stats stats.safetensors --out eva
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    method: str = option(
        check=choice(lambda: declarations("inits")), help="Initialization method, listed below."
    )
    rank_for: Sequence[str] = option(
        default=(), check=TEXTS, metavar="REGEX=N", help=MATCHING.format("rank")
    )
    alpha_for: Sequence[str] = option(
        default=(), check=TEXTS, metavar="REGEX=A", help=MATCHING.format("lora_alpha")
    )
    targets: str | Sequence[str] | None = targets_option("PEFT's for the model's type")
    exclude: str | Sequence[str] | None = modules_option("Modules that get no factors")
    layers: str | None = option(
        default=None,
        check=TEXT,
        metavar="N-M,N",
        help="Only targets in these layers, for example 0-11,20.",
    )
    stats: StrPath | None = statistics_option(
        "File of `adapterkit stats`, needed for corda, eva and lora_ga."
    )
    settings: Mapping[str, Any] | None = settings_option()
    seed: int = seed_option()
    residual: str = option(
        default="write",
        check=choice(("write", "implicit")),
        help="Write the residual base, or keep the original base and store the initial factors "
        "(implicit).",
    )
    quantize: str | None = option(
        default=None,
        check=choice(written_formats),
        help="Quantize the residual base, for example to nf4 (QPiSSA).",
        section=QUANTIZED,
    )
    dtype: str = factor_dtype_option()


@record
class Rebase(WritingVerb):
    """Turn an adapter that was initialized by PiSSA, OLoRA, CorDA or LoRA-GA into standard LoRA on
    the original base.

    Its base was W - s₀·b₀@a₀, and `initial` contains a₀ and b₀ (the adapter as saved before
    training; by default those stored with an adapter of `init` with `residual="implicit"`). On W
    the delta is therefore s·b@a - s₀·b₀@a₀: exact at twice the rank; `rank` or `energy` refits it.
    Unlike PEFT's `path_initial_model_for_weight_conversion` it keeps embeddings, biases,
    magnitudes, trained modules and token rows, and works with patterns and rsLoRA. `base` resolves
    parameters of `target_parameters` if the files are ambiguous. Raises `Refused` before anything
    is written."""

    planner = "verbs.init.rebase:plan_rebase"
    command = """Convert a PiSSA-like adapter to LoRA on the original base.

    Δ' = s·b@a - s₀·b₀@a₀, for adapters initialized by PiSSA, OLoRA, CorDA or LoRA-GA.

    \b
    Example:
      adapterkit rebase ./pissa-trained --initial ./pissa-init --out plain
    """

    adapter: StrPath = argument(kw_only=False, check=SOURCE)
    initial: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="ADAPTER",
        help="The adapter as it was before training (default: ADAPTER/initial, which init "
        "--residual implicit writes).",
    )
    base: StrPath | None = base_option(FOR_AMBIGUOUS_PARAMETERS)
    rank: int | None = rank_option(EXACT_BY_DEFAULT)
    energy: float | None = energy_option()
    dtype: str = factor_dtype_option()


init = function_of(Init)
rebase = function_of(Rebase)
