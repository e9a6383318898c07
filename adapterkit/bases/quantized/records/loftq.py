"""loftq: quantize a base and compute the adapter that compensates the loss (LoftQ,
arXiv:2310.08659)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.core.options import (
    COUNT,
    FUNCTION,
    SOURCE,
    TEXTS,
    StrPath,
    argument,
    integer_of,
    option,
    record,
)
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    BlockOptions,
    ScaleOptions,
    covariances_option,
    factor_dtype_option,
    targets_option,
)

if TYPE_CHECKING:
    from adapterkit.bases.quantized.loftq import Accept


@record
class Loftq(WritingVerb, ScaleOptions, BlockOptions):
    """Initialize a quantized base and an adapter together: W ≈ Q + scale·b@a, weight by weight.

    Alternates Q = encode(W - scale·b@a) and the best scale·b@a of W - Q, `iterations` times; of all
    rounds, plain quantization included, the one with the smallest ‖W - Q - scale·b@a‖_F is kept.
    `OUT/base` is the packed base (`bits` 4: nf4, with `double_quant`; 8: int8), which transformers
    loads directly, and `OUT/adapter` the adapter for it. `bits_for`: `REGEX=BITS`, other bits for
    modules whose name, or the end of it, matches; bitsandbytes has one width for a model, so the
    base is then compressed-tensors' (w4a16, w8a16). `targets`: the modules that get factors:
    `all-linear`, comma-separated ends of names, or a regex for whole names (default: every
    quantized module). scale is alpha / rank (alpha / √rank with `rslora`); alpha is the rank by
    default. The receipt has each module's relative error before and after. Raises `Refused` before
    anything is written.

    `stats`: a safetensors file with `<module>.covariance`, E[x xᵀ] of the inputs of each module
    that gets factors (CorDA's, unscaled or scaled). Factors and round are then chosen by the error
    of the outputs, ‖(W - Q - scale·b@a) C^½‖_F, which the receipt has too; `damping` was added to
    C, relative to its diagonal's mean.

    With `quantized_base`, a quantized checkpoint of the same base, Q does not change, and `OUT` is
    the adapter alone, from one step on W - decode(Q). `accept(module, a, b)` then decides for each
    module, in the order of the file, whether its factors are kept; if not, b is zero.

    Unlike PEFT: the scale is respected (PEFT leaves it out, so that only scale 1 is right), the
    base is written packed, and the best round is kept, not the last.
    """

    planner = "bases.quantized.planning.loftq:plan_loftq"
    command = """Quantize a base and fit an adapter to its error (LoftQ).

    W ≈ Q + scale·b@a. The quantized base is written to DIR/base, the adapter to train to
    DIR/adapter.

    \b
    Example:
      adapterkit loftq ./model --rank 16 --out loftq
      adapterkit loftq ./model --rank 16 --bits-for "down_proj|layers[.]0[.].*=8" --out loftq
      adapterkit loftq ./model --quantized-base ./model-nf4 --rank 16 --out adapter
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    bits: int = option(
        default=4, check=integer_of(4, 8), help="Number of bits: 4 for nf4, 8 for int8."
    )
    bits_for: Sequence[str] = option(
        default=(),
        check=TEXTS,
        metavar="REGEX=N",
        help="Use another number of bits for modules whose name, or the end of it, matches, for "
        "example down_proj=8; writes compressed-tensors.",
        excludes=("quantized_base",),
    )
    iterations: int = option(
        default=4, check=COUNT, help="Number of iterations; the best one is kept."
    )
    targets: str | Sequence[str] | None = targets_option("all quantized modules")
    quantized_base: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="QBASE",
        help="Keep this quantized version of BASE and write only the adapter for it.",
    )
    stats: StrPath | None = covariances_option()
    accept: "Accept | None" = option(default=None, check=FUNCTION, needs="quantized_base")
    dtype: str = factor_dtype_option()


loftq = function_of(Loftq)
