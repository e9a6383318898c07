"""Several adapters together: their weights, and their trained values that are no factors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors
from adapterkit.adapters.keys import module_of, rewrapped_key
from adapterkit.adapters.peft import read_adapter
from adapterkit.adapters.record import Adapter
from adapterkit.adapters.targets import Patterns
from adapterkit.adapters.weights_file import WeightsFile
from adapterkit.checkpoint.compare import same_bytes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.combinations.common import WeightedSum
from adapterkit.combinations.protocol import Method
from adapterkit.commands import PLAIN, WITHOUT_INITIAL
from adapterkit.errors import AdapterkitError, Problems, Refused, did_you_mean, listed, shown
from adapterkit.options import NUMBER
from adapterkit.plan import Task
from adapterkit.planning.adapters.sites import JoinedSite
from adapterkit.planning.adapters.value_comparison import differing_rows
from adapterkit.planning.targets.values_by_regex import Rule, pattern_table, read_rules, unmatched
from adapterkit.tasks.common import CopiedTensor, SummedTensor

OPTION, WEIGHTS = "--weight-for", "--weights"


def read_all(folders: Sequence[Folder]) -> list[Adapter]:
    """The adapters of these folders, numbered from 0; `Refused` with all that cannot be read."""
    adapters, errors = [], Problems()
    for number, folder in enumerate(folders):
        with errors.collected():
            adapters.append(read_adapter(folder, number))
    errors.raise_all()
    return adapters


def delta_problems(adapter: Adapter, dora: str = PLAIN) -> list[AdapterkitError]:
    """Reasons why an adapter's delta is not scale * b @ a on the base that it names; `dora`: the
    hint for a DoRA."""
    errors = Problems(where=adapter.where, code="AK304")
    init = adapter.changed_base()
    if init:
        errors.add(
            f"{adapter.name} was initialized by {init}, which changed its base's weights",
            "adapters on one unchanged base",
            WITHOUT_INITIAL,
        )
    if adapter.config.get("use_dora"):
        errors.add(
            f"{adapter.name} is a DoRA of {len(adapter.loras)} modules: its delta depends on "
            "the base's weights",
            "plain LoRA",
            dora,
        )
    if adapter.config.get("layer_replication"):
        errors.add(
            f"{adapter.name} replicates layers: its modules are not the base's",
            "adapters of one base",
            "remove this adapter",
        )
    return errors


class AdapterWeights:
    """Each adapter's weight, or what `option` tells else, on each module: its own, or that of the
    first rule of the option that matches, or what a file of weights says."""

    def __init__(
        self,
        weights: list[float],
        texts: Iterable[str],
        file: WeightsFile | None = None,
        option: str = OPTION,
    ):
        self.weights, self.file, self.option = weights, file, option
        self.given = [self._rule(text) for text in texts]
        rules = [[rule for numbers, rule in self.given if n in numbers] for n in self._numbers]
        self.patterns = [Patterns(pattern_table(its), self.option) for its in rules]
        self.modules: list[set[str]] = [set() for _ in weights]  # of each adapter, so far
        self.scale = 1.0  # of all of them
        self.skipped: set[str] = set()  # modules that stay as they are, whatever the file says

    def of(self, number: int, module: str) -> float:
        """The weight of an adapter on a module; `Refused` for weights of directions."""
        self.modules[number].add(module)
        if self.file is None:
            return self.scale * self.patterns[number].value(module, self.weights[number])
        weight = self.file.weights_of(number, module)
        if not isinstance(weight, tuple):
            return self.scale * weight
        raise Refused(
            f"{len(weight)} weights of directions for values of {shown(module)} that have none",
            expected="one number: they are no low-rank factors, or add a bias",
            where=WEIGHTS,
            hint="give one number, or exclude the module",
            code="AK112",
        )

    def on(self, number: int, name: str, factors: Factors) -> tuple[float, Factors]:
        """The weight of an adapter on a module or parameter, and its factors with those of their
        directions; `Refused` where these are too many or too few."""
        weight = None if self.file is None else self.file.weights_of(number, name)
        if not isinstance(weight, tuple):
            return self.of(number, factors.module if self.file is None else name), factors
        self.modules[number].add(name)
        if len(weight) != factors.count:
            each = f", {factors.experts} experts one after the other" if factors.experts else ""
            raise Refused(
                f"{shown(name)}: {len(weight)} weights of directions of adapter {number + 1}",
                expected=f"{factors.count}, one for each singular triplet{each}",
                where=WEIGHTS,
                hint="choose the weights for these adapters",
                code="AK112",
            )
        return self.scale * any(weight), replace(factors, directions=weight)

    @property
    def _numbers(self) -> range:
        return range(len(self.weights))

    def problems(self) -> list[AdapterkitError]:
        """Refusals of the rules, and of names in the file, that no module matched so far."""
        errors = Problems(code="AK112")
        known = set().union(self.skipped, *self.modules)
        # a module that is left out may be one of parameters, which are not looked up then
        is_known = lambda name: name in known or name.rpartition(".")[0] in self.skipped
        unknown = [name for name in (self.file.modules if self.file else ()) if not is_known(name)]
        # only a base says which of a module's parameters factors are of
        several = {name.partition("[")[0] for name in known if "[" in name}
        parameters = [name for name in unknown if name.rpartition(".")[0] in several]
        if unknown:
            errors.add(
                f"weights of {len(unknown)} modules that no adapter has: {listed(unknown)}",
                "names of modules, of experts with their parameter's",
                (did_you_mean(unknown[:3], known) if not parameters else "")
                or "give --base, or remove them from the file",
                where=WEIGHTS,
            )
        for numbers, (pattern, value) in self.given:
            modules = set().union(*(self.modules[number] for number in numbers))
            if Patterns({pattern: value}, self.option).unmatched(modules):
                errors.append(unmatched(self.option, pattern, modules, "a module of the adapter"))
        return errors

    def _rule(self, text: str) -> tuple[Sequence[int], Rule[float]]:
        """The numbers of adapters, and the rule; `Refused` where the text is none."""
        expected = "[N:]REGEX=WEIGHT, N the adapter's place from 1"
        numbers, rest = of_adapters(text, len(self.weights), self.option, expected, "2:q_proj=0.5")
        (rule,) = read_rules(self.option, [rest], NUMBER, expected)
        return numbers, rule


def of_adapters(
    text: str, count: int, option: str, expected: str, example: str
) -> tuple[Sequence[int], str]:
    """The numbers of the adapters that `[N:]TEXT` is for, and the text; `Refused` for a number that
    none of so many has."""
    head, colon, rest = text.partition(":")
    if not (colon and head.isdigit()):
        return range(count), text
    if int(head) - 1 in range(count):
        return [int(head) - 1], rest
    raise Refused(
        f"{option} {shown(text)!r} of {count} adapters",
        expected=expected,
        where="options",
        hint=f"e.g. {example}",
        code="AK101",
    )


def trained_values(
    adapters: Sequence[Adapter], levels: Mapping[str, int], *, copies: bool = True
) -> dict[str, dict[int, TensorSpec]]:
    """The trained values that are no factors, by key and adapter number; keys are those in a file
    whose modules are wrapped `levels` times. Without `copies` no copies of the base's weights."""
    values: dict[str, dict[int, TensorSpec]] = {}
    for adapter in adapters:
        specs = [
            spec for name, spec in adapter.replaced.items() if copies or name not in adapter.copies
        ]
        for spec in [*specs, *(tokens.values for tokens in adapter.tokens)]:
            values.setdefault(rewrapped_key(spec.key, levels), {})[adapter.number] = spec
    return values


