"""subtract: remove the knowledge of general adapters from task adapters (GenKnowSub, ACL 2025 short
54): Δ' = Δ - mean of the general Δ."""

from collections.abc import Sequence

from adapterkit.core.options import UNWEIGHTED, Sources, StrPath, argument, choice, option, record
from adapterkit.core.shared_options import base_option, modules_option
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    EXACT_BY_DEFAULT,
    FOR_AMBIGUOUS_PARAMETERS,
    adapter_output_option,
    energy_option,
    factor_dtype_option,
    rank_option,
    tokenizer_option,
)


@record
class Subtract(WritingVerb):
    """Subtract the mean of general adapters from each task adapter: Δ' = scale·b@a - (1/G) Σ
    scale_g·b_g@a_g.

    One task adapter is written to `out`, several to `out/<folder name>`. In delta space the result
    is exact, of rank r·(1+G) unless `rank` or `energy` refits it; a module that a general adapter
    lacks counts as zero there, and one that the task lacks is added. `space="factors"` subtracts
    the means of a and b separately, as PEFT does (cross terms; scales of the general adapters
    ignored), and keeps the rank. Modules that `exclude` names (ends of names, or a regular
    expression for whole names) keep the task's values, for example a head that a general adapter
    trained fully. Factors are written in `dtype`, scale 1. `base` resolves parameters of
    `target_parameters` if the files are ambiguous. Raises `Refused` before anything is written.

    For adapters of several components of an image pipeline (unet, text_encoder, ...), module names
    begin with the component, whose name alone means all its modules. The output has the layout of
    the first one, also if `out` ends in .safetensors."""

    planner = "verbs.combine.planning.subtract:plan_subtract"
    command = """Subtract general adapters from specialized ones (GenKnowSub).

    It removes what the general adapters learned, too: each adapter becomes
    Δ' = Δ - mean Δ_general.

    \b
    Example:
      adapterkit subtract ./medicine --general ./english --general ./french --out medicine-only
      adapterkit subtract ./law ./medicine --general ./english --rank 16 --out purified
    The second writes purified/law and purified/medicine.
    """

    adapters: Sources = argument(kw_only=False, check=UNWEIGHTED, metavar="ADAPTER...")
    general: Sources = option(
        check=UNWEIGHTED,
        metavar="ADAPTER",
        help="Adapter of the general skills to remove; repeat for several.",
    )
    base: StrPath | None = base_option(FOR_AMBIGUOUS_PARAMETERS)
    space: str = option(
        default="delta",
        check=choice(("delta", "factors")),
        help="Subtract the deltas, which is exact, or the means of a and b separately, as PEFT "
        "does.",
    )
    exclude: str | Sequence[str] | None = modules_option("Do not change these modules")
    rank: int | None = rank_option(EXACT_BY_DEFAULT)
    energy: float | None = energy_option()
    tokenizer: str | None = tokenizer_option()
    dtype: str = factor_dtype_option()
    out: StrPath = adapter_output_option()


subtract = function_of(Subtract)
