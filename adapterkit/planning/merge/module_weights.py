"""Each adapter's weight on each module of a merge: its own, or that of --weight-for, times what
--lbw says of the module's block."""

import re
from collections.abc import Sequence

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, did_you_mean, listed, shown
from adapterkit.formats.library import architectures
from adapterkit.formats.modules.names import names_of
from adapterkit.formats.one_file import OneFileModel
from adapterkit.formats.schema import BlockWords
from adapterkit.options import finite
from adapterkit.planning.adapters.joined_values import AdapterWeights, of_adapters
from adapterkit.verbs.merge import MergeOptions

LBW = "--lbw"
EXPECTED = "[N:]NAME or [N:]NUMBERS, N the adapter's place from 1"


class ModuleWeights:
    """The weights of adapters, numbered from 1, on modules of a base."""

    def __init__(self, base: Checkpoint, weights: list[float], options: MergeOptions):
        self.base, self.lists = base, [dict[str, float]() for _ in weights]
        self.rules = AdapterWeights(weights, options.weight_for)
        self.outside: set[str] = set()  # modules of no block
        self.words = BlockWords()
        if options.lbw:
            self.words = _blocks_of(base)
        for text in options.lbw:
            numbers, rest = of_adapters(text, len(weights), LBW, EXPECTED, "2:OUTALL")
            for number in numbers:
                self.lists[number] = _weights_of(rest, self.words)

    def of(self, number: int, module: str) -> float:
        """The weight of an adapter on a module."""
        weight, blocks = self.rules.of(number - 1, module), self.lists[number - 1]
        if not blocks:
            return weight
        block = self._block(module)
        if block is None:
            self.outside.add(module)
            return weight
        return weight * blocks.get(block, 0.0)

    def _block(self, module: str) -> str | None:
        """The block that a module of the file is in."""
        assert isinstance(self.base, OneFileModel)
        for component, names, match in self.base.found(module):
            original = names_of(self.base.architecture, component, "original")
            named = original.named(names.models(match)[0])
            name = f"{component}.{named[1] if named else names.models(match)[0]}"
            for pattern, word in self.words.names.items():
                if found := re.fullmatch(pattern, name):
                    return word + "".join(f"{int(number):02}" for number in found.groups())
        return None

    def problems(self) -> list[AdapterkitError]:
        """Refusals of rules that no module matched."""
        return self.rules.problems()

    def notes(self) -> list[str]:
        """What block weights leave as it is."""
        if not self.outside:
            return []
        return [
            f"{LBW}: in no block, with the adapter's own weight: {listed(sorted(self.outside))}"
        ]


def _blocks_of(base: Checkpoint) -> BlockWords:
    """The blocks of a base's family; `Refused` where it has none."""
    known = {name: one.blocks for name, one in architectures().items() if one.blocks.lists}
    name = base.architecture if isinstance(base, OneFileModel) else None
    if name not in known:
        raise Refused(
            f"{LBW} with {'a model of ' + name if name else 'this base'}",
            expected=f"one file of a model of {', '.join(known)}",
            where="options",
            hint="give --weight-for REGEX=W",
        )
    return known[name]


def _weights_of(text: str, words: BlockWords) -> dict[str, float]:
    """The weight of each block by a preset or a list; blocks that a list lacks have none."""
    numbers = words.presets.get(text, text).split(",")
    values = [finite(number.strip()) for number in numbers]
    blocks: Sequence[str] = words.lists.get(str(len(values)), "").split()
    if None in values or not blocks:
        lengths = f"{' or '.join(words.lists)} numbers"
        known = ", ".join(words.presets)
        raise Refused(
            f"{LBW} {shown(text)!r}" + f": {len(values)} numbers" * (None not in values),
            expected=f"{known}, or {lengths}" if known else lengths,
            where="options",
            hint=did_you_mean([text], words.presets) or f"for {next(iter(words.lists.values()))}",
        )
    return {block: value for block, value in zip(blocks, values, strict=True) if value is not None}