def value_tasks(
    adapters: Sequence[Adapter],
    weights: "AdapterWeights",
    method: Method,
    levels: Mapping[str, int],
    errors: Problems,
) -> list[Task]:
    """Tasks for values that were trained whole: copied from the one adapter of weight 1 that has
    them or from several whose values are equal, else averaged. Others join the errors."""
    _check_rows(adapters, levels, errors)
    tasks: list[Task] = []
    for key, specs in trained_values(adapters, levels).items():
        module = module_of(key)
        if all(spec in adapters[number].copies.values() for number, spec in specs.items()):
            tasks.append(_copy_of_base(adapters, key, specs, errors))
            continue
        own_weights = [weights.of(number, module) for number in specs]
        spec, several = next(iter(specs.values())), len(specs) > 1
        shares = _shares(method, own_weights)
        stored = ((adapters[number].folder, spec) for number, spec in specs.items())
        if same_bytes(*stored) if several else shares == [1.0]:
            tasks.append(CopiedTensor(key, spec, key, checked=True))
            continue
        same_shape = len({spec.shape for spec in specs.values()}) == 1
        are_floats = all(spec.dtype in dtypes.FLOATS for spec in specs.values())
        if several and same_shape and are_floats and abs(math.fsum(shares) - 1) < 1e-9:
            terms = tuple(zip(specs.values(), shares, strict=True))
            tasks.append(SummedTensor(key, key, terms, spec.dtype, spec.shape))
            continue
        shapes = "/".join(sorted({str(spec.shape) for spec in specs.values()}))
        names = ", ".join(
            f"{adapters[number].name} (weight {weight:g})"
            for number, weight in zip(specs, own_weights, strict=True)
        )
        errors.add(
            f"{shown(key)} {shapes}, trained whole by {names}",
            "one adapter of weight 1 that has it, equal values, or weights that add "
            "up to 1 with linear, mean or ema",
            "give other weights (--weight-for MODULE=W for this module), or leave an adapter out",
            where="adapters",
            code="AK305",
        )
    return tasks


