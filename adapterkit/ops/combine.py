"""combine: several adapters into one. How the deltas are put together (method), on what it acts (space: the deltas, or PEFT's
factors) and how the result becomes factors again (refit: exact, a rank, a share of the energy) are three choices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from adapterkit import dtypes, registry
from adapterkit.adapter import PREFIX, Adapter, Lora, read_adapter, rewrapped
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.combinations.common import WeightedSum
from adapterkit.combinations.protocol import Method
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.factors import Factors
from adapterkit.ops import produced
from adapterkit.ops.combining import Combined, Part, Refit
from adapterkit.ops.copies import rows_apart
from adapterkit.ops.decomposed import BaseWeights, not_decomposed
from adapterkit.ops.sites import Site, base_with_parameters, join, levels_of, names_of, targets_of
from adapterkit.ops.sources import open_model, open_weighted
from adapterkit.options import Sources, StrPath, checked, choice
from adapterkit.patterns import matcher
from adapterkit.plan import Plan, Progress, Receipt, Task
from adapterkit.registry import create

# PEFT's names for combinations: method, and whether the refit is exact where neither --rank nor --energy is given
ALIASES = {
    "svd": ("linear", "largest"),
    "cat": ("linear", "exact"),
    "ties_svd": ("ties", "largest"),
    "dare_linear_svd": ("dare_linear", "largest"),
    "dare_ties_svd": ("dare_ties", "largest"),
    "magnitude_prune_svd": ("magnitude_prune", "largest"),
}
PIECE = 4 << 20  # bytes compared at a time


@dataclass(frozen=True)
class Options:
    """What a combination can be told. Fields are the command's options."""

    method: str
    space: str = "delta"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    majority: str | None = None
    svd_clamp: float | None = None
    weight_for: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()  # a method's other options
    dtype: str = "fp32"
    seed: int = 0
    tokenizer: str | None = None


