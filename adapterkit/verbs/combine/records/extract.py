"""extract: the adapter between a base and a fine-tune of it, from the two checkpoints'
difference."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.options import SOURCE, StrPath, argument, choice, option, record
from adapterkit.core.registry import load
from adapterkit.core.shared_options import ModuleFilters
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.verbs.shared.options import (
    TruncationOptions,
    covariances_option,
    factor_dtype_option,
)

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan


@record
class Extract(WritingVerb, TruncationOptions, ModuleFilters):
    """Extract the adapter between two checkpoints: b@a is the best approximation of W_tuned -
    W_base of its rank, weight by weight.

    Linear layers, convolutions, routers and stacks of experts get factors (one of `rank`, `energy`,
    `sv_ratio`, `max_size`, as in `resize`; with `max_size` none gets more than 8 times the even
    rank), by a truncated SVD in float32. A stack has one rank, the largest that one of its experts
    needs; stacks, routers and other matrices outside of layers are target_parameters in the config.
    Other values that differ (embeddings, norms, biases, heads of one side) are saved in full
    (`rest="save"`), left out (`"drop"`), or refused (`"refuse"`). A weight counts as unchanged if
    its two values differ only by the rounding of one side's dtype. `include`, `exclude`: modules,
    by ends of their names or a regular expression for whole names. Both sides may be sharded and
    stored differently; names are those of the loaded model. The receipt has each weight's relative
    error. Raises `Refused` before anything is written, also for shapes that differ in more than the
    vocabulary. Before the output gets its name, it is read back and its merge is planned.

    `stats`: as in `resize`: factors of linear layers are the best in the norm of their outputs. The
    receipt has the errors in both norms, also for the fit without statistics, which costs a second
    SVD.

    For two pipelines of diffusers, each component that differs gets a folder in PEFT's layout, from
    which `convert --to diffusers` makes one file.

    Values in full are saved as follows: a module without children in modules_to_save; a layer's
    bias with `bias="lora_only"`; a single parameter that no module can represent (ViT's cls_token,
    Mamba's A_log and D, a tied embedding) under its own key, listed with the modules of
    modules_to_save. PEFT loads such a value into the model itself, as it does biases:
    `disable_adapter` leaves it there."""

    planner = "verbs.combine.planning.extract:plan_extract"
    command = """Extract a LoRA from a fully fine-tuned model and its base.

    b@a is the best approximation of W_tuned - W_base with that rank. The adapter is read again
    before it is published, and its merge into the base is planned. Shapes may differ only in the
    vocabulary. If fully trained parameters are saved (a class token, a tied embedding, biases),
    PEFT changes the base in memory when it loads them.

    \b
    Example:
      adapterkit extract ./base ./fine-tune --rank 32 --out adapter
      adapterkit extract ./base ./fine-tune --max-size 50MB --out adapter
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    tuned: StrPath = argument(kw_only=False, check=SOURCE)
    stats: StrPath | None = covariances_option()
    rest: str = option(
        default="save",
        check=choice(("save", "drop", "refuse")),
        help="Save, drop or refuse tensors that differ but get no factors (embeddings, norms, "
        "biases).",
    )
    dtype: str = factor_dtype_option()

    def check(self, plan: "Plan") -> Callable[[Path], object]:
        """Read the extracted adapter back, and plan its merge into the base."""
        return partial(load("verbs.combine.planning.extract:plan_merge_back"), plan)


extract = function_of(Extract)
