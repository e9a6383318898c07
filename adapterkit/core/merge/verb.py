"""Merge adapters into a base, W' = round(W + Σ weight·scale·b@a), streamed from files to files."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.options import (
    COMPAT,
    FILES,
    FLAG,
    SHARE_ABOVE_0,
    SOURCE,
    TEXT,
    TEXTS,
    WEIGHTED,
    OptionRecord,
    Sources,
    StrPath,
    argument,
    choice,
    option,
    record,
)
from adapterkit.core.records import Check
from adapterkit.core.registry import declarations, load
from adapterkit.core.shared_options import (
    GGUF,
    IMAGES,
    QUANTIZED,
    SEVERAL,
    MethodOptions,
    ModuleFilters,
    compensation_option,
    dtype_option,
    expert_layout_option,
    importance_option,
    model_output_option,
    modelfile_option,
    seed_option,
    shard_size_option,
    verify_option,
    weight_for_option,
    weights_option,
)
from adapterkit.core.verb import WritingVerb, function_of, push_option
from adapterkit.doors import MERGES

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan
    from adapterkit.core.receipt import Receipt

CHOICE = Check("entries", lambda value: load(MERGES["entries"])(value), several=True)

WRITTEN_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k",
    "q2_k", "iq4_nl", "iq4_xs", "mxfp4", "tq1_0", "tq2_0",
)  # fmt: skip


@record
class PlainMergeOptions(ModuleFilters, MethodOptions):
    """Options of merges into any base."""

    dtype: str | None = dtype_option(
        "Dtype of the floating-point tensors (default: the base's dtypes)."
    )
    max_shard_size: str | int | None = shard_size_option()
    tied: str = option(
        default="untie",
        check=choice(("untie", "fold", "refuse")),
        help="If only one of two tied embeddings changes, write two weights (untie), change the "
        "shared one as PEFT does in memory (fold), or refuse.",
    )
    base_is_residual: bool = option(
        default=False,
        check=FLAG,
        help="BASE is the residual base that was written with the adapter, for example by PiSSA.",
    )
    embedding_copies: str | None = option(
        default=None,
        check=choice(("ignore", "adapter")),
        help="If an adapter's copy of an embedding differs from BASE's, ignore the copy or use it "
        "(adapter).",
    )
    compat: str | None = option(
        default=None,
        check=COMPAT,
        help="Round as PEFT does, after each of several adapters.",
        needs="rounding=nearest",
    )
    expert_layout: str | None = expert_layout_option()
    tokenizer: str | None = option(
        default=None,
        check=choice(("base", "adapter")),
        help="Tokenizer of the output (default: the adapter's, if it has one).",
    )


def merge_methods() -> list[str]:
    """Names of the methods that need only the adapters."""
    known = declarations("combinations").items()
    return [name for name, one in known if one.constants["acts_on"] != "covariances"]


@record
class QuantizedMergeOptions(OptionRecord):
    """Options of rounding changed weights, and of writing quantized ones."""

    section = QUANTIZED

    dequantize: bool = option(
        default=False,
        check=FLAG,
        help="Write the weights of a quantized base as 16-bit floats (default: keep the format).",
    )
    rounding: str = option(
        default="nearest",
        check=choice(("nearest", "stochastic", "compensated")),
        help="Rounding of changed weights. stochastic is unbiased, so that small deltas survive "
        "on average; compensated corrects errors in later inputs, so that outputs change "
        "least.",
    )


@record
class MethodMergeOptions(OptionRecord):
    """Options of combining the deltas of several adapters, with other values for some modules."""

    section = SEVERAL
    needs = dict.fromkeys(("density", "majority", "settings"), "method")

    method: str | None = option(
        default=None,
        check=replace(choice(partial(declarations, "combinations")), words=merge_methods),
        metavar="NAME",
        help="Method that combines the deltas, listed below (default: linear, their sum).",
        excludes=("compat",),
    )
    density_for: Iterable[str] = option(
        default=(),
        check=TEXTS,
        metavar="[N:]REGEX=D",
        help="Use another density (of the N-th adapter) for modules whose name, or the end of it, "
        "matches.",
        needs="method",
    )
    seed: int = seed_option(
        "Seed of stochastic rounding and of methods that use random numbers; the same seed "
        "gives the same bytes.",
        needs="rounding=stochastic or method or choose",
    )
    weight_for: Iterable[str] = weight_for_option()


@record
class GgufMergeOptions(OptionRecord):
    """Options of writing a GGUF model's tensors and the files next to it."""

    section = GGUF

    changed_type: str | None = option(
        default=None,
        check=choice(WRITTEN_TYPES),
        help="GGUF type of the tensors that change (default: the type that they have).",
    )
    gguf_scales: str | None = option(
        default=None,
        check=choice(("search", "keep")),
        help="Scales of the changed blocks of a GGUF model: search for the best ones (default), "
        "or keep the present ones where the new values fit.",
    )
    modelfile: bool = modelfile_option()


