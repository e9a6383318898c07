"""combine: merge several adapters into one. Three choices: the method; its space (deltas, or PEFT's
factors); the refit of the result (exact, a rank, a share of the energy)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterkit.core.options import (
    COUNT,
    FILES,
    SHARE_ABOVE_0,
    SOURCES,
    WEIGHTED,
    Sources,
    StrPath,
    argument,
    choice,
    option,
    record,
)
from adapterkit.core.registry import declarations, load
from adapterkit.core.shared_options import (
    SEVERAL,
    MethodOptions,
    base_option,
    seed_option,
    weight_for_option,
    weights_option,
)
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.combine.methods import ALIASES
from adapterkit.verbs.shared.options import (
    adapter_output_option,
    energy_option,
    factor_dtype_option,
    length_option,
    rank_option,
    tokenizer_option,
)

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan
    from adapterkit.core.receipt import Receipt

INPUTS = "Statistics of the layers' inputs"


@record
class Combine(WritingVerb, MethodOptions):
    """Combine adapters into one: Δ' = method(w₁Δ₁, w₂Δ₂, ...), Δᵢ = scaleᵢ·bᵢ@aᵢ, written as
    factors of scale 1.

    Each adapter is a folder or a Hub id and may carry a weight: `PATH=0.7`, a pair `(path, 0.7)`,
    or an item of a mapping `{path: 0.7}`. `space="delta"`: the method acts on the deltas;
    `"factors"`: on a and b apart, as PEFT's `add_weighted_adapter` does (sign and root of each
    weight on both, cross terms and all). Refit: `rank`, or `energy` (the smallest rank of each
    module that keeps this share of the squared singular values); with neither, methods on factors
    are exact (the ranks add up) and methods on elements keep the inputs' largest rank. `base` tells
    parameters of `target_parameters` apart where the files, which name their nesting only, do not.
    Factors are computed in float64 (dense deltas in float32), written in `dtype`. Raises `Refused`
    before anything is written.

    `stats`: safetensors files with `<module>.covariance`, E[x xᵀ] of what each linear layer with
    factors saw; one for all adapters, or one for each in their order. Then the refit is the best in
    the norm of the layers' outputs, by the mean of the covariances, as in `resize`; `regmean` needs
    one for each. Embeddings, convolutions and parameters are fitted in the norm of their weights,
    by `regmean` combined as by `mean`, which a note says.

    `data`, in the place of `stats`: files of samples, one for each adapter in their order. Then
    `regmean` takes the inputs of the combined model (RegMean++, arXiv:2508.03121): it runs layer
    after layer, each layer's covariances are taken with one adapter after the other in that layer
    alone, on what the combined layers before make of that adapter's samples, and the layer is
    combined before the samples go on. Of models of texts in a list of layers, and LoRAs of linear
    layers inside it.

    A DoRA's delta depends on the weights that it was trained on: with `base` it is
    m·(W + scale·b@a)/‖W + scale·b@a‖ - W, dense, so that the result is a plain LoRA of a rank that
    has to be given; without, DoRA is refused. Values that were trained whole (modules_to_save,
    token rows, biases) are taken from the one adapter of weight 1 that has them; several adapters'
    are averaged where the method is a weighted sum (linear, mean, ema) whose shares among them add
    up to 1, else refused unless they are equal.

    An adapter of weight 0 takes no part in delta space: weights (1, 0) give what the method makes
    of the first one alone. That is its delta, unless the method changes a single one too: iso_c and
    its like even its singular values out, and a density below 1 (ties, knots, dare, ...) drops some
    of it.
    Of slerp the weights say where on the arc the result lies, and how long it is.

    `weights`: a file of weights (docs/which-weights.md), one for each adapter, module or singular
    triplet of a module's delta; the adapters are those of the file and may be left out. `fit`:
    samples, by which the verb of that name chooses the weights first (OUT.weights.json); a dry run
    plans without them.

    Of adapters of several parts of an image model's pipeline (unet, text_encoder, ...) the names of
    modules have the part's in front, and the output is in the layout of the first one; so is that
    to an `out` that ends in .safetensors.

    A tokenizer beside the adapters is copied, and refused where they differ in what makes tokens;
    `tokenizer="base"` copies none.

    Unlike PEFT: rsLoRA scales, differing ranks and patterns, and modules that some adapters lack
    are right.
    """

    tier = "core"
    planner = "verbs.combine.planning.combine:plan_combine"
    command = """Combine several adapters into one.

    Δ' = method(w₁Δ₁, w₂Δ₂, ...), written as factors of scale 1.

    The weights of slerp are the position on the arc: 0.7 and 0.3 are --set t=0.3. PEFT's linear
    and ties act on a and b separately: add --space factors for that.

    \b
    Example:
      adapterkit combine ./english ./french=0.5 --method linear --out both
      adapterkit combine ./a ./b ./c --method ties --density 0.2 --rank 32 --out merged
      adapterkit combine ./a ./b --method regmean --stats a.safetensors --stats b.safetensors
      adapterkit combine ./a ./b --method regmean --base BASE --data a.jsonl --data b.jsonl
    """

    adapters: Sources = argument(
        kw_only=False, default=(), check=WEIGHTED, metavar="ADAPTER[=W]...", unless="weights"
    )
    method: str = option(
        default="linear",
        check=choice(lambda: (*declarations("combinations"), *ALIASES)),
        help="Method that combines the deltas, listed below.",
        metavar="NAME",
    )
    base: StrPath | None = base_option(
        "The adapters' base, needed for DoRA, and if target_parameters are ambiguous."
    )
    space: str = option(
        default="delta",
        check=choice(("delta", "factors")),
        help="Combine the deltas scale·b@a, or a and b separately as PEFT does, which adds cross "
        "terms.",
    )
    rank: int | None = rank_option()
    energy: float | None = energy_option()
    svd_clamp: float | None = option(
        default=None,
        check=SHARE_ABOVE_0,
        metavar="Q",
        help="Clamp the factors at this quantile of their elements, as PEFT does.",
    )
    stats: Iterable[StrPath] = option(
        default=(),
        check=SOURCES,
        metavar="FILE",
        help="Statistics with covariances of the layers' inputs, to minimize the error of the "
        "outputs: one file for all adapters, or one for each in their order (regmean).",
        section=INPUTS,
    )
    data: Iterable[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE",
        needs="base",
        excludes=("stats",),
        help="File of samples of each adapter, in their order, to collect covariances while the "
        "model is combined layer by layer (regmean).",
        section=INPUTS,
        tier="experimental",
    )
    samples: int = option(
        default=256,
        check=COUNT,
        needs="data",
        help="Number of samples to draw from each --data.",
        section=INPUTS,
    )
    length: int | None = length_option(needs="data", section=INPUTS)
    weight_for: Iterable[str] = weight_for_option()
    weights: StrPath | None = weights_option()
    fit: Iterable[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE[=SHARE]",
        help="Fit the weights to these samples first, with the defaults of `adapterkit fit`, and "
        "write them to OUT.weights.json.",
        needs="base",
        excludes=("weights", "weight_for", "data"),
        section=SEVERAL,
    )
    seed: int = seed_option(section=SEVERAL)
    tokenizer: str | None = tokenizer_option()
    dtype: str = factor_dtype_option()
    out: StrPath = adapter_output_option()

    @property
    def planned_by(self) -> str:
        return "verbs.combine.regmean_layerwise:plan_recollected" if self.data else self.planner

    def run(self) -> "Receipt | Plan":
        if self.fit and not self.dry_run:
            return load("verbs.fit.fit:combine_fitted")(self)
        return super().run()


combine = function_of(Combine)
