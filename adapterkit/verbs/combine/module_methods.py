"""The method of a combination, and what it is on each module."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from adapterkit.core.adapter.weights_file import WeightsFile
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.outputs.cards import SUM
from adapterkit.core.registry import create, options
from adapterkit.core.shared_options import MethodOptions
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.shared.joined_values import AdapterWeights

DENSITY_FOR = "--density-for"


def method_of(name: str, given: MethodOptions) -> Method:
    """The method's record; `Refused` for options that it does not have, or lacks."""
    settings = {"density": given.density, "majority": given.majority} | (given.settings or {})
    return cast(Method, create("combinations", name, settings))


def added_by(options: MergeOptions) -> str:
    """What a merge adds to weights, in words."""
    if options.method in (None, "linear"):
        return SUM
    return f"{options.method}({SUM[2:]}, ...)), {method_of(options.method, options).source}"


def resolved_weights(
    method: Method, given: Sequence[float], weight_for: Iterable[str], file: WeightsFile | None
) -> list[float]:
    """The adapters' weights as the method has them; `Refused` where --weight-for or --weights means
    others."""
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
    """A method, with the densities of --density-for on the modules that these match."""

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
        """The method on a module that adapters of these numbers, from 0, have."""
        if self.is_one:
            return self.method
        densities = tuple(self.densities.of(number, module) for number in numbers)
        if len({*densities}) == 1:
            return self._with(density=densities[0])
        if "densities" in self.names:
            return self._with(densities=densities)
        raise Refused(
            f"{self.method.name} with densities {', '.join(f'{one:g}' for one in densities)}",
            expected="one for all adapters of a module",
            where=DENSITY_FOR,
            hint="use --method gta, whose adapters may have each their own",
            code="AK102",
        )

    def _with(self, **values: object) -> Method:
        return replace(cast(Any, self.method), **values)

    def problems(self) -> list[AdapterkitError]:
        """Refusals of rules that no module matched."""
        return self.densities.problems()