@checked(method=choice(lambda: (*registry.members("combinations"), *ALIASES)))
def combine(
    adapters: Sources,
    *,
    out: StrPath,
    method: str,
    base: StrPath | None = None,
    space: str = "delta",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: str | None = None,
    svd_clamp: float | None = None,
    weight_for: Iterable[str] = (),
    settings: dict[str, Any] | None = None,
    dtype: str = "fp32",
    seed: int = 0,
    tokenizer: str | None = None,
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Combine adapters into one: Δ' = method(w₁Δ₁, w₂Δ₂, ...), Δᵢ = scaleᵢ·bᵢ@aᵢ, written as factors of scale 1.

    Each adapter is a folder or a Hub id and may carry a weight: `PATH=0.7`, a pair `(path, 0.7)`, or an item of a mapping
    `{path: 0.7}`. `space="delta"`: the method acts on the deltas;
    `"factors"`: on a and b apart, as PEFT's `add_weighted_adapter` does (sign and root of each weight on both, cross terms and
    all). Refit: `rank`, or `energy` (the smallest rank of each module that keeps this share of the squared singular values); with
    neither, methods on factors are exact (the ranks add up) and methods on elements keep the inputs' largest rank. `base` tells
    parameters of `target_parameters` apart where the files, which name their nesting only, do not. Factors are
    computed in float64 (dense deltas in float32), written in `dtype`. Raises `Refused` before anything is written.

    A DoRA's delta depends on the weights that it was trained on: with `base` it is m·(W + scale·b@a)/‖W + scale·b@a‖ - W, dense, so
    that the result is a plain LoRA of a rank that has to be given; without, DoRA is refused. Values that were trained whole
    (modules_to_save, token rows, biases) are taken from the one adapter of weight 1 that has them; several adapters' are averaged
    where the method is a weighted sum (linear, mean, ema) whose shares among them add up to 1, else refused unless they are equal.

    An adapter of weight 0 takes no part in delta space: weights (1, 0) give the first one's delta by every method. Of slerp the
    weights say where on the arc the result lies, and how long it is.

    A tokenizer beside the adapters is copied, and refused where they differ in what makes tokens; `tokenizer="base"` copies none.

    Unlike PEFT: rsLoRA scales, differing ranks and patterns, and modules that some adapters lack are right.
    """
    rules, more = tuple(weight_for), tuple((settings or {}).items())
    options = Options(
        method,
        space,
        rank,
        energy,
        density,
        majority,
        svd_clamp,
        rules,
        more,
        dtype,
        seed,
        tokenizer,
    )
    plan = plan_combine(
        open_weighted(adapters), options, None if base is None else open_model(base)
    )
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(
        plan, out, engine=engine, device=device, memory=memory, dry_run=dry_run, **how
    )


def plan_combine(
    sources: list[tuple[Folder, float]], options: Options, base: Folder | None = None
) -> Plan:
    """Everything a combination will do, or `Refused` with all that cannot be done."""
    method, refit = _settled(options)
    if len(sources) < 2 and not (sources and (options.rank or options.energy)):
        raise Refused(
            f"{len(sources)} adapters",
            expected="two or more",
            where="combine",
            hint="name the adapters",
        )
    adapters = read_all([folder for folder, _ in sources])
    given = [weight for _, weight in sources]
    equal = [1.0] * len(given)
    if options.weight_for and method.resolve_weights(equal) != equal:
        raise Refused(
            "--weight-for and an option that says the weights",
            expected="one",
            where="options",
            hint="leave out one of them",
        )
    given = method.resolve_weights(given)
    weights = _Weights(given, options.weight_for)
    doras, notes = [adapter for adapter in adapters if adapter.config.get("use_dora")], []
    if base is not None and doras:
        model = open_checkpoint(base, len(adapters))
    else:
        model = base_with_parameters(base, adapters, notes)
    errors = [error for adapter in adapters for error in _not_summable(adapter, model)]
    joined = join(adapters, errors, None if model is None else names_of(model, adapters, notes))
    decomposed = (
        {}
        if model is None
        else {a.number: BaseWeights(model, a, [x.module for x in a.loras], notes) for a in doras}
    )
    tasks: list[Combined] = []
    levels = levels_of(joined.values())
    for name, site in joined.items():
        try:
            parts = tuple(
                _part(number, *found, weights, decomposed.get(number))
                for number, found in site.members.items()
            )
            parts = _with_a_share(parts, options.space)
            method.check_weights([part.weight for part in parts])
        except AdapterkitError as error:
            errors.append(error)
            continue
        errors += _fit(name, parts, adapters, options, refit)
        tasks.append(
            Combined(
                name,
                parts,
                site.place(levels),
                method,
                options.space,
                refit,
                dtypes.parse(options.dtype),
                options.seed,
            )
        )
    biases, whole = (
        _biases(joined, weights, options, errors),
        _values(adapters, weights, method, levels, errors),
    )
    errors += weights.unused() + _inside_wrappers(adapters, joined.values())
    refuse_all(errors)
    if not tasks:
        raise Refused(
            "no module with factors",
            expected="adapters of low-rank factors",
            where="combine",
            hint="check the adapters",
        )
    told = {k: v for k, v in vars(options).items() if v not in (None, (), False)} | {
        "weights": given
    }
    metrics = {
        "adapters": [
            {"name": a.name, "weight": w, "modules": len(a.loras)}
            for a, w in zip(adapters, given, strict=True)
        ]
    }
    settings = produced.plain_settings() | produced.extras(adapters) | {"lora_bias": bool(biases)}
    summary = (
        f"{options.method} in {options.space} space, weights {', '.join(f'{w:g}' for w in given)}"
    )
    everything = [*tasks, *biases, *whole]
    output = produced.Output(
        adapters,
        everything,
        settings=settings,
        summary=summary,
        tokenizer=options.tokenizer,
        **targets_of(joined),
    )
    return produced.adapter_plan("combine", told, adapters, [output], notes, metrics, model)


def _with_a_share(parts: tuple[Part, ...], space: str) -> tuple[Part, ...]:
    """Those whose weight is not 0, if there are any: weights (1, 0) give the first adapter's delta by every method.

    Not in factor space, where all is as PEFT does it: there the signs of such an adapter have their say.
    """
    used = tuple(part for part in parts if part.weight)
    return used if used and space == "delta" else parts


def _not_summable(adapter: Adapter, base: Checkpoint | None) -> list[AdapterkitError]:
    if base is not None and adapter.config.get("use_dora"):
        return not_decomposed(adapter)
    return not_linear(adapter, "give --base BASE, the model it was trained on, and --rank R")


def _part(
    number: int, lora: Lora, factors: Factors, weights: "_Weights", decomposed: BaseWeights | None
) -> Part:
    return Part(
        number,
        factors,
        weights.of(number, lora.module),
        decomposed.dora(lora, factors) if decomposed else None,
    )


def read_all(folders: Sequence[Folder]) -> list[Adapter]:
    """The adapters of these folders, numbered from 0; `Refused` with all that cannot be read."""
    adapters, errors = [], []
    for number, folder in enumerate(folders):
        try:
            adapters.append(read_adapter(folder, number))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return adapters


def not_linear(
    adapter: Adapter,
    dora: str = "make it plain first: adapterkit resize ADAPTER --base BASE --rank R",
):
    """Why an adapter's delta is not scale * b @ a on the base that it names; `dora`: what to do if it is one."""
    errors: list[AdapterkitError] = []
    init = adapter.changed_base()
    if init:
        found = f"{adapter.name} was initialised by {init}, which changed its base's weights"
        hint = "make it plain first: adapterkit rebase ADAPTER --initial INIT"
        errors.append(
            Refused(
                found, expected="adapters on one unchanged base", where=adapter.where, hint=hint
            )
        )
    if adapter.config.get("use_dora"):
        found = f"{adapter.name} is a DoRA of {len(adapter.loras)} modules: its delta depends on the base's weights"
        errors.append(Refused(found, expected="plain LoRA", where=adapter.where, hint=dora))
    if adapter.config.get("layer_replication"):
        found = f"{adapter.name} replicates layers: its modules are not the base's"
        errors.append(
            Refused(
                found, expected="adapters of one base", where=adapter.where, hint="leave it out"
            )
        )
    return errors


