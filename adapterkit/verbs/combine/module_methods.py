"""The method of a combination or a merge, and for each module its method and the adapters' weights:
those of --weight-for or of a file, times the --lbw factor of the module's block."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from adapterkit.core.errors import AdapterkitError, Refused, listed
from adapterkit.core.inputs.weights_file import WeightsFile
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.options import flag_of
from adapterkit.core.outputs.cards import SUM
from adapterkit.core.registry import create, load, options
from adapterkit.core.shared_options import MethodOptions
from adapterkit.doors import MERGES
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.shared.joined_values import AdapterWeights, of_adapters

if TYPE_CHECKING:
    from adapterkit.bases.images.block_weights import BlockWeights
    from adapterkit.bases.images.pipeline import Pipeline
    from adapterkit.core.checkpoint.spec import Checkpoint
    from adapterkit.core.merge.verb import MergeOptions

DENSITY_FOR = "--density-for"
EXPECTED = "[N:]NAME, [N:]NUMBERS or [N:]FILE[:NAME], N the adapter's position from 1"
WeightOf = Callable[[int, str], float]  # by the adapter's number, from 1, and the module


def method_of(name: str, given: MethodOptions) -> Method:
    """The method's record; `Refused` for unknown or missing options."""
    settings = {"density": given.density, "majority": given.majority} | (given.settings or {})
    try:
        return cast(Method, create("combinations", name, settings))
    except AdapterkitError as error:
        load("verbs.combine.refused_methods:explain")(error, name)
        raise


def added_by(options: "MergeOptions") -> str:
    """The formula of the values that a merge adds to weights."""
    if options.method in (None, "linear"):
        return SUM
    return f"{options.method}({SUM[2:]}, ...)), {method_of(options.method, options).source}"


def resolved_weights(
    method: Method, given: Sequence[float], weight_for: Iterable[str], file: WeightsFile | None
) -> list[float]:
    """The adapters' weights, resolved by the method; `Refused` if the method's own weights and
    --weight-for or --weights conflict."""
    equal = [1.0] * len(given)
    other = "--weights" if file else "--weight-for" * bool(tuple(weight_for))
    if other and (method.resolve_weights(equal) != equal or method.over != "module"):
        raise Refused(
            f"{other}, and an option of the method that sets the weights too",
            expected="one of them",
            where="options",
            hint=f"remove {other}, or the method's option",
            code="AK102",
        )
    return method.resolve_weights(given)


class ModuleMethods:
    """A method, with the --density-for densities of the modules that match."""

    def __init__(self, method: Method, count: int, texts: Iterable[str]):
        texts, self.method = tuple(texts), method
        self.names = options(type(method))
        if texts and "density" not in self.names:
            raise Refused(
                f"{DENSITY_FOR} with {method.name}",
                expected="a method with a density",
                where="options",
                hint=f"remove {DENSITY_FOR}",
                code="AK102",
            )
        own = getattr(method, "density", 1.0)
        self.densities = AdapterWeights([own] * count, texts, option=DENSITY_FOR)
        self.is_one = not texts

    def of(self, module: str, numbers: Sequence[int]) -> Method:
        """The method on a module for adapters of these numbers, from 0."""
        if self.is_one:
            return self.method
        densities = tuple(self.densities.of(number, module) for number in numbers)
        if len({*densities}) == 1:
            return replace(cast(Any, self.method), density=densities[0])
        if "densities" in self.names:
            return replace(cast(Any, self.method), densities=densities)
        raise Refused(
            f"{self.method.name} with densities {', '.join(f'{one:g}' for one in densities)}",
            expected="one for all adapters of a module",
            where=DENSITY_FOR,
            hint="use --method gta, which takes a density for each adapter",
            code="AK102",
        )

    def problems(self) -> list[AdapterkitError]:
        """Refusals of rules that no module matched."""
        return self.densities.problems()


class ModuleWeights:
    """The weights of adapters, numbered from 1, on modules of a base; names of a pipeline's modules
    begin with their component."""

    def __init__(
        self,
        base: "Checkpoint | Pipeline",
        weights: list[float],
        options: "MergeOptions",
        file: WeightsFile | None = None,
    ):
        if options.method is not None:
            method = load("verbs.combine.refused_methods:mergeable")(options, len(weights))
            weights = resolved_weights(method, weights, options.weight_for, file)
        self.rules = AdapterWeights(weights, options.weight_for, file)
        self.blocks: list[BlockWeights | None] = [None for _ in weights]
        self.outside: set[str] = set()  # modules of no block
        if options.lbw:
            self._read_blocks(base, options.lbw)

    def _read_blocks(self, base: "Checkpoint | Pipeline", texts: Iterable[str]) -> None:
        blocks_of = load(MERGES["blocks"]).of
        names, count, option = load(MERGES["block names"])(base), len(self.blocks), flag_of("lbw")
        for text in texts:
            numbers, rest = of_adapters(text, count, option, EXPECTED, "2:OUTALL")
            own = blocks_of(rest, names)
            for number in numbers:
                self.blocks[number] = own

    def of(self, number: int, module: str) -> float:
        """The weight of an adapter on a module."""
        weight, blocks = self.rules.of(number - 1, module), self.blocks[number - 1]
        factor = 1.0 if blocks is None else blocks.factor(module)
        if factor is None:
            self.outside.add(module)
            return weight
        return weight * factor

    def of_part(self, part: str, numbers: Sequence[int]) -> WeightOf:
        """The weights in a component of a pipeline, for the adapters of these numbers, counted from
        1 there."""
        return lambda number, module: self.of(numbers[number - 1], f"{part}.{module}")

    def problems(self) -> list[AdapterkitError]:
        """Refusals of rules that no module matched."""
        return self.rules.problems()

    def notes(self) -> list[str]:
        """A note on the modules outside of all blocks."""
        if not self.outside:
            return []
        names = listed(sorted(self.outside))
        return [f"{flag_of('lbw')}: in no block, with the adapter's own weight: {names}"]
