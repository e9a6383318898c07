"""Several adapters read together: what they hold besides factors, and whether it can be combined."""

import math
from collections.abc import Iterable, Mapping, Sequence

from adapterkit import dtypes
from adapterkit.adapters.keys import module_of, rewrapped_key
from adapterkit.adapters.peft import read_adapter
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.compare import same_bytes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.combinations.common import WeightedSum
from adapterkit.combinations.protocol import Method
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.patterns import matcher, similar_names
from adapterkit.plan import Task
from adapterkit.planning.comparison import differing_rows
from adapterkit.planning.sites import Site
from adapterkit.tasks import common


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


class AdapterWeights:
    """Each adapter's weight on each module: its own, unless the last --weight-for that matches says another."""

    def __init__(self, weights: list[float], rules: Iterable[str]):
        self.weights = weights
        self.rules = [(text, *self._rule(text)) for text in rules]
        self.used: set[str] = set()
        self.modules: set[str] = set()

    def of(self, number: int, module: str) -> float:
        weight = self.weights[number]
        self.modules.add(module)
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
                hint=similar_names(text.rpartition("=")[0], self.modules) or "check the regex",
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
            found.setdefault(rewrapped_key(spec.key, levels), {})[adapter.number] = spec
    return found


def value_tasks(
    adapters: Sequence[Adapter],
    weights: "AdapterWeights",
    method: Method,
    levels: Mapping[str, int],
    errors: list[AdapterkitError],
) -> list[Task]:
    """Values that were trained whole: taken as they are from the one adapter of weight 1 that has them or from several that agree,
    or averaged."""
    errors += _other_rows(adapters, levels)
    tasks: list[Task] = []
    for key, holders in held(adapters, levels).items():
        module = module_of(key)
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
        if (
            same_bytes(*((adapters[n].folder, spec) for n, spec in holders.items()))
            if several
            else shares == [1.0]
        ):
            tasks.append(common.CopiedTensor(key, spec, key, checked=True))
            continue
        names = ", ".join(
            f"{adapters[n].name} (weight {w:g})" for n, w in zip(holders, given, strict=True)
        )
        alike = len({s.shape for s in holders.values()}) == 1 and all(
            s.dtype in dtypes.FLOATS for s in holders.values()
        )
        if several and alike and abs(math.fsum(shares) - 1) < 1e-9:
            tasks.append(
                common.SummedTensor(
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
            number == widest or differing_rows(first, (adapters[number].folder, spec)) == 0
        )
        if not same:
            found = f"{shown(key)}: copies of two bases in {adapters[widest].name} and {adapters[number].name}"
            hint = "merge them one after the other, with --base-copies"
            errors.append(
                Refused(found, expected="adapters of one base", where="adapters", hint=hint)
            )
    return [common.CopiedTensor(key, first[1], key, checked=True)]


def inside_wrappers(adapters: Sequence[Adapter], sites: Iterable[Site]) -> list[AdapterkitError]:
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