class _Weights:
    """Each adapter's weight on each module: its own, unless the last --weight-for that matches says another."""

    def __init__(self, weights: list[float], rules: Iterable[str]):
        self.weights = weights
        self.rules = [(text, *self._rule(text)) for text in rules]
        self.used: set[str] = set()

    def of(self, number: int, module: str) -> float:
        weight = self.weights[number]
        for text, adapter, matches, value in self.rules:
            if adapter in (None, number) and matches(module):
                self.used.add(text)
                weight = value
        return weight

    def unused(self) -> list[AdapterkitError]:
        return [
            Refused(
                f"{shown(text)} matches no module",
                expected="a module of the adapter",
                where="--weight-for",
                hint="check the regex",
            )
            for text, *_ in self.rules
            if text not in self.used
        ]

    def _rule(self, text: str):
        pattern, _, number = text.rpartition("=")
        head, colon, rest = pattern.partition(":")
        which = int(head) - 1 if colon and head.isdigit() else None
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if (
            not math.isfinite(value)
            or not pattern
            or (which is not None and not 0 <= which < len(self.weights))
        ):
            raise Refused(
                shown(text),
                expected="[N:]REGEX=WEIGHT, N the adapter's place from 1",
                where="--weight-for",
                hint="e.g. 2:q_proj=0.5",
            )
        return which, matcher(pattern if which is None else rest, "--weight-for"), value


def _settled(options: Options) -> tuple[Method, Refit]:
    """The method's record and the refit; `Refused` for options that do not fit."""
    produced.check_refit(options.rank, options.energy)
    method, default = ALIASES.get(options.method, (options.method, None))
    given = {"density": options.density, "majority": options.majority} | dict(options.settings)
    record = cast(Method, create("combinations", method, given))
    dense = record.acts_on == "elements"
    if options.space == "factors" and (options.rank or options.energy or options.method in ALIASES):
        raise Refused(
            f"--space factors with {options.method if options.method in ALIASES else '--rank or --energy'}",
            expected="a method alone: there the ranks stay as they are",
            where="options",
            hint="leave out --space factors",
        )
    if options.space == "factors" and not dense and method != "linear":
        found = f"--space factors with {method}, which is not defined on a and b apart"
        raise Refused(
            found,
            expected="linear, or a method on elements",
            where="options",
            hint="leave out --space factors",
        )
    largest = default == "largest" or (dense and default is None)
    fixed = options.rank is not None or options.energy is not None
    return record, Refit(options.rank, options.energy, largest and not fixed, options.svd_clamp)


