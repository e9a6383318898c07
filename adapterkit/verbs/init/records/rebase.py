"""rebase: an adapter whose initialization changed the base becomes plain LoRA on the original base:
Δ' = s·b@a - s₀·b₀@a₀."""

from adapterkit.core.options import SOURCE, StrPath, argument, option, record
from adapterkit.core.shared_options import (
    EXACT_BY_DEFAULT,
    FOR_AMBIGUOUS_PARAMETERS,
    base_option,
    energy_option,
    factor_dtype_option,
    rank_option,
)
from adapterkit.core.verb import WritingVerb, function_of


@record
class Rebase(WritingVerb):
    """Turn an adapter that was initialized by PiSSA, OLoRA, CorDA or LoRA-GA into plain LoRA on the
    original base.

    Its base was W - s₀·b₀@a₀, `initial` holds a₀ and b₀ (the adapter as saved before training; by
    default those beside an adapter of `init` with `residual="implicit"`), so on W the delta is
    s·b@a - s₀·b₀@a₀: exact at twice the rank; `rank` or `energy` refits it.
    Unlike PEFT's `path_initial_model_for_weight_conversion` it keeps embeddings, biases,
    magnitudes, trained modules and token rows, and works with patterns and rsLoRA. `base` tells
    parameters of `target_parameters` apart where the files do not. Raises `Refused` before anything
    is written.
    """

    planner = "verbs.init.planning.rebase:plan_rebase"
    command = """Turn a PiSSA-like adapter into LoRA on the original base.

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
        help="The same adapter as saved before training (default: ADAPTER/initial, of init "
        "--residual implicit).",
    )
    base: StrPath | None = base_option(FOR_AMBIGUOUS_PARAMETERS)
    rank: int | None = rank_option(EXACT_BY_DEFAULT)
    energy: float | None = energy_option()
    dtype: str = factor_dtype_option()


rebase = function_of(Rebase)
