"""merge: adapters into a base, W' = round(W + Σ weight·scale·b@a), streamed from files to files."""

from adapterkit.engines.execution import Execution, executes
from adapterkit.errors import Refused
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import Executor, Sources, StrPath
from adapterkit.plan import Plan, Progress
from adapterkit.planning.merge.job import Options
from adapterkit.planning.merge.plan import plan_merge, plan_merge_into_original
from adapterkit.planning.sources import open_model, open_statistics, open_weighted
from adapterkit.receipt import Receipt


@executes()
def merge(
    execution: Execution,
    base: StrPath,
    adapters: Sources,
    *,
    out: StrPath,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    tied: str = "untie",
    base_is_residual: bool = False,
    compat: str | None = None,
    expert_layout: str | None = None,
    tokenizer: str | None = None,
    dequantize: bool = False,
    base16: StrPath | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    stats: StrPath | None = None,
    base_copies: str | None = None,
    hash: str = "sha256",
    verify: bool = False,
    push: str | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    disk_limit: str | int | None = None,
    engine: str | Executor = "local",
    ray_address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
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
    options = Options(
        dtype=dtype,
        max_shard_size=max_shard_size,
        include=include,
        exclude=exclude,
        tied=tied,
        base_is_residual=base_is_residual,
        compat=compat,
        expert_layout=expert_layout,
        tokenizer=tokenizer,
        dequantize=dequantize,
        rounding=rounding,
        seed=seed,
        base_copies=base_copies,
    )
    if push is not None and is_on_hub(out):
        raise Refused(
            "--push does not apply to an output on the Hub",
            expected="one place",
            where="--push",
            hint="remove --push",
        )
    folder = open_model(base)
    sources = open_weighted(adapters, base=folder)
    statistics = None if stats is None else open_statistics(stats)
    plan = (
        plan_merge(folder, sources, options, statistics)
        if base16 is None
        else plan_merge_into_original(base, base16, sources, options, statistics)
    )
    check = None
    if verify:
        from adapterkit.engines.recompute import RowCheck

        check = RowCheck(plan)
    receipt = execution.run(plan, check, push)
    if check is not None and check.result and isinstance(receipt, Receipt):
        receipt.data["verified"] = check.result
    return receipt
