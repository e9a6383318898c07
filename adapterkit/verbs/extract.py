"""extract: the adapter that leads from a base to a fine-tune of it, from the two checkpoints'
difference."""

from dataclasses import replace
from functools import partial
from typing import Any

from adapterkit.adapters import adapter_config
from adapterkit.checkpoint.fingerprint import fingerprint
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.execution import Execution, executes
from adapterkit.errors import Refused
from adapterkit.options import Executor, StrPath
from adapterkit.patterns import similar_names
from adapterkit.plan import Plan, Progress, Task
from adapterkit.planning import adapter_output
from adapterkit.planning.extract import Options, sort_parameters
from adapterkit.planning.extracted_adapter import ExtractedAdapter, finalize_extraction
from adapterkit.planning.merge.job import Options as MergeOptions
from adapterkit.planning.merge.plan import plan_merge
from adapterkit.planning.norms import select_norms
from adapterkit.planning.sources import open_adapter, open_model, open_statistics
from adapterkit.receipt import Receipt
from adapterkit.tasks.difference import DifferenceFactors
from adapterkit.tasks.truncated import SHARES, Truncation, check_truncation, even_rank
from adapterkit.weights.detect import check_not_quantized


@executes()
def extract(
    execution: Execution,
    base: StrPath,
    tuned: StrPath,
    *,
    out: StrPath,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    max_size: str | int | None = None,
    stats: StrPath | None = None,
    include: str | None = None,
    exclude: str | None = None,
    rest: str = "save",
    dtype: str = "fp32",
    hash: str = "sha256",
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
    """Extract the adapter between two checkpoints: b@a is the best approximation of
    W_tuned - W_base of its rank, weight by weight.

    Linear layers, convolutions, routers and stacks of experts get factors (one of `rank`, `energy`,
    `sv_ratio`, `max_size`, as in `resize`; with `max_size` none gets more than 8 times the even
    rank), by a truncated SVD in float32. A stack has one rank, the largest that one of its experts
    needs; stacks, routers and other matrices that are no layer's stand in the config as
    target_parameters. What has no low rank and differs (embeddings, norms, biases, heads of one
    side) is saved whole (`rest="save"`), left out (`"drop"`), or a reason to refuse (`"refuse"`). A
    weight whose two values differ by the rounding of one side's dtype alone is unchanged.
    `include`, `exclude`: regexes on modules. Both sides may be sharded and stored differently;
    names are those of the loaded model. The receipt has each weight's relative error. Raises
    `Refused` before anything is written: also for shapes that differ, the vocabulary's apart. What
    was written is read back, and a merge of it planned, before it gets its name.

    `stats`: as in `resize`: factors of linear layers are the best in the norm of their outputs, and
    the receipt has the errors in both norms, also of the plain fit, which costs a second SVD.

    Saved whole means: a module without children in modules_to_save; a layer's bias with
    `bias="lora_only"`; and a single parameter that no module can stand for (ViT's cls_token,
    Mamba's A_log and D, a tied embedding) under its own key, its name beside the modules of
    modules_to_save. PEFT loads such a value into the model itself, as it does biases:
    `disable_adapter` leaves it there.
    """
    options = Options(Truncation(rank, energy, sv_ratio, max_size), include, exclude, rest, dtype)
    source = open_model(base)
    statistics = None if stats is None else open_statistics(stats)
    plan = plan_extract(source, open_model(tuned), options, statistics)
    check = lambda folder: plan_merge(source, [(open_adapter(folder), 1.0)], MergeOptions())
    return execution.run(plan, check)


def plan_extract(
    base: Folder, tuned: Folder, options: Options, stats: Folder | None = None
) -> Plan:
    """Everything an extraction will do, or `Refused` with all that cannot be done. Reads what gets
    no factors, to see if it differs."""
    check_truncation(options.truncation)
    sides = open_checkpoint(base, 0), open_checkpoint(tuned, 1)
    for side in sides:
        check_not_quantized(side)
    extraction = sort_parameters(sides, options)
    factors = list(extraction.factors)
    if options.truncation.max_size:
        limit = SHARES * even_rank(options.truncation, factors)
        factors = [replace(difference, limit=limit) for difference in factors]
    statistics = None if stats is None else open_checkpoint(stats, 2)
    factors = _weighted(factors, statistics, extraction.notes)
    tasks: list[Task] = [*factors, *extraction.values]
    if not tasks:
        raise Refused(
            "nothing to extract",
            expected="weights that both have",
            where=f"{base.name}, {tuned.name}",
            hint=similar_names(options.include or "", sides[0].tensors)
            or "check --include, --exclude",
        )
    targets = {difference.name: difference.target for difference in factors}
    parameters = frozenset(
        difference.target for difference in factors if difference.target != difference.module
    )
    task_type = adapter_config.task_type(sides[1].config, extraction.saved)
    base_settings = {
        "base_model_name_or_path": adapter_config.hub_id(base),
        "task_type": task_type,
        "auto_mapping": None if task_type else extraction.targets.auto_mapping,
        # PEFT has no wrapper of parameters for it, and needs it for none
        "fan_in_fan_out": extraction.fan_in_fan_out and not parameters,
    }
    settings = adapter_config.plain_settings() | extraction.settings()
    summary = f"the difference of {tuned.name} and {base.name}"
    made_for = fingerprint(sides[0])
    finalize = partial(finalize_extraction, options.truncation, made_for=made_for)
    more: dict[str, Any] = {
        "base_settings": base_settings,
        "base_fingerprint": made_for,
        "parameters": parameters,
        "all_modules": frozenset(extraction.targets.modules),
    }
    output = ExtractedAdapter([], tasks, targets, settings, summary, finalize=finalize, **more)
    receipt_options = {
        k: v
        for k, v in {**vars(options.truncation), **vars(options)}.items()
        if v is not None and k != "truncation"
    }
    decisions = {"left_out": extraction.skipped, "unchanged": sorted(extraction.unchanged)}
    inputs = (*sides, *(() if statistics is None else (statistics,)))
    models = tuple(range(len(inputs)))
    return adapter_output.plan_outputs(
        "extract", receipt_options, inputs, [output], extraction.notes, decisions, models
    )


def _weighted(
    factors: list[DifferenceFactors], stats: Checkpoint | None, notes: list[str]
) -> list[DifferenceFactors]:
    """Fitted in the norm of the outputs, by these statistics."""
    places = {difference.name: difference.place for difference in factors}
    parameters = {one.name for one in factors if one.target != one.module}
    selected = select_norms(stats, places, parameters, notes)
    return [replace(one, covariance=selected.get(one.name)) for one in factors]