def _fit(
    name: str, parts: tuple[Part, ...], adapters: Sequence[Adapter], options: Options, refit: Refit
) -> list[AdapterkitError]:
    found = {part.factors.rank for part in parts}
    doras = [adapters[part.number].name for part in parts if part.dora]
    if doras and (options.space == "factors" or refit.exact):
        how = "--space factors" if options.space == "factors" else "an exact result"
        expected, hint = (
            "a refit in --space delta: a DoRA's delta has full rank",
            "give --rank R or --energy E",
        )
        return [
            Refused(
                f"{shown(name)}: {how} with DoRA ({', '.join(doras)})",
                expected=expected,
                where="options",
                hint=hint,
            )
        ]
    if options.space == "factors" and len(found) > 1:
        ranks = ", ".join(f"{adapters[p.number].name} {p.factors.rank}" for p in parts)
        hint = "use --space delta"
        return [
            Refused(
                f"{shown(name)}: ranks {ranks}",
                expected="one rank in --space factors",
                where="adapters",
                hint=hint,
            )
        ]
    return []


def held(
    adapters: Sequence[Adapter], levels: Mapping[str, int], *, copies: bool = True
) -> dict[str, dict[int, TensorSpec]]:
    """Key, in a file whose modules are wrapped `levels` times -> adapter number -> the trained value: what is no factor; without
    `copies` no weight of the base."""
    found: dict[str, dict[int, TensorSpec]] = {}
    for adapter in adapters:
        values = [
            spec for name, spec in adapter.replaced.items() if copies or name not in adapter.copies
        ]
        for spec in [*values, *(tokens.values for tokens in adapter.tokens)]:
            found.setdefault(rewrapped(spec.key, levels), {})[adapter.number] = spec
    return found


def _values(
    adapters: Sequence[Adapter],
    weights: "_Weights",
    method: Method,
    levels: Mapping[str, int],
    errors: list[AdapterkitError],
) -> list[Task]:
    """Values that were trained whole: taken as they are from the one adapter of weight 1 that has them or from several that agree,
    or averaged."""
    errors += _other_rows(adapters, levels)
    tasks: list[Task] = []
    for key, holders in held(adapters, levels).items():
        module = rewrapped(key, {}).removeprefix(PREFIX).rpartition(".")[0]
        if all(spec in adapters[number].copies.values() for number, spec in holders.items()):
            tasks += _copy(adapters, key, holders, errors)
            continue
        given = [weights.of(number, module) for number in holders]
        spec, several = next(iter(holders.values())), len(holders) > 1
        shares = (
            method.shares(given)
            if isinstance(method, WeightedSum)
            else given[:1]
            if not several
            else []
        )
        if _equal(adapters, list(holders.items())) if several else shares == [1.0]:
            tasks.append(produced.Taken(spec, key))
            continue
        names = ", ".join(
            f"{adapters[n].name} (weight {w:g})" for n, w in zip(holders, given, strict=True)
        )
        alike = len({s.shape for s in holders.values()}) == 1 and all(
            s.dtype in dtypes.FLOATS for s in holders.values()
        )
        if several and alike and abs(math.fsum(shares) - 1) < 1e-9:
            tasks.append(
                produced.Summed(
                    key,
                    key,
                    tuple(zip(holders.values(), shares, strict=True)),
                    spec.dtype,
                    spec.shape,
                )
            )
            continue
        found = f"{shown(key)} {'/'.join(sorted({str(s.shape) for s in holders.values()}))}, trained whole by {names}"
        expected = "one adapter of weight 1 that has it, equal values, or weights that add up to 1 with linear, mean or ema"
        hint = "give other weights (--weight-for MODULE=W for this module), or leave an adapter out"
        errors.append(Refused(found, expected=expected, where="adapters", hint=hint))
    return tasks