def _shares(method: Method, weights: list[float]) -> list[float]:
    """The factors of a sum of values by the method; none where it is no weighted sum of several."""
    if isinstance(method, WeightedSum):
        return list(method.shares(weights))
    return weights if len(weights) == 1 else []


def _copy_of_base(
    adapters: Sequence[Adapter], key: str, specs: dict[int, TensorSpec], errors: Problems
) -> Task:
    """A task for the copy of the base's weight that these adapters have, in the widest dtype. No
    weight scales it; copies of two bases join the errors."""
    widest = max(specs, key=lambda number: dtypes.BITS[specs[number].dtype])
    first = (adapters[widest].folder, specs[widest])
    for number, spec in specs.items():
        is_same = spec.shape == first[1].shape and (
            number == widest or differing_rows(first, (adapters[number].folder, spec)) == 0
        )
        if not is_same:
            errors.add(
                f"{shown(key)}: copies of two bases in {adapters[widest].name} and "
                f"{adapters[number].name}",
                "adapters of one base",
                "merge them one after the other, with --base-copies",
                where="adapters",
                code="AK403",
            )
    return CopiedTensor(key, first[1], key, checked=True)


def check_wrappers(
    adapters: Sequence[Adapter], sites: Iterable[JoinedSite], errors: Problems
) -> None:
    """PEFT refuses modules_to_save right inside a module whose parameters are targets."""
    homes = {site.module for site in sites if site.parameter}
    saved = {
        name.rpartition(".")[0]: adapter.name
        for adapter in adapters
        for name in adapter.replaced
        if adapter.saves(name)
    }
    inside = [
        f"{shown(name)} ({adapter}) inside {shown(name.rpartition('.')[0])}"
        for name, adapter in saved.items()
        if name.rpartition(".")[0] in homes
    ]
    if inside:
        errors.add(
            f"modules_to_save {'; '.join(inside[:4])}, of which parameters are targets",
            "one of both: PEFT cannot load them together",
            "merge one adapter after the other instead",
            where="adapters",
            code="AK305",
        )


def _check_rows(adapters: Sequence[Adapter], levels: Mapping[str, int], errors: Problems) -> None:
    """Trained token rows can be joined only where they are the same rows, and of an embedding
    without factors."""
    both = {
        tokens.module: a.name for a in adapters for tokens in a.tokens if levels.get(tokens.module)
    }
    rows = {a.name: a.config["trainable_token_indices"] for a in adapters if a.tokens}
    if both:
        errors.add(
            f"trained token rows of {', '.join(map(shown, both))} "
            f"({', '.join(both.values())}) beside factors of the same module",
            "one of both: PEFT cannot load them together",
            "merge one adapter after the other instead",
            where="adapters",
            code="AK305",
        )
    elif any(its != next(iter(rows.values())) for its in rows.values()):
        errors.add(
            f"other token rows trained by each of {', '.join(rows)}",
            "the same rows",
            "combine adapters that trained the same rows",
            where="adapters",
            code="AK305",
        )
