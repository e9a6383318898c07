"""merge: adapters into a base, W' = round(W + Σ weight·scale·b@a), streamed from files to files."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.options import (
    COMPAT,
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

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan


WRITTEN_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k",
    "q2_k", "iq4_nl", "iq4_xs", "mxfp4", "tq1_0", "tq2_0",
)  # fmt: skip


@record
class PlainMergeOptions(ModuleFilters, MethodOptions):
    """How adapters become part of any base."""

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
    base_copies: str | None = option(
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


def _methods() -> list[str]:
    """Those that need nothing but the adapters."""
    known = declarations("combinations").items()
    return [name for name, one in known if one.constants["acts_on"] != "covariances"]


@record
class QuantizedMergeOptions(OptionRecord):
    """How changed weights are rounded, and quantized ones written."""

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
    """How the deltas of several adapters are combined, with other values for some modules."""

    section = SEVERAL
    needs = dict.fromkeys(("density", "majority", "settings"), "method")

    method: str | None = option(
        default=None,
        check=choice(_methods),
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
        needs="rounding=stochastic or method",
    )
    weight_for: Iterable[str] = weight_for_option()


@record
class GgufMergeOptions(OptionRecord):
    """How the tensors of a GGUF model are written, and what lies beside the file."""

    section = GGUF

    touched_as: str | None = option(
        default=None,
        check=choice(WRITTEN_TYPES),
        help="GGUF type of the tensors that change (default: the type that they have).",
    )
    scales: str | None = option(
        default=None,
        check=choice(("search", "keep")),
        help="Scales of the changed blocks of a GGUF model: search for the best ones (default), "
        "or keep the present ones where the new values fit.",
    )
    modelfile: bool = modelfile_option()


@record
class ImageMergeOptions(OptionRecord):
    """Which weights of an image model are meant, and how much each of its blocks gets."""

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
    """How adapters become part of a base."""


@record
class Merge(WritingVerb, MergeOptions):
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a), each weight
    rounded once.

    `base` and each adapter are a folder, a file or a Hub id, `base` also a pipeline of diffusers,
    whose parts each get their share (`PART:PATH` says for which one an adapter is). An adapter may
    carry a weight: `PATH=0.7`, a pair `(path, 0.7)`, or an item of a mapping `{path: 0.7}`. Writes
    the folder `out`: a complete checkpoint in the base's own layout with a receipt
    (`adapterkit.json`); of a base in one file (GGUF, an image or video model) the file `out`, its
    receipt beside it. Arithmetic is float32, float64 for weights that are written in float32.
    Returns the receipt, or with `dry_run` the plan. Raises `Refused` before anything is written and
    `Failed` after; see the errors' texts for the way out.

    With `method` the deltas are combined as `combine` does, and added without a refit:
    W' = round(W + method(w₁Δ₁, w₂Δ₂, ...)), dense deltas in float32; of a module that only some
    adapters have, their deltas. `density_for` has other densities for modules. DoRA, biases of
    factors and regmean need the other way: combine, then merge.

    `weight_for` has other weights for modules, of a pipeline with the part's name in front, `lbw`
    factors of the weight for the blocks of an image model: a list of numbers as
    sd-webui-lora-block-weight's, its preset, `FILE:NAME` of a file of presets, or the settings of
    diffusers' `set_adapters` or prefixes of names as ComfyUI's, as JSON or a file of it.
    `weights` is a file of weights (docs/which-weights.md), one for each adapter, module or singular
    triplet of a module's delta; the adapters are those of the file and may be left out.

    `rounding="stochastic"` rounds changed weights up or down at random, so that on average the
    whole delta stays, where nearest swallows what is below half a step; the draws depend on `seed`,
    the tensor and the element alone. `rounding="compensated"` carries the rounding error of each
    input of a changed linear layer into the inputs that follow, so that ‖(W' - Q) C^½‖_F is small
    (GPTQ, arXiv:2210.17323); `stats` is the file with `<module>.covariance`, C = E[x xᵀ], of these
    layers. Scales are those of rounding to nearest, and what is no linear layer is rounded so.

    The copies of the base's embeddings that PEFT stores beside their factors are compared with the
    base: equal ones change nothing, others are refused unless `base_copies` says which counts,
    "ignore" (the base's own weight) or "adapter" (the copy, as in PEFT).

    `fail_below` is the share of the change that the median of the changed tensors has to keep:
    where rounding keeps less, the merge fails before anything is published. Without it the
    receipt's `warnings` say what is lost.

    Unlike PEFT's `merge_and_unload` several adapters are added before the one rounding, tied
    embeddings that only one side changes are untied, attention's `out_proj` gets its delta once,
    and anything unknown is an error; `compat="peft"` keeps PEFT's roundings and order.
    """

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
    base16: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="ORIGINAL",
        help="Merge into this 16-bit original of the quantized BASE.",
        section=QUANTIZED,
    )
    stats: StrPath | None = compensation_option()
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

    def plan(self) -> "Plan":
        plan = super().plan()
        if self.fail_below is None:
            return plan
        return dataclasses.replace(plan, warn=partial(plan.warn, fail_below=self.fail_below))

    def check(self, plan: "Plan") -> Callable[[Path], object] | None:
        """Recomputes rows of the finished folder, where that is asked for."""
        return load("core.verify.row_checks:RowCheck")(plan) if self.verify else None


merge = function_of(Merge)
