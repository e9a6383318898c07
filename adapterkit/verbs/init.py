"""init: an adapter that starts from its base's weights, and the base that is left without that
part."""

from dataclasses import dataclass
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.execution import Execution, writes
from adapterkit.errors import Refused, refuse_all
from adapterkit.options import StrPath, choice
from adapterkit.plan import Plan, Progress, Task
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.model_output import QuantizedModel
from adapterkit.planning.new_adapter import (
    Scaling,
    new_adapter,
    select_targets,
    wrappable,
)
from adapterkit.planning.quantization import QuantizationPlan, plan_quantization
from adapterkit.planning.quantization import targets as formats
from adapterkit.planning.sources import open_model
from adapterkit.receipt import Receipt
from adapterkit.registry import create, members
from adapterkit.tasks.handoff import HandoffFactors
from adapterkit.tasks.residual import ResidualWeight
from adapterkit.weights.detect import check_not_quantized


@dataclass(frozen=True)
class Options:
    """The options of the command; fields have their names."""

    method: str
    rank: int
    alpha: float | None = None
    rslora: bool = False
    targets: str | None = None
    skip: str | None = None
    quantize: str | None = None
    block_size: int | None = None
    double_quant: bool = False
    dtype: str = "fp32"

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.rank, self.alpha, self.rslora)


def methods() -> list[str]:
    """The inits that take a part out of the base."""
    return [name for name, record in members("inits").items() if record.changes_base]


@writes(method=choice(methods), quantize=choice(lambda: formats()))
def init(
    base: StrPath,
    *,
    out: StrPath,
    method: str,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    targets: str | None = None,
    skip: str | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
    double_quant: bool = False,
    dtype: str = "fp32",
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Initialize an adapter from its base's weights: `OUT/adapter` holds scale·b@a, `OUT/base` the
    rest, W - scale·b@a.

    `method`: pissa (the principal part of each weight, arXiv:2404.02948), olora (its QR
    decomposition, arXiv:2406.01775), milora (the minor part, arXiv:2406.09044). `targets`: which
    modules, `all-linear`, ends of their names with commas between, or a regex (default: all linear
    layers but the output). scale is alpha / rank (alpha / √rank with `rslora`); alpha is the rank
    by default. `quantize`, a format as `adapterkit.quantize` knows it: the rest is written
    quantized (QPiSSA), and the receipt has each weight's relative error beside that of plain
    quantization; weights without factors are quantized plainly, those that `skip` matches not at
    all. Load the adapter on `OUT/base`; to have it on the original afterwards: `adapterkit rebase
    TRAINED --initial OUT/adapter`. Raises `Refused` before anything is written.

    Unlike PEFT: the base is never loaded, and the adapter that is saved says nothing that makes
    PEFT change a base again.
    """
    options = Options(
        method, rank, alpha, rslora, targets, skip, quantize, block_size, double_quant, dtype
    )
    plan = plan_init(open_model(base), options)
    execution = Execution(out, hash, device, memory, engine, resume, overwrite, dry_run, progress)
    return execution.run(plan)


def plan_init(folder: Folder, options: Options) -> Plan:
    """Everything an initialization will do, or `Refused`."""
    method: Any = create("inits", options.method, {})
    if not options.quantize:
        extra_options = [
            f"--{key.replace('_', '-')}"
            for key, value in _quantization_options(options).items()
            if value
        ]
        if extra_options:
            problem, hint = (
                f"{', '.join(extra_options)} without --quantize",
                "choose modules with --targets, or give --quantize nf4",
            )
            raise Refused(problem, expected="--quantize FORMAT", where="options", hint=hint)
    base = open_checkpoint(folder)
    check_not_quantized(base)
    quantization = plan_quantization(
        base, {"to": options.quantize, **_quantization_options(options)}
    )
    tasks: dict[str, Task] = {}
    factors: list[Task] = []
    for name in _target_modules(quantization, options.targets):
        key = quantization.linear[name]
        weight = quantization.weights[key]
        packed = quantization.quantized.get(key)
        tasks[key] = ResidualWeight(
            key,
            base.tensors[key],
            packed,
            name,
            method,
            options.rank,
            options.scaling.scale,
            weight.transposed,
        )
        factors.append(
            HandoffFactors(
                name, Place.of_weight(name, weight.shape), dtypes.parse(options.dtype), options.rank
            )
        )
    return _plan(base, quantization, tasks, factors, options)


def _target_modules(quantization: QuantizationPlan, targets: str | None) -> list[str]:
    """The modules that get factors; `Refused` if the weight of one cannot be changed."""
    usable = wrappable(
        quantization.names, [*quantization.linear, *quantization.problems], quantization.notes
    )
    if targets is None:
        modules = [name for name in usable if name not in quantization.excluded]
    else:
        missing_because = "tied, left alone by --skip or passed by in PEFT, or not in the file"
        modules, notes = select_targets(targets, usable, quantization.model, missing_because)
        quantization.notes.extend(notes)
    refuse_all([quantization.problems[name] for name in modules if name in quantization.problems])
    if not modules:
        raise Refused(
            "no linear layer",
            expected="one or more",
            where=quantization.base.name,
            hint="check --skip",
        )
    return modules


def _plan(
    base: Checkpoint,
    quantization: QuantizationPlan,
    tasks: dict[str, Task],
    factors: list[Task],
    options: Options,
) -> Plan:
    config = quantization.config() if options.quantize else base.config
    model = QuantizedModel(
        base, quantization.quantized if options.quantize else {}, tasks, config, "base", "init"
    )
    adapter = new_adapter(
        base,
        factors,
        options.scaling,
        f"{options.method}: for the base beside it, not for the original",
        "adapter",
    )
    notes = list(quantization.notes)
    summary = f"without the part that {options.method} took into the adapter beside it"
    files = model.files(summary) | adapter.files(notes)
    receipt_options = {key: value for key, value in vars(options).items() if value}
    headers = header_hashes({0: base}, configs=(0,))
    decisions = {"modules": len(factors)} | (
        {"quantised": len(quantization.quantized)} if options.quantize else {}
    )
    shards, file_ids = (*model.shards(), adapter.shard()), identities((base.folder,), headers)
    return Plan(
        "init",
        receipt_options,
        (base.folder,),
        headers,
        file_ids,
        shards,
        files,
        decisions,
        tuple(notes),
    )


def _quantization_options(options: Options) -> dict[str, Any]:
    return {
        "block_size": options.block_size,
        "double_quant": options.double_quant,
        "skip": options.skip,
    }
