"""Each adapter's weight on each module of a merge: its own, that of --weight-for or of a file of
weights, times what --lbw says of the module's block."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from adapterkit.core.adapter.weights_file import WeightsFile
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, listed
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.options import flag_of
from adapterkit.core.registry import load
from adapterkit.doors import MERGES
from adapterkit.verbs.combine.module_methods import method_of, resolved_weights
from adapterkit.verbs.shared.joined_values import AdapterWeights, of_adapters

if TYPE_CHECKING:
    from adapterkit.bases.images.block_weights import BlockWeights
    from adapterkit.bases.images.pipeline import Pipeline

EXPECTED = "[N:]NAME, [N:]NUMBERS or [N:]FILE[:NAME], N the adapter's place from 1"
WeightOf = Callable[[int, str], float]  # by the adapter's number, from 1, and the module


class ModuleWeights:
    """The weights of adapters, numbered from 1, on modules of a base, those of a pipeline with the
    part's name in front."""

    def __init__(
        self,
        base: "Checkpoint | Pipeline",
        weights: list[float],
        options: MergeOptions,
        file: WeightsFile | None = None,
    ):
        if options.method is not None:
            method = method_of(options.method, options)
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
        """The weights in a part of a pipeline, of the adapters of these numbers, which are counted
        from 1 there."""
        return lambda number, module: self.of(numbers[number - 1], f"{part}.{module}")

    def problems(self) -> list[AdapterkitError]:
        """Refusals of rules that no module matched."""
        return self.rules.problems()

    def notes(self) -> list[str]:
        """What block weights leave as it is."""
        if not self.outside:
            return []
        names = listed(sorted(self.outside))
        return [f"{flag_of('lbw')}: in no block, with the adapter's own weight: {names}"]
