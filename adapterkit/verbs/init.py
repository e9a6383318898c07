"""init: an adapter that starts by any method, and for some the base that is left without the part
that the adapter takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters import adapter_config
from adapterkit.adapters.keys import INITIAL
from adapterkit.checkpoint.fingerprint import fingerprint
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.execution import Execution, executes
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.options import Executor, StrPath, choice
from adapterkit.plan import Computed, Plan, Progress, Shard, Task, no_warnings
from adapterkit.planning import adapter_output
from adapterkit.planning.folder_files import Files
from adapterkit.planning.initial_targets import Selection, Target, find_targets
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.model_output import planned_fingerprint
from adapterkit.planning.new_adapter import Scaling
from adapterkit.planning.quantization import plan_quantization
from adapterkit.planning.quantization import targets as formats
from adapterkit.planning.residual import (
    plan_quantized_residual,
    plan_residual,
    planned_adapter,
)
from adapterkit.planning.sources import open_model, open_statistics
from adapterkit.receipt import Receipt
from adapterkit.registry import create, members
from adapterkit.statistics.sums import INPUTS
from adapterkit.tasks.handoff import HandoffFactors
from adapterkit.tasks.initial import InitialFactors
from adapterkit.tasks.redistribution import finalize_by_ratios, warn_of_dropped, with_candidates
from adapterkit.tasks.statistics import select_statistics, shape_of
from adapterkit.weights.decoded import decoded_view
from adapterkit.weights.detect import check_not_quantized

COLLECTED = INPUTS | {"gradient": ("gradient",)}  # what `stats` collects: kinds
ADAPTER = "adapter"  # folder in the output


@dataclass(frozen=True)
class Options:
    """The options of the command; fields have their names."""

    method: str
    rank: int
    alpha: float | None = None
    rslora: bool = False
    rank_for: tuple[str, ...] = ()
    alpha_for: tuple[str, ...] = ()
    targets: str | None = None
    exclude: str | None = None
    layers: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    residual: str = "write"
    quantize: str | None = None
    skip: str | None = None
    block_size: int | None = None
    double_quant: bool = False
    dtype: str = "fp32"

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.rank, self.alpha, self.rslora, self.rank_for, self.alpha_for)

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.exclude, self.layers)

    @property
    def quantization(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "skip": self.skip,
        }


@executes(method=choice(lambda: members("inits")), quantize=choice(lambda: formats()))
def init(
    execution: Execution,
    base: StrPath,
    *,
    out: StrPath,
    method: str,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    rank_for: Sequence[str] = (),
    alpha_for: Sequence[str] = (),
    targets: str | None = None,
    exclude: str | None = None,
    layers: str | None = None,
    stats: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    residual: str = "write",
    quantize: str | None = None,
    skip: str | None = None,
    block_size: int | None = None,
    double_quant: bool = False,
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
    """Initialize an adapter on a base: `OUT/adapter`, and for methods that take a part of each
    weight `OUT/base`, the rest, W' = W - scale·b@a.

    `method`: zero deltas (default, gaussian, orthogonal, mica), random factors (random), parts of
    the weights (pissa, arXiv:2404.02948; olora, arXiv:2406.01775; milora, arXiv:2406.09044), or
    from statistics (corda, arXiv:2406.05223; eva, arXiv:2410.07170; lora_ga, arXiv:2407.05000).
    `stats`: the file of `adapterkit.stats`. `settings`: the method's own options, by PEFT's names.

    `targets`: `all-linear`, ends of modules' names with commas between, or a regex; without it
    PEFT's for the model's type. `exclude`: a regex; `layers`: numbers and ranges, `0-11,20`. scale
    is alpha / rank (alpha / √rank with `rslora`); alpha is the rank by default. `rank_for`,
    `alpha_for`: texts `REGEX=N`, others for some modules, of several that match the last.

    `residual`: `write` the base that is left, or `implicit`: no base is written, the initial
    factors lie in `OUT/adapter/initial`, and `adapterkit.merge` onto the original takes them out.
    The factors as they are written define the rest. `quantize`, a format as `adapterkit.quantize`
    knows it: the rest is written quantized (QPiSSA), and the receipt has each weight's relative
    error beside that of plain quantization; weights without factors are quantized plainly, those
    that `skip` matches not at all. To have a trained adapter on the original afterwards:
    `adapterkit rebase TRAINED --initial OUT/adapter`. Raises `Refused` before anything is written.

    Unlike PEFT: the base is never loaded, layers on which a method is not defined are refused, and
    the adapter that is saved says nothing that makes PEFT change a base again.
    """
    options = Options(
        method,
        rank,
        alpha,
        rslora,
        tuple(rank_for),
        tuple(alpha_for),
        targets,
        exclude,
        layers,
        dict(settings or {}),
        seed,
        residual,
        quantize,
        skip,
        block_size,
        double_quant,
        dtype,
    )
    plan = plan_init(open_model(base), options, None if stats is None else open_statistics(stats))
    return execution.run(plan)


def plan_init(folder: Folder, options: Options, stats: Folder | None = None) -> Plan:
    """Everything an initialization will do, or `Refused`."""
    method: Any = create("inits", options.method, options.settings)
    _check(options, method, stats is not None)
    notes: list[str] = []
    base = open_checkpoint(folder)
    if options.quantize:
        check_not_quantized(base, "remove --quantize: the rest keeps the base's format")
    statistics = None if stats is None else open_checkpoint(stats, 1)
    targets = find_targets(decoded_view(base), options.selection, options.scaling, notes)
    _check_targets(base, method, targets)
    specs = _statistics(statistics, method, targets)
    tasks = [
        InitialFactors(
            target.name,
            target.place,
            dtypes.parse(options.dtype),
            method,
            target.rank,
            target.alpha,
            target.scale,
            options.seed,
            target.weight if "weight" in method.needs else None,
            tuple((kind, by_module[target.name]) for kind, by_module in specs.items()),
            method.changes_base,
        )
        for target in targets
    ]
    decisions: dict[str, Any] = {"modules": len(targets)}
    implicit = method.changes_base and options.residual == "implicit"
    redistributes = getattr(method, "redistributes", False)
    if redistributes:
        tasks = with_candidates(tasks)
    adapter = _adapter(base, tasks, targets, options, method, ADAPTER, implicit)
    if redistributes:
        adapter = replace(adapter, finalize=finalize_by_ratios)
    rest, files = (), adapter.files(notes)
    if method.changes_base and not implicit:
        rest, base_files = _residual(base, targets, options, adapter, notes, decisions)
        files = base_files | files
    made_for = planned_fingerprint(rest) if rest else fingerprint(base)
    shards = [replace(adapter, base_fingerprint=made_for).shard(), *rest]
    if implicit:
        initial = [
            HandoffFactors(f"{INITIAL} {t.name}", t.place, t.dtype, t.rank, t.name) for t in tasks
        ]
        copy = _adapter(base, initial, targets, options, method, f"{ADAPTER}/{INITIAL}")
        shards, files = [*shards, copy.shard()], files | copy.files(notes)
    inputs = {number: one for number, one in enumerate((base, statistics)) if one is not None}
    headers = header_hashes(inputs, configs=(0,))
    folders = tuple(one.folder for one in inputs.values())
    return Plan(
        "init",
        {key: value for key, value in vars(options).items() if value},
        folders,
        headers,
        identities(folders, headers),
        tuple(shards),
        files,
        decisions,
        tuple(notes),
        models=tuple(inputs),
        warn=warn_of_dropped if redistributes else no_warnings,
    )


def _residual(
    base: Checkpoint,
    targets: list[Target],
    options: Options,
    adapter: adapter_output.Output,
    notes: list[str],
    decisions: dict[str, Any],
) -> tuple[tuple[Shard | Computed, ...], Files]:
    """The files of the base that is left."""
    if options.quantize:
        quantization = plan_quantization(base, {"to": options.quantize, **options.quantization})
        notes += quantization.notes
        decisions["quantised"] = len(quantization.quantized)
        return plan_quantized_residual(base, quantization, targets, options.method)
    config = adapter.config({t.name: {"rank": t.rank, "alpha": t.alpha} for t in targets})
    planned = planned_adapter(config, targets, options.dtype)
    return plan_residual(base, planned, options.method, notes)


def _adapter(
    base: Checkpoint,
    tasks: Sequence[Task],
    targets: Sequence[Target],
    options: Options,
    method: Any,
    folder: str,
    implicit: bool = False,
) -> adapter_output.Output:
    """An adapter of the output; its config has no init that PEFT would repeat."""
    parameters = [target.name for target in targets if target.is_parameter]
    settings = adapter_config.plain_settings() | {"use_rslora": options.rslora}
    if parameters:
        settings |= {"target_parameters": parameters, "peft_version": adapter_config.PEFT_LAYOUT}
    if implicit:
        settings["init_lora_weights"] = f"implicit_{options.method}"
    where = (
        "for the original base"
        if implicit or not method.changes_base
        else ("for the base beside it, not for the original")
    )
    return adapter_output.Output(
        [],
        tasks,
        {task.name: target.name for task, target in zip(tasks, targets, strict=True)},
        settings,
        f"{options.method}: {where}",
        folder,
        base_settings={
            "base_model_name_or_path": adapter_config.hub_id(base.folder),
            "task_type": adapter_config.task_type(base.config),
        },
        alpha={target.name: target.alpha for target in targets},
        parameters=frozenset(parameters),
    )


def _statistics(
    stats: Checkpoint | None, method: Any, targets: Sequence[Target]
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each kind that the method needs, by target."""
    return {
        kind: select_statistics(
            stats, kind, {target.name: shape_of(kind, *target.shape) for target in targets}
        )
        for kind in method.needs
        if kind != "weight"
    }


