"""Find the modules and stacks of experts on which a new adapter starts, with ranks, scales, and the
storage of factors and weights."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

from adapterkit.adapters.kinds.dora_deltas import stored_weight
from adapterkit.bases.quantized.planning.weights import is_stack, known_model
from adapterkit.core.adapter.factors import Place
from adapterkit.core.adapter.keys import factor_keys
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.options import ABOVE_0, COUNT
from adapterkit.core.patterns import pattern_table, read_rules
from adapterkit.core.records import Json
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.verbs.init.records import Init
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.targets import PARAMETER, StoredResolver, Target, entries_of

RANGE = re.compile(r"\d+(-\d+)?")
KINDS = {"conv1d": "linear", PARAMETER: "experts"}  # kind -> its name in inits, if different


@dataclass(frozen=True, kw_only=True)
class InitialTarget(Target):
    """A target of a stored model: a linear layer, an embedding, a convolution ("conv"), or a stack
    of experts."""

    weight: StoredParameter
    place: Place
    depth: int = 0  # wrappers of the module's other parameters around this one's

    @property
    def factors_kind(self) -> str:
        """PEFT's kind of its factors."""
        return "embedding" if self.kind == "embedding" else "module"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of its factors' product, a kernel's axes flattened."""
        return self.place.out, math.prod(self.place.a_tail)


def find_targets(base: Checkpoint, options: Init, notes: list[str]) -> list[InitialTarget]:
    """The targets in the model's order; `Refused` with all names that match none, and all modules
    whose weights cannot be read.

    `base`: the decoded view. Without `targets`, PEFT's defaults for the model's type."""
    names = known_model(base, notes)
    resolver = _resolver(names, options, notes)
    order = {name: number for number, name in enumerate(resolver.modules)}
    errors = Problems()
    targets: list[InitialTarget] = []
    for target in sorted(resolver.resolve(), key=lambda target: order[target.path]):
        with errors.collected():
            targets.append(_target(names, target))
    errors.raise_all()
    return _nested(names, targets)


def _resolver(names: Names, options: Init, notes: list[str]) -> StoredResolver:
    """The resolver of the targets; `Refused` for invalid texts of these options."""
    assert names.model is not None
    ranks = read_rules("--rank-for", options.rank_for, COUNT, "REGEX=N")
    alphas = read_rules("--alpha-for", options.alpha_for, ABOVE_0, "REGEX=A")
    config = LoraConfig(
        options.rank,
        options.lora_alpha,
        None if options.targets is None else entries_of("--targets", options.targets),
        rslora=options.rslora,
        rank_pattern=pattern_table(ranks),
        alpha_pattern=pattern_table(alphas),
        exclude=None if options.exclude is None else entries_of("--exclude", options.exclude),
    )
    resolver = StoredResolver(names, config, notes)
    resolver.alpha = options.alpha
    resolver.layers = None if options.layers is None else _numbers(options.layers)
    resolver.stacks = [name for name, weight in names.model.state.items() if is_stack(name, weight)]
    return resolver


def _numbers(text: str) -> list[int]:
    """The layer numbers in a text such as `0-11,20`."""
    numbers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if not RANGE.fullmatch(part) or int(last or first) < int(first):
            raise Refused(
                f"--layers {shown(part)!r}",
                expected="numbers and ranges",
                where="options",
                hint="give the layers, for example 0-11,20",
                code="AK101",
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def _target(names: Names, target: Target) -> InitialTarget:
    name, kind = target.name, KINDS.get(target.kind, target.kind)
    parameter = name if kind == "experts" else f"{name}.weight"
    weight = stored_weight(names, target.path, parameter, "remove it from --targets")
    if kind == "experts":
        transposed = names.transposed_experts(target.path)
    else:
        transposed = kind == "embedding" or names.transposed(target.path)
    weight = replace(weight, transposed=transposed)
    shape, experts = weight.weight_shape, None
    if kind == "experts":
        experts, *matrix = weight.shape
        shape = tuple(matrix[::-1] if weight.transposed else matrix)
    place_kind = "embedding" if kind == "embedding" else "module"
    place = Place.of_weight(target.path, shape, place_kind, experts)
    found: Json = vars(target) | {"kind": kind}
    return InitialTarget(**found, weight=weight, place=place)


def _nested(names: Names, targets: list[InitialTarget]) -> list[InitialTarget]:
    """The targets with keys for a file in which PEFT wraps modules once for each of their
    parameters; the last one in the module's code is outermost."""
    stacks = Counter(target.path for target in targets if target.kind == "experts")
    if not stacks:
        return targets
    depths: dict[str, int] = {}
    for module in stacks:
        leaves = names.children(module) or []
        own = [t.name for t in targets if t.kind == "experts" and t.path == module]
        own.sort(key=lambda name: leaves.index(name.rpartition(".")[2]))
        depths |= {name: len(own) - 1 - i for i, name in enumerate(own)}
    nested = []
    for target in targets:
        depth = depths.get(target.name, 0)
        a_key, b_key = factor_keys(target.path, stacks, depth, target.factors_kind)
        place = replace(target.place, a_key=a_key, b_key=b_key)
        nested.append(replace(target, place=place, depth=depth))
    return nested
