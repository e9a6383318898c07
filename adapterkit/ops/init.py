"""init: an adapter that starts from its base's weights, and the base that is left without that part."""

import math
from dataclasses import dataclass
from typing import Any

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import Refused, refuse_all
from adapterkit.kernels.sums import norm
from adapterkit.ops import produced
from adapterkit.ops.pair import (
    FromAside,
    Scaling,
    adapter_of,
    factors_of,
    place_of_linear,
    targeted,
    wrappable,
)
from adapterkit.ops.quantize import Chosen, QuantizedModel, model_headers
from adapterkit.ops.quantize import targets as formats
from adapterkit.ops.sizes import short
from adapterkit.ops.sources import open_model
from adapterkit.options import StrPath, checked, choice
from adapterkit.plan import Inputs, Plan, Progress, Receipt, Task, TaskResult, identities
from adapterkit.registry import create, members
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.detect import check_not_quantized


@dataclass(frozen=True)
class Options:
    """What an initialisation can be told. Fields are the command's options."""

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


@checked(method=choice(lambda: members("inits")), quantize=choice(lambda: formats()))
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
    """Initialise an adapter from its base's weights: `OUT/adapter` holds scale·b@a, `OUT/base` the rest, W - scale·b@a.

    `method`: pissa (the principal part of each weight, arXiv:2404.02948). `targets`: which modules, `all-linear`, ends of their
    names with commas between, or a regex (default: all linear layers but the output). scale is alpha / rank (alpha / √rank with
    `rslora`); alpha is the rank by default. `quantize`, a format as `adapterkit.quantize` knows it: the rest is written quantized
    (QPiSSA), and the receipt has each weight's relative error beside that of plain quantization; weights without factors are
    quantized plainly, those that `skip` matches not at all. Load the adapter on `OUT/base`; to have it on the original afterwards:
    `adapterkit rebase TRAINED --initial OUT/adapter`. Raises `Refused` before anything is written.

    Unlike PEFT: the base is never loaded, and the adapter that is saved says nothing that makes PEFT change a base again.
    """
    options = Options(
        method, rank, alpha, rslora, targets, skip, quantize, block_size, double_quant, dtype
    )
    plan = plan_init(open_model(base), options)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(
        plan, out, engine=engine, device=device, memory=memory, dry_run=dry_run, **how
    )


def plan_init(folder: Folder, options: Options) -> Plan:
    """Everything an initialisation will do, or `Refused`."""
    method: Any = create("inits", options.method, {})
    if not options.quantize:
        given = [
            f"--{key.replace('_', '-')}" for key, value in _chosen_options(options).items() if value
        ]
        if given:
            found, hint = (
                f"{', '.join(given)} without --quantize",
                "choose modules with --targets, or give --quantize nf4",
            )
            raise Refused(found, expected="--quantize FORMAT", where="options", hint=hint)
    base = open_checkpoint(folder)
    check_not_quantized(base)
    chosen = Chosen(base, {"to": options.quantize, **_chosen_options(options)})
    tasks: dict[str, Task] = {}
    factors: list[Task] = []
    for name in _targeted(chosen, options.targets):
        key = chosen.linear[name]
        weight = chosen.weights[key]
        packed = chosen.packed.get(key)
        tasks[key] = Rest(
            base.tensors[key],
            packed,
            name,
            method,
            options.rank,
            options.scaling.scale,
            weight.transposed,
        )
        factors.append(
            FromAside(
                name, place_of_linear(name, weight.shape), options.rank, dtypes.parse(options.dtype)
            )
        )
    return _plan(base, chosen, tasks, factors, options)


def _targeted(chosen: Chosen, targets: str | None) -> list[str]:
    """The modules that get factors; `Refused` if the weight of one cannot be changed."""
    usable = wrappable(chosen.names, [*chosen.linear, *chosen.problems], chosen.notes)
    if targets is None:
        found = [name for name in usable if name not in chosen.kept]
    else:
        lacking = "tied, left alone by --skip or passed by in PEFT, or not in the file"
        found, notes = targeted(targets, usable, chosen.model, lacking)
        chosen.notes += notes
    refuse_all([chosen.problems[name] for name in found if name in chosen.problems])
    if not found:
        raise Refused(
            "no linear layer", expected="one or more", where=chosen.base.name, hint="check --skip"
        )
    return found


def _plan(
    base: Checkpoint,
    chosen: Chosen,
    tasks: dict[str, Task],
    factors: list[Task],
    options: Options,
) -> Plan:
    config = chosen.config() if options.quantize else base.config
    model = QuantizedModel(
        base, chosen.packed if options.quantize else {}, tasks, config, "base", "init"
    )
    adapter = adapter_of(
        base,
        factors,
        options.scaling,
        f"{options.method}: for the base beside it, not for the original",
        "adapter",
    )
    notes = list(chosen.notes)
    said = f"without the part that {options.method} took into the adapter beside it"
    files = model.files(said) | adapter.files(notes)
    told = {key: value for key, value in vars(options).items() if value}
    headers = model_headers(base)
    metrics = {"modules": len(factors)} | (
        {"quantised": len(chosen.packed)} if options.quantize else {}
    )
    shards, who = (*model.shards(), adapter.shard()), identities((base.folder,), headers)
    return Plan("init", told, (base.folder,), headers, who, shards, files, metrics, tuple(notes))


def _chosen_options(options: Options) -> dict[str, Any]:
    return {
        "block_size": options.block_size,
        "double_quant": options.double_quant,
        "skip": options.skip,
    }


@dataclass(frozen=True)
class Rest:
    """One weight without the part that its factors take, in its own dtype or quantized; the factors are laid aside."""

    source: TensorSpec
    packed: QuantizedWeight | None
    module: str
    method: Any
    rank: int
    scale: float
    transposed: bool

    @property
    def name(self) -> str:
        return self.source.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (
            self.packed.max_outputs
            if self.packed
            else (Stored(self.source.key, self.source.dtype, self.source.shape),)
        )

    @property
    def variable_size(self) -> tuple[str, ...]:
        return self.packed.variable_size if self.packed else ()

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.source.shape)

    def compute(self, inputs: Inputs) -> TaskResult:
        weight = inputs.tensor(self.source)
        matrix = weight.T if self.transposed else weight
        a, b = factors_of(self.method.part(matrix.contiguous(), self.rank), self.rank, self.scale)
        taken = (b * self.scale) @ a
        taken = taken.T if self.transposed else taken
        size = norm(weight) or 1.0
        metrics: dict[str, Any] = {"taken": short(norm(taken) / size)}
        handoff = {f"{self.module}.a": a, f"{self.module}.b": b}
        rest = weight - taken
        if self.packed is None:
            stored = rest.to(dtypes.torch_dtype(self.source.dtype))
            metrics["error"] = short(norm(stored.float() - rest) / size)
            return TaskResult({self.source.key: stored}, metrics, handoff)
        plain = decode_checked(self.packed, self.packed.encode(weight))
        metrics["error_plain"] = short(norm(plain.sub_(weight)) / size)
        tensors = self.packed.encode(rest)
        metrics["error"] = short(norm(decode_checked(self.packed, tensors).sub_(rest)) / size)
        return TaskResult(tensors, metrics, handoff)