def _check(options: Options, method: Any, has_stats: bool) -> None:
    """Refuse options that do not go together."""
    errors: list[AdapterkitError] = []

    def refuse(problem: str, expected: str, hint: str) -> None:
        errors.append(Refused(problem, expected=expected, where="options", hint=hint))

    needs = [kind for kind in method.needs if kind != "weight"]
    if needs and not has_stats:
        what = [name for name, kinds in COLLECTED.items() if {*kinds} & {*needs}]
        refuse(
            f"--method {options.method} without --stats",
            f"statistics: {', '.join(needs)}",
            f"collect them: adapterkit stats BASE --data FILE --what {','.join(what)} --out STATS",
        )
    if has_stats and not needs:
        refuse(
            f"--stats with --method {options.method}", "a method that uses them", "remove --stats"
        )
    if options.quantize and (not method.changes_base or options.residual == "implicit"):
        refuse(
            f"--quantize with --method {options.method} and no base to write",
            "a method that takes a part of each weight, and --residual write",
            "remove --quantize, or quantize the base: adapterkit quantize",
        )
    extra = [f"--{key.replace('_', '-')}" for key, value in options.quantization.items() if value]
    if extra and not options.quantize:
        refuse(
            f"{', '.join(extra)} without --quantize",
            "--quantize FORMAT",
            "choose modules with --targets, or give --quantize nf4",
        )
    refuse_all(errors)


def _check_targets(base: Checkpoint, method: Any, targets: Sequence[Target]) -> None:
    """Refuse layers on which a method is not defined, and ranks above those of the weights."""
    errors: list[AdapterkitError] = []
    kinds = getattr(method, "kinds", None)
    for target in targets:
        if kinds is not None and target.kind not in kinds:
            errors.append(
                Refused(
                    f"{method.name} on {shown(target.name)}, of kind {target.kind}",
                    expected=" or ".join(kinds),
                    where=base.name,
                    hint="remove it from --targets (PEFT starts it in another way, silently)",
                )
            )
        most = min(target.shape) // getattr(method, "triplets_per_rank", 1)
        if method.needs and target.rank > most:
            errors.append(
                Refused(
                    f"rank {target.rank} for {shown(target.name)} {target.shape}",
                    expected=f"at most {most}",
                    where="--rank",
                    hint=f"give --rank-for '{target.name}={most}'",
                )
            )
    refuse_all(errors)
