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

    Each adapter is a folder or a Hub id and may have a weight: `PATH=0.7`, a pair `(path, 0.7)`, or
    an item of a mapping `{path: 0.7}`. `space="delta"`: the method acts on the deltas; `"factors"`:
    on a and b separately, as PEFT's `add_weighted_adapter` does (sign and root of each weight on
    both, with cross terms). Refit: `rank`, or `energy` (the smallest rank of each module that keeps
    this share of the squared singular values). With neither, methods on factors are exact (the
    ranks add up) and methods on elements keep the inputs' largest rank. `base` resolves parameters
    of `target_parameters` if the files, which name only their nesting, are ambiguous. Factors are
    computed in float64 (dense deltas in float32), written in `dtype`. Raises `Refused` before
    anything is written.

    `stats`: safetensors files with `<module>.covariance`, E[x xᵀ] of the inputs of each linear
    layer with factors; one for all adapters, or one for each in their order. The refit is then the
    best in the norm of the layers' outputs, by the mean of the covariances, as in `resize`;
    `regmean` needs one for each. Embeddings, convolutions and parameters are fitted in the norm of
    their weights, and `regmean` combines them like `mean`; a note says so.

    `data`, instead of `stats`: files of samples, one for each adapter in their order. `regmean`
    then takes the inputs of the combined model (RegMean++, arXiv:2508.03121), layer after layer.
    Each layer's covariances are taken with one adapter at a time in that layer alone, on that
    adapter's samples after the combined layers before it; then the layer is combined and the
    samples pass through it. This is for text models with a list of layers, and LoRAs of linear
    layers in it.

    A DoRA's delta depends on the weights that it was trained on. With `base` it is m·(W +
    scale·b@a)/‖W + scale·b@a‖ - W, dense, so that the result is a standard LoRA and needs a rank;
    without `base`, DoRA is refused. Fully trained values (modules_to_save, token rows, biases) are
    taken from the one adapter of weight 1 that has them. Those of several adapters are averaged if
    the method is a weighted sum (linear, mean, ema) whose shares among them add up to 1, else
    refused unless they are equal.

    In delta space an adapter of weight 0 is ignored: weights (1, 0) give the method's result for
    the first one alone. That is its delta, unless the method changes a single one too: iso_c and
    similar methods equalize even its singular values, and a density below 1 (ties, knots, dare,
    ...) drops elements of it. For slerp, the weights set the position on the arc and the length.

    `weights`: a file of weights (docs/which-weights.md), one for each adapter, module or singular
    triplet of a module's delta; it names its adapters, which may be omitted. `fit`: samples, by
    which `fit` chooses the weights first (OUT.weights.json); a dry run plans without them.

    For adapters of several components of an image pipeline (unet, text_encoder, ...), module names
    begin with the component. The output has the layout of the first one, also if `out` ends in
    .safetensors.

    A tokenizer stored with the adapters is copied, and refused if their tokens differ;
    `tokenizer="base"` copies none.

    Unlike PEFT, this is right for rsLoRA scales, different ranks and patterns, and modules that
    some adapters lack."""

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
      adapterkit combine a b --method regmean --stats a.safetensors --stats b.safetensors -o sum
      adapterkit combine a b --method regmean --base BASE --data a.jsonl --data b.jsonl -o sum
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
        return "verbs.combine.regmean_layerwise:plan_layerwise" if self.data else self.planner

    def run(self) -> "Receipt | Plan":
        if self.fit and not self.dry_run:
            return load("verbs.fit.fit:combine_fitted")(self)
        return super().run()


combine = function_of(Combine)
