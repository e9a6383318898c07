"""merge: adapters into a base, W' = round(W + Σ weight·scale·b@a), streamed from files to files."""

from typing import TYPE_CHECKING

from adapterkit.errors import Refused
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import SOURCE, WEIGHTED, Sources, StrPath, argument, option, record
from adapterkit.planning.merge.options import MergeOptions
from adapterkit.shared_options import statistics_option, verify_option
from adapterkit.verb import WritingVerb, function_of, push_option

if TYPE_CHECKING:
    from adapterkit.engines.execution import FolderCheck
    from adapterkit.plan import Plan


@record
class Merge(WritingVerb, MergeOptions):
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a), each weight
    rounded once.

    `base` and each adapter are a folder or a Hub id; an adapter may carry a weight: `PATH=0.7`, a
    pair `(path, 0.7)`, or an item of a mapping `{path: 0.7}`. Writes the folder `out`: a complete
    checkpoint in the base's own layout with a receipt (`adapterkit.json`). Arithmetic is float32,
    float64 for weights that are written in float32. Returns the receipt, or with `dry_run` the
    plan. Raises `Refused` before anything is written and `Failed` after; see the errors' texts for
    the way out.

    `rounding="stochastic"` rounds changed weights up or down at random, so that on average the
    whole delta stays, where nearest swallows what is below half a step; the draws depend on `seed`,
    the tensor and the element alone. `rounding="compensated"` carries the rounding error of each
    input of a changed linear layer into the inputs that follow, so that ‖(W' - Q) C^½‖_F is small
    (GPTQ, arXiv:2210.17323); `stats` is the file with `<module>.covariance`, C = E[x xᵀ], of these
    layers. Scales are those of rounding to nearest, and what is no linear layer is rounded so.

    The copies of the base's embeddings that PEFT stores beside their factors are compared with the
    base: equal ones change nothing, others are refused unless `base_copies` says which counts,
    "ignore" (the base's own weight) or "adapter" (the copy, as in PEFT).

    Unlike PEFT's `merge_and_unload` several adapters are added before the one rounding, tied
    embeddings that only one side changes are untied, attention's `out_proj` gets its delta once,
    and anything unknown is an error; `compat="peft"` keeps PEFT's roundings and order.
    """

    command = """Merge adapters into a base checkpoint.

    Each weight becomes W' = round(W + Σ weight·scale·b@a).

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit merge ./base ./style=0.7 ./skill=0.3 --out merged --verify
      adapterkit merge ./merged ./my-adapter=-1 --out unmerged
    """

    base: StrPath = argument(check=SOURCE)
    adapters: Sources = argument(check=WEIGHTED, metavar="ADAPTER[=W]...")
    base16: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="ORIGINAL",
        help="Merge into this 16-bit original of BASE, the quantized model that was trained on.",
    )
    stats: StrPath | None = statistics_option(
        "Covariances of the layers' inputs, for --rounding compensated.",
        needs="rounding=compensated",
    )
    verify: bool = verify_option()
    push: str | None = push_option()

    def make_plan(self) -> "Plan":
        from adapterkit.planning.merge.plan import plan_merge, plan_merge_into_original
        from adapterkit.planning.sources import open_model, open_statistics, open_weighted

        _check_one_place(self)
        base, options = open_model(self.base), self.only(MergeOptions)
        adapters = open_weighted(self.adapters, base=base)
        stats = None if self.stats is None else open_statistics(self.stats)
        if self.base16 is None:
            return plan_merge(base, adapters, options, stats)
        return plan_merge_into_original(self.base, self.base16, adapters, options, stats)

    def check(self, plan: "Plan") -> "FolderCheck | None":
        from adapterkit.engines.recompute import RowCheck

        return RowCheck(plan) if self.verify else None

    @property
    def pushed_to(self) -> str | None:
        return self.push


def _check_one_place(verb: Merge) -> None:
    if verb.push is not None and is_on_hub(verb.out):
        raise Refused(
            "--push does not apply to an output on the Hub",
            expected="one place",
            where="--push",
            hint="remove --push",
        )


merge = function_of(Merge)