def _copy(
    adapters: Sequence[Adapter],
    key: str,
    holders: dict[int, TensorSpec],
    errors: list[AdapterkitError],
) -> list[Task]:
    """The copy of the base's weight that all holders have: no weight scales it, and of two bases there is no sum."""
    widest = max(holders, key=lambda number: dtypes.BITS[holders[number].dtype])
    first = (adapters[widest].folder, holders[widest])
    for number, spec in holders.items():
        same = spec.shape == first[1].shape and (
            number == widest or rows_apart(first, (adapters[number].folder, spec)) == 0
        )
        if not same:
            found = f"{shown(key)}: copies of two bases in {adapters[widest].name} and {adapters[number].name}"
            hint = "merge them one after the other, with --base-copies"
            errors.append(
                Refused(found, expected="adapters of one base", where="adapters", hint=hint)
            )
    return [produced.Taken(first[1], key)]


def _inside_wrappers(adapters: Sequence[Adapter], sites: Iterable[Site]) -> list[AdapterkitError]:
    """PEFT refuses modules_to_save right inside a module whose parameters are targets."""
    homes = {site.module for site in sites if site.parameter}
    names = {
        name.rpartition(".")[0]: adapter.name
        for adapter in adapters
        for name in adapter.replaced
        if adapter.saves(name)
    }
    inside = {name: holder for name, holder in names.items() if name.rpartition(".")[0] in homes}
    if not inside:
        return []
    found = "; ".join(
        f"{shown(name)} ({who}) inside {shown(name.rpartition('.')[0])}"
        for name, who in list(inside.items())[:4]
    )
    return [
        Refused(
            f"modules_to_save {found}, of which parameters are targets",
            expected="one of both: PEFT cannot load them together",
            where="adapters",
            hint="merge one adapter after the other instead",
        )
    ]


def _other_rows(adapters: Sequence[Adapter], levels: Mapping[str, int]) -> list[AdapterkitError]:
    """Trained token rows can be joined only where they are the same rows, and of an embedding without factors."""
    both = {
        tokens.module: a.name for a in adapters for tokens in a.tokens if levels.get(tokens.module)
    }
    if both:
        found = f"trained token rows of {', '.join(map(shown, both))} ({', '.join(both.values())}) beside factors of the same module"
        hint = "merge one adapter after the other instead"
        return [
            Refused(
                found,
                expected="one of both: PEFT cannot load them together",
                where="adapters",
                hint=hint,
            )
        ]
    found = {a.name: a.config["trainable_token_indices"] for a in adapters if a.tokens}
    if all(rows == next(iter(found.values())) for rows in found.values()):
        return []
    names, hint = ", ".join(found), "combine adapters that trained the same rows"
    return [
        Refused(
            f"other token rows trained by each of {names}",
            expected="the same rows",
            where="adapters",
            hint=hint,
        )
    ]


def _equal(adapters: Sequence[Adapter], holders: list[tuple[int, TensorSpec]]) -> bool:
    """Whether all hold the same bytes, compared piece by piece."""
    (number, first), rest = holders[0], holders[1:]
    if any((spec.dtype, spec.shape) != (first.dtype, first.shape) for _, spec in rest):
        return False
    for at in range(0, first.nbytes, PIECE):
        size = min(PIECE, first.nbytes - at)
        piece = adapters[number].folder.read(first.file, first.start + at, first.start + at + size)
        if any(
            adapters[n].folder.read(s.file, s.start + at, s.start + at + size) != piece
            for n, s in rest
        ):
            return False
    return True


def _biases(
    joined: dict[str, Site], weights: "_Weights", options: Options, errors: list[AdapterkitError]
) -> list[produced.Summed]:
    """The biases that LoRAs add; they follow the weights, so only `linear` says what becomes of them."""
    tasks = produced.added_biases(joined, weights.of, dtypes.parse(options.dtype), errors)
    if tasks and (
        ALIASES.get(options.method, (options.method,))[0] != "linear" or options.space != "delta"
    ):
        errors.append(
            Refused(
                f"biases of b (lora_bias) with {options.method} in {options.space} space",
                expected="linear, in delta space",
                where="--method",
                hint="use --method linear",
            )
        )
    return tasks
