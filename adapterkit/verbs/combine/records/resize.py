"""resize: change an adapter's rank, and convert other types to standard LoRA. The result is the
best approximation of each delta, by its singular values."""

from adapterkit.core.options import SHARE_ABOVE_0, SOURCE, StrPath, argument, choice, option, record
from adapterkit.core.shared_options import base_option
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    TruncationOptions,
    adapter_output_option,
    covariances_option,
    factor_dtype_option,
)


@record
class Resize(WritingVerb, TruncationOptions):
    """Change an adapter's rank: b'@a' is the best approximation of scale·b@a of its rank, from QR
    of both factors.

    One of `rank`, `energy` (the smallest rank of each module that keeps this share of the squared
    singular values), `sv_ratio` (singular values of at least the largest one divided by this) and
    `max_size` (a file of at most this size; the ranks go to the largest singular values of all
    modules). The factors' norms are balanced. `alpha="rank"` gives every module scale 1, `"keep"`
    keeps lora_alpha and folds the difference into b. Ranks are exact: none exceeds the requested
    one. Everything except factors (biases, magnitudes, trained modules, token rows) is kept. Raises
    `Refused` before anything is written.

    `stats`: a safetensors file with `<module>.covariance`, E[x xᵀ] of the inputs of each linear
    layer with factors. b'@a' is then the best in the norm of the layer's outputs, ‖(Δ - b'@a')
    C^½‖_F, which `energy`, `sv_ratio` and `max_size` use too (C scaled to a mean diagonal of 1,
    between modules). The receipt has both relative errors of these factors (`error`,
    `output_error`) and of those without statistics (`unweighted_error`, `unweighted_output_error`).
    Embeddings, convolutions and parameters are fitted in the norm of their weights; a note says so.

    For adapters of several components of an image pipeline (unet, text_encoder, ...), module names
    begin with the component. The output has the layout of the adapter, also if `out` ends in
    .safetensors.

    LoHa, LoKr, VeRA, AdaLoRA, GraLoRA, OFT, BOFT, HRA, HiRA, IA3, MiSS, and with `base`, a model,
    DoRA become standard LoRA of scale 1. VeRA and MiSS need the base for widths, OFT, BOFT, HRA,
    HiRA and IA3 for its weights, convolutions of the others for their kernels, `target_parameters`
    with different patterns for their order. For a DoRA without `base`, the magnitudes stay and
    scale·b@a is approximated, with a note.

    `drop_intruders`: with `base`, the share removed of each intruder dimension: a leading left
    singular vector of W + delta (of 10) whose cosine with all those of W is below 0.5. The delta
    becomes delta - share·Σ s·u·vᵀ (arXiv:2410.21228, PEFT's `reduce_intruder_dimension`)."""

    tier = "core"
    planner = "verbs.combine.planning.resize:plan_resize"
    command = """Change an adapter's rank, or convert it to plain LoRA.

    The new factors are the best approximation of each delta with the new rank, computed without the
    model. Adapters of other types, and with --base DoRA, become plain LoRA.

    \b
    Example:
      adapterkit resize ./rank-64 --rank 16 --out rank-16
      adapterkit resize ./rank-64 --energy 0.95 --dtype bf16 --out smaller
      adapterkit resize ./oft --base ./model --rank 32 --out lora
      adapterkit resize ./lora --base ./model --drop-intruders 0.25 --rank 16 --out milder
    """

    adapter: StrPath = argument(kw_only=False, check=SOURCE)
    base: StrPath | None = base_option(
        "The adapter's base, needed for OFT, VeRA, convolutions and --drop-intruders, and to turn "
        "DoRA into plain LoRA."
    )
    stats: StrPath | None = covariances_option()
    drop_intruders: float | None = option(
        default=None,
        check=SHARE_ABOVE_0,
        needs="base",
        metavar="SHARE",
        help="Remove this share (PEFT: 0.25) of each direction that training added and the base "
        "does not have: less is forgotten, and less learned. Takes two SVDs of each weight.",
    )
    alpha: str = option(
        default="rank",
        check=choice(("rank", "keep")),
        help="lora_alpha of the result: the rank of each module, for a scale of 1, or the "
        "adapter's (keep).",
    )
    dtype: str = factor_dtype_option()
    out: StrPath = adapter_output_option()


resize = function_of(Resize)
