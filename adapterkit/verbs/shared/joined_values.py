"""Read several adapters, check that their deltas can be summed, and weigh them by module."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.adapter.targets import Patterns
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.commands import PLAIN, WITHOUT_INITIAL
from adapterkit.core.errors import AdapterkitError, Problems, Refused, did_you_mean, listed, shown
from adapterkit.core.options import NUMBER
from adapterkit.core.patterns import Rule, pattern_table, read_rules

if TYPE_CHECKING:
    from adapterkit.core.inputs.weights_file import WeightsFile

OPTION, WEIGHTS = "--weight-for", "--weights"


def read_all(folders: Sequence[Folder]) -> list[Adapter]:
    """The adapters of these folders, numbered from 0; `Refused` with every problem."""
    adapters, errors = [], Problems()
    for number, folder in enumerate(folders):
        with errors.collected():
            adapters.append(read_adapter(folder, number))
    errors.raise_all()
    return adapters


def delta_problems(
    adapter: Adapter, dora: str = PLAIN, *, sums: bool = False
) -> list[AdapterkitError]:
    """Reasons why an adapter's delta is not scale * b @ a on the base that it names; `dora`: the
    hint for a DoRA; `sums`: the caller checks the weights of adapters of one changed base."""
    errors = Problems(where=adapter.where, code="AK304")
    init = adapter.changed_base() or (None if sums else adapter.base_change)
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
    """Each adapter's weight on each module, or another number by `option`: its own, that of the
    first matching rule of the option, or that of a file of weights."""

    def __init__(
        self,
        weights: list[float],
        texts: Iterable[str],
        file: "WeightsFile | None" = None,
        option: str = OPTION,
    ):
        self.weights, self.file, self.option = weights, file, option
        self.given = [self._rule(text) for text in texts]
        rules = [
            [rule for numbers, rule in self.given if n in numbers] for n in range(len(weights))
        ]
        self.patterns = [Patterns(pattern_table(its), self.option) for its in rules]
        self.modules: list[set[str]] = [set() for _ in weights]  # of each adapter, so far
        self.scale = 1.0  # of all of them
        self.skipped: set[str] = (
            set()
        )  # modules that stay unchanged, even if the file has weights for them

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
        """The weight of an adapter on a module or parameter, and its factors, scaled by the weights
        of their directions; `Refused` if there are too many or too few of these."""
        weight = None if self.file is None else self.file.weights_of(number, name)
        if not isinstance(weight, tuple):
            return self.of(number, factors.module if self.file is None else name), factors
        self.modules[number].add(name)
        if len(weight) != factors.count:
            each = f", {factors.experts} experts one after the other" if factors.experts else ""
            raise Refused(
                f"{shown(name)}: adapter {number + 1} has {len(weight)} weights of directions",
                expected=f"{factors.count}, one for each singular triplet{each}",
                where=WEIGHTS,
                hint="fit the weights to these adapters\n"
                "adapterkit fit BASE ADAPTERS --data FILE --out weights.json",
                code="AK112",
            )
        return self.scale * any(weight), replace(factors, directions=weight)

    def problems(self) -> list[AdapterkitError]:
        """Refusals of the rules, and of names in the file, that no module matched so far."""
        errors = Problems(code="AK112")
        known = set().union(self.skipped, *self.modules)
        # a module that is left out may be one of parameters, which are not looked up then
        is_known = lambda name: name in known or name.rpartition(".")[0] in self.skipped
        unknown = [name for name in (self.file.modules if self.file else ()) if not is_known(name)]
        # only a base determines the parameter of a module's factors
        several = {name.partition("[")[0] for name in known if "[" in name}
        parameters = [name for name in unknown if name.rpartition(".")[0] in several]
        if unknown:
            errors.add(
                f"weights of {len(unknown)} modules that no adapter has: {listed(unknown)}",
                "names of modules, of experts with their parameter's",
                (did_you_mean(unknown[:3], known) if not parameters else "give --base")
                or "remove them from the file",
                where=WEIGHTS,
            )
        for numbers, (pattern, value) in self.given:
            modules = set().union(*(self.modules[number] for number in numbers))
            if Patterns({pattern: value}, self.option).unmatched(modules):
                from adapterkit.core.adapter.unmatched import unmatched

                errors.append(unmatched(self.option, pattern, modules, "a module of the adapter"))
        return errors

    def _rule(self, text: str) -> tuple[Sequence[int], Rule[float]]:
        """The numbers of adapters, and the rule; `Refused` for an invalid text."""
        expected = "[N:]REGEX=WEIGHT, N the adapter's position from 1"
        numbers, rest = of_adapters(text, len(self.weights), self.option, expected, "2:q_proj=0.5")
        (rule,) = read_rules(self.option, [rest], NUMBER, expected)
        return numbers, rule


def of_adapters(
    text: str, count: int, option: str, expected: str, example: str
) -> tuple[Sequence[int], str]:
    """The numbers of the adapters that `[N:]TEXT` applies to, and the text; `Refused` for a number
    above `count`."""
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