@record
class ImageMergeOptions(OptionRecord):
    """Options of an image model: the variant of its weights, and factors for its blocks."""

    section = IMAGES

    lbw: Iterable[str] = option(
        default=(),
        check=TEXTS,
        metavar="[N:]NAME|LIST|FILE",
        help="Block weights (of the N-th adapter) for an image model: a preset such as MIDD or "
        "ALL0.5, numbers separated by commas, FILE:NAME in a file of presets, or a JSON file "
        "of diffusers or ComfyUI.",
        contents="bases.images.block_weights:with_files",
    )
    variant: str | None = option(
        default=None,
        check=TEXT,
        metavar="NAME",
        help="Variant of a diffusers pipeline's weights, for example fp16 (default: the unnamed "
        "or only one).",
    )


@record
class MergeOptions(
    ImageMergeOptions,
    GgufMergeOptions,
    MethodMergeOptions,
    QuantizedMergeOptions,
    PlainMergeOptions,
):
    """All options of `merge`."""


@record
class Merge(WritingVerb, MergeOptions):
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a), each weight
    rounded once.

    `base` and each adapter are a folder, a file or a Hub id. `base` may also be a diffusers
    pipeline, whose components each get their share (`PART:PATH` assigns an adapter to a component).
    An adapter may carry a weight: `PATH=0.7`, a pair `(path, 0.7)`, or an item of a mapping `{path:
    0.7}`. Writes the folder `out`: a complete checkpoint in the base's own layout with a receipt
    (`adapterkit.json`). For a single-file base (GGUF, an image or video model), `out` is a file
    with its receipt next to it. Arithmetic is float32; float64 for weights that are written in
    float32. Returns the receipt, or with `dry_run` the plan. Raises `Refused` before anything is
    written and `Failed` after; the error's text has a hint.

    With `method` the deltas are combined as `combine` does, and added without a refit:
    W' = round(W + method(w₁Δ₁, w₂Δ₂, ...)), with full deltas in float32. If only some adapters have
    a module, their deltas are combined. `density_for` sets other densities for modules. For DoRA,
    biases of factors and regmean, combine first, then merge.

    `include` and `exclude` name modules as PEFT's `target_modules` does: by ends of names, or a
    regular expression for whole names.

    `weight_for` sets other weights for modules; in a pipeline, prefix them with the component's
    name. `lbw` gives factors of the weight for the blocks of an image model: a list of numbers as
    in sd-webui-lora-block-weight, one of its presets, `FILE:NAME` of a file of presets, or the
    settings of diffusers' `set_adapters` or ComfyUI's prefixes of names, as JSON or a JSON file.
    `weights` is a file of weights (docs/which-weights.md), one for each adapter, module or singular
    triplet of a module's delta. It names the adapters, so you may leave them out.

    `rounding="stochastic"` rounds changed weights up or down at random, so that the whole delta is
    kept on average; rounding to nearest loses changes below half a step. The draws depend on
    `seed`, the tensor and the element only. `rounding="compensated"` carries the rounding error of
    each input of a changed linear layer into the inputs that follow, so that ‖(W' - Q) C^½‖_F is
    small (GPTQ, arXiv:2210.17323). `stats` is the file with `<module>.covariance`, C = E[x xᵀ], of
    these layers. The scales are those of rounding to nearest, and other weights than linear layers'
    are rounded to nearest.

    PEFT stores copies of the base's embeddings with their factors. They are compared with the base:
    equal ones change nothing, others are refused unless `embedding_copies` says which counts,
    "ignore" (the base's own weight) or "adapter" (the copy, as in PEFT).

    `choose` names ways to round. Each is measured on the texts of `data` as it would be written,
    and the one of least loss per token is written; the receipt's `choices` has the table.

    `fail_below` is the share of the change that the median of the changed tensors has to keep. If
    rounding keeps less, the merge fails before anything is published. Without it, the receipt's
    `warnings` say how much is lost.

    Unlike PEFT's `merge_and_unload`, several adapters are added before a single rounding, tied
    embeddings that only one side changes are untied, attention's `out_proj` gets its delta once,
    and anything unknown is an error. `compat="peft"` keeps PEFT's roundings and order."""

    tier = "core"
    planner = "core.merge.plan:plan_merge_of"
    command = """Merge adapters into a base model.

    Each weight becomes W' = round(W + Σ weight·scale·b@a).

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit merge ./base ./style=0.7 ./skill=0.3 --out merged --verify
      adapterkit merge ./base ./a ./b=0.5 --method ties --density 0.2 --out merged
      adapterkit merge ./merged ./my-adapter=-1 --out unmerged
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    adapters: Sources = argument(
        kw_only=False, default=(), check=WEIGHTED, metavar="ADAPTER[=W]...", unless="weights"
    )
    weights: StrPath | None = weights_option()
    original: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="ORIGINAL",
        help="Merge into this 16-bit original of the quantized BASE.",
        section=QUANTIZED,
    )
    stats: StrPath | None = compensation_option("rounding=compensated or choose")
    out: StrPath = model_output_option()
    imatrix: StrPath | None = importance_option()
    verify: bool = verify_option()
    fail_below: float | None = option(
        default=None,
        check=SHARE_ABOVE_0,
        metavar="SHARE",
        help="Fail and publish nothing if rounding keeps less than this share of the change (the "
        "median over the changed tensors).",
        excludes=("rounding=compensated",),
        section=QUANTIZED,
    )
    push: str | None = push_option()
    choose: Iterable[str] = option(
        default=(),
        check=CHOICE,
        metavar="WAY,WAY,...",
        help="Measure each way on --data, and write the best: nearest, stochastic, compensated, "
        "touched-as=TYPE (--changed-type), base16 (into --original).",
        needs="data",
        excludes=("rounding", "changed_type"),
        section=QUANTIZED,
        tier="experimental",
    )
    data: StrPath | Iterable[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE",
        help="Texts for --choose, as for `adapterkit score`.",
        needs="choose",
        section=QUANTIZED,
    )

    def plan(self) -> "Plan":
        if self.choose:
            return load(MERGES["choice"])(self)
        plan = super().plan()
        if self.fail_below is None:
            return plan
        return replace(plan, warn=partial(plan.warn, fail_below=self.fail_below))

    def carry_out(self, plan: "Plan", *, push: bool = True) -> "Receipt | Plan":
        if self.choose and not self.dry_run:
            return load(MERGES["best"])(self, plan, push)
        return super().carry_out(plan, push=push)

    def check(self, plan: "Plan") -> Callable[[Path], object] | None:
        """Recompute rows of the finished folder, if `verify` is set."""
        return load("core.verify.row_checks:RowCheck")(plan) if self.verify else None


merge = function_of(Merge)
