"""arrow: stack experts once, with the prototypes that route tokens to them (Arrow,
arXiv:2405.11157), as files."""

from adapterkit.core.options import (
    ABOVE_0,
    COMPAT,
    COUNT,
    SEED,
    UNWEIGHTED,
    Sources,
    argument,
    option,
    record,
)
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import factor_dtype_option


@record
class Arrow(WritingVerb):
    """Stack adapters as the experts of an Arrow router: per module a (E, r, in), b (E, out, r),
    scale (E), prototype (E, in).

    `out` contains `arrow.safetensors` (`<module>.a`, `.b`, `.scale`, `.prototype`, and `.expert`,
    the experts' numbers, if some lack the module) and `arrow.json` (format, top_k, temperature,
    experts, general, sources). A prototype is the top right singular vector of b@a, from the
    factors' small core in float64, written in float32: its element of largest magnitude is
    positive; it is zero for an untrained expert. Smaller ranks are padded with zeros. `general`
    adapters are subtracted first, exactly (the rank grows); the scale is then 1. `compat="peft"`:
    PEFT's power iteration (15 steps from `seed`) and its subtraction of factor means. Routing takes
    the `top_k` largest |x·p| (default: 3, or the number of experts if smaller) and a softmax at
    `temperature`. Raises `Refused` before anything is written."""

    planner = "verbs.combine.planning.arrow:plan_arrow"
    command = """Stack adapters as experts with a router (Arrow).

    \b
    Example:
      adapterkit arrow ./law ./medicine ./code --out experts
      adapterkit arrow ./law ./medicine ./code --general ./english --top-k 2 --out experts
    """

    adapters: Sources = argument(kw_only=False, check=UNWEIGHTED, metavar="ADAPTER...")
    general: Sources = option(
        default=(),
        check=UNWEIGHTED,
        metavar="ADAPTER",
        help="Adapter to subtract from all experts first; repeat for several.",
    )
    top_k: int | None = option(
        default=None,
        check=COUNT,
        help="Number of experts per token (default: 3, or all if there are fewer).",
    )
    temperature: float = option(
        default=1.0, check=ABOVE_0, help="Temperature of the softmax over the selected experts."
    )
    compat: str | None = option(
        default=None,
        check=COMPAT,
        help="Compute prototypes by power iteration and subtract factor means, as PEFT does.",
    )
    seed: int | None = option(
        default=None, check=SEED, help="Seed of --compat peft (default: 0).", needs="compat=peft"
    )
    dtype: str = factor_dtype_option()


arrow = function_of(Arrow)
