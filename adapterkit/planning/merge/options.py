"""The options of a merge that its plan depends on."""

from adapterkit.options import COMPAT, FLAG, choice, option, record
from adapterkit.shared_options import (
    ModuleFilters,
    dtype_option,
    seed_option,
    shard_size_option,
)


@record
class MergeOptions(ModuleFilters):
    """How adapters become part of a base."""

    dtype: str | None = dtype_option(
        "Cast floating-point tensors (default: keep the base's dtypes)."
    )
    max_shard_size: str | int | None = shard_size_option()
    tied: str = option(
        default="untie",
        check=choice(("untie", "fold", "refuse")),
        help="If only one of two tied embeddings changes: write two weights, change the shared one "
        "(as PEFT does in memory), or refuse.",
    )
    base_is_residual: bool = option(
        default=False,
        check=FLAG,
        help="BASE is the residual base that came with a PiSSA-like adapter.",
    )
    base_copies: str | None = option(
        default=None,
        check=choice(("ignore", "adapter")),
        help="If an adapter's copy of the base's embedding differs from BASE's: ignore the copy, "
        "or use the adapter's.",
    )
    compat: str | None = option(
        default=None,
        check=COMPAT,
        help="PEFT's rounding, and its order of several adapters.",
        needs="rounding=nearest",
    )
    expert_layout: str | None = option(
        default=None,
        check=choice(("peft-0.18", "peft-0.19")),
        help="PEFT version that saved the adapter (only for square expert weights).",
    )
    tokenizer: str | None = option(
        default=None,
        check=choice(("base", "adapter")),
        help="Tokenizer of the output (default: the adapter's, if it has one).",
    )
    dequantize: bool = option(
        default=False,
        check=FLAG,
        help="Write a quantized base's weights as 16-bit floats (default: keep the format).",
    )
    rounding: str = option(
        default="nearest",
        check=choice(("nearest", "stochastic", "compensated")),
        help="Rounding of changed weights; stochastic: unbiased, so that small deltas survive; "
        "compensated: errors carried on, so that outputs change least.",
    )
    seed: int = seed_option(
        "Seed of stochastic rounding: same seed, same bytes.", needs="rounding=stochastic"
    )
