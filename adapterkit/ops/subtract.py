"""subtract: what general adapters know, taken out of task adapters (GenKnowSub, ACL 2025 short 54): Δ' = Δ - mean of the general
Δ."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit import dtypes
from adapterkit.adapter import Adapter, canonical
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.combinations.linear import Linear
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.factors import Factors, Place, place_of
from adapterkit.ops import produced
from adapterkit.ops.combine import held, join, not_linear, read_all
from adapterkit.ops.combining import Combined, Part, Refit
from adapterkit.ops.sources import open_all
from adapterkit.options import Sources, StrPath, checked
from adapterkit.plan import Bundle, Inputs, Made, Plan, Progress, Receipt


@dataclass(frozen=True)
class Options:
    """What a subtraction can be told. Fields are the command's options."""

    space: str = "delta"
    rank: int | None = None
    energy: float | None = None
    dtype: str = "fp32"


@checked()
def subtract(
    adapters: Sources,
    *,
    general: Sources,
    out: StrPath,
    space: str = "delta",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "fp32",
    hash: str = "sha256",
    device: str = "auto",
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Subtract the mean of general adapters from each task adapter: Δ' = scale·b@a - (1/G) Σ scale_g·b_g@a_g.

    One task adapter is written to `out`, several to `out/<folder name>`. In delta space the result is exact, of rank r·(1+G) unless
    `rank` or `energy` refits it; a module that a general adapter lacks counts as zero there, and one that the task lacks is added.
    `space="factors"` subtracts the means of a and b apart, as PEFT does (cross terms; scales of the general adapters ignored), and
    keeps the rank. Factors are written in `dtype`, scale 1. Raises `Refused` before anything is written.
    """
    options = Options(space, rank, energy, dtype)
    tasks, generals = open_all(adapters=adapters, general=general)
    plan = plan_subtract(tasks, generals, options)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(plan, out, engine=engine, device=device, dry_run=dry_run, **how)


def plan_subtract(tasks: Sequence[Folder], generals: Sequence[Folder], options: Options) -> Plan:
    """Everything a subtraction will do, or `Refused` with all that cannot be done."""
    produced.check_refit(options.rank, options.energy)
    if not tasks or not generals:
        found = f"{len(tasks)} task adapters, {len(generals)} general ones"
        raise Refused(found, expected="one or more of each", where="subtract", do="give --general ADAPTER")
    if options.space == "factors" and (options.rank or options.energy):
        found = "--space factors with --rank or --energy"
        raise Refused(found, expected="the ranks as they are", where="options", do="leave one of them out")
    read = read_all([*tasks, *generals])
    task_adapters, general_adapters = read[: len(tasks)], read[len(tasks) :]
    errors = [error for adapter in read for error in not_linear(adapter)]
    errors += _same_names(task_adapters) + _whole_values(general_adapters)
    outputs = [_output(task, general_adapters, options, len(tasks) > 1, errors) for task in task_adapters]
    refuse_all(errors)
    facts = {"adapters": [{"name": a.name, "modules": len(a.loras)} for a in task_adapters]}
    facts["general"] = [{"name": a.name, "modules": len(a.loras)} for a in general_adapters]
    told = {k: v for k, v in vars(options).items() if v is not None} | {"tasks": len(tasks)}
    return produced.adapter_plan("subtract", told, read, outputs, [], facts)


def _same_names(tasks: Sequence[Adapter]) -> list[AdapterkitError]:
    names = [adapter.folder.name for adapter in tasks]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(tasks) > 1 else []
    return [
        Refused(f"several task adapters called {shown(name)}", expected="different folder names", where="adapters", do="rename one")
        for name in twice
    ]


def _whole_values(generals: Sequence[Adapter]) -> list[AdapterkitError]:
    return [
        Refused(
            f"{shown(key)} was trained whole by {', '.join(a.name for a in generals if a.number in holders)}",
            expected="general adapters of factors alone: what is no delta cannot be subtracted",
            where="--general",
            do="train the general adapter without it",
        )
        for key, holders in held(generals, copies=False).items()
    ]


def _output(
    task: Adapter, generals: Sequence[Adapter], options: Options, several: bool, errors: list[AdapterkitError]
) -> produced.Output:
    joined = join([task, *generals], errors)
    prefix = f"{task.folder.name}: " if several else ""
    refit = Refit(options.rank, options.energy)
    dtype = dtypes.parse(options.dtype)
    bundles: list[Bundle] = []
    for name, members in joined.items():
        place = place_of(*next(iter(members.values())))
        if options.space == "factors":
            errors += _alike(name, members, task, generals)
            if task.number in members:
                averaged = tuple(f for number, (_, f) in members.items() if number != task.number)
                bundles.append(Lessened(prefix + name, members[task.number][1], averaged, place, dtype))
            continue
        weights = {task.number: 1.0} | {general.number: -1.0 / len(generals) for general in generals}
        parts = tuple(Part(number, factors, weights[number]) for number, (_, factors) in members.items())
        bundles.append(Combined(prefix + name, parts, place, Linear(), "delta", refit, dtype, 0))
        terms = [(lora.bias, f.scale * weights[n]) for n, (lora, f) in members.items() if lora.bias is not None]
        if terms:
            bundles.append(produced.Summed(f"{prefix}{name} bias", canonical(terms[0][0].key), tuple(terms), dtype))
    bundles += [produced.taken(spec, prefix) for holders in held([task]).values() for spec in holders.values()]
    modules = {prefix + name: next(iter(members.values()))[0].module for name, members in joined.items()}
    if options.space == "factors":
        modules = {name: module for name, module in modules.items() if any(b.name == name for b in bundles)}
    settings = produced.plain_settings() | produced.extras([task]) | {"lora_bias": bool(task.config.get("lora_bias"))}
    summary = f"the mean of {len(generals)} general adapters subtracted, in {options.space} space"
    sources = [task, *generals]
    return produced.Output(sources, bundles, modules, settings, summary, task.folder.name if several else "")


def _alike(name: str, members: dict, task: Adapter, generals: Sequence[Adapter]) -> list[AdapterkitError]:
    """Factors can be averaged only where all have the module, at one rank."""
    ranks = {number: factors.rank for number, (_, factors) in members.items()}
    if len(ranks) == 1 + len(generals) and len(set(ranks.values())) == 1:
        return []
    if task.config.get("lora_bias"):
        return []
    found = ", ".join(f"{a.name} {ranks.get(a.number, 'none')}" for a in [task, *generals])
    do = "use --space delta"
    return [Refused(f"{shown(name)}: ranks {found}", expected="one rank, in all of them", where="--space factors", do=do)]


@dataclass(frozen=True)
class Lessened:
    """PEFT's subtraction of one module: a - mean of the general a's, b - mean of the general b's."""

    name: str
    task: Factors
    generals: tuple[Factors, ...]
    place: Place
    dtype: str

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for f in (self.task, *self.generals) for spec in (f.a, f.b))

    @property
    def most(self) -> tuple[Stored, ...]:
        return produced.bounds(self.place, self.task.rank, self.dtype)

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def make(self, inputs: Inputs) -> Made:
        a, b = self.task.stored(inputs)
        others = [factors.stored(inputs) for factors in self.generals]
        count = len(others)
        a = a - sum(other for other, _ in others) / count
        b = (b - sum(other for _, other in others) / count) * self.task.scale
        a_shape, b_shape = self.place.shapes(self.task.rank)
        dtype = dtypes.torch_dtype(self.dtype)
        tensors = {self.place.a_key: a.reshape(a_shape).to(dtype), self.place.b_key: b.reshape(b_shape).to(dtype)}
        return Made(tensors, {"rank": self.task.rank})
