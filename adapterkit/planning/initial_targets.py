"""The modules and stacks of experts on which a new adapter starts: which, with which rank and
scale, and where their factors and weights are stored."""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.adapters.keys import factor_keys
from adapterkit.adapters.targets import ALL_LINEAR, USUAL_TARGETS, WHOLE, has_end
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.options import finite
from adapterkit.planning.new_adapter import Scaling, select_targets, wrappable
from adapterkit.planning.quantization import is_stack, known_model
from adapterkit.planning.rules import Rule, last_match, read_rules, selecting, unmatched_rules
from adapterkit.weights.linear import is_linear
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import Parameter, StoredParameter

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
OTHERS = ("embedding", "experts")  # kinds that no code passes by
RANGE = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True)
class Rules:
    """Rank and alpha of each module by a `Scaling`."""

    scaling: Scaling
    ranks: Sequence[Rule[int]]
    alphas: Sequence[Rule[float]]

    def of(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a module or parameter."""
        rank = last_match(self.ranks, name, self.scaling.rank)
        alpha = self.scaling.alpha if self.scaling.alpha is not None else rank
        return rank, last_match(self.alphas, name, alpha)

    def unmatched(self, names: Collection[str]) -> list[AdapterkitError]:
        return unmatched_rules((*self.ranks, *self.alphas), names, "a module that gets factors")


def _rules_of(scaling: Scaling) -> Rules:
    ranks = read_rules("--rank-for", scaling.rank_for, _rank, "REGEX=N, N a whole number above 0")
    alphas = read_rules("--alpha-for", scaling.alpha_for, _alpha, "REGEX=A, A a number above 0")
    return Rules(scaling, ranks, alphas)


def _rank(text: str) -> int | None:
    try:
        rank = int(text)
    except ValueError:
        return None
    return rank if rank > 0 else None


def _alpha(text: str) -> float | None:
    alpha = finite(text)
    return alpha if alpha is not None and alpha > 0 else None


@dataclass(frozen=True)
class Target:
    """A module, or a stack of experts, that gets factors."""

    name: str  # of the module, or of the stack's parameter
    module: str
    kind: str  # linear, embedding, conv, experts
    weight: StoredParameter
    place: Place
    rank: int
    alpha: float
    scale: float
    depth: int = 0  # wrappers of the module's other parameters around this one's

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of its factors' product, a kernel's axes flattened."""
        return self.place.out, math.prod(self.place.a_tail)

    @property
    def is_parameter(self) -> bool:
        return self.kind == "experts"


@dataclass(frozen=True)
class Selection:
    """The options that say which modules get factors."""

    targets: str | None = None
    exclude: str | None = None
    layers: str | None = None


def find_targets(
    base: Checkpoint, selection: Selection, scaling: Scaling, notes: list[str]
) -> list[Target]:
    """The targets in the model's order; `Refused` with all names that match none, and all modules
    whose weights cannot be read.

    `base` as it decodes. Without `targets`, PEFT's for the model's type."""
    names = known_model(base, notes)
    kinds = _kinds(names)
    layers = [name for name, kind in kinds.items() if kind in ("linear", "conv")]
    usable = set(wrappable(names, layers, notes))
    fit = {name: kind for name, kind in kinds.items() if kind in OTHERS or name in usable}
    chosen = _selected(names, kinds, fit, selection, notes)
    rules, errors = _rules_of(scaling), list[AdapterkitError]()
    targets: list[Target] = []
    for name in chosen:
        try:
            targets.append(_target(names, name, kinds[name], rules))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all([*errors, *rules.unmatched(chosen)])
    return _nested(names, targets)


def _kinds(names: Names) -> dict[str, str]:
    """The kind of every layer that can get factors, by its name."""
    from torch import nn

    assert names.model is not None
    kinds: dict[str, str] = {}
    for name, module in names.model.model.named_modules():
        if is_linear(module):
            kinds[name] = "linear"
        elif isinstance(module, nn.Embedding):
            kinds[name] = "embedding"
        elif type(module).__name__ in CONVOLUTIONS:
            kinds[name] = "conv"
        for leaf, weight in module.named_parameters(name, recurse=False):
            if is_stack(leaf, weight):
                kinds[leaf] = "experts"
    return kinds


def _selected(
    names: Names,
    kinds: dict[str, str],
    fit: dict[str, str],
    selection: Selection,
    notes: list[str],
) -> list[str]:
    """The names of those of all layers that are `fit` and that the options select, in the model's
    order."""
    model = names.model.model if names.model is not None else None
    text = _usual(names, fit) if selection.targets is None else selection.targets
    without_factors = "passed by in PEFT, or its weight is read by others"
    if text.lower() == ALL_LINEAR:
        kinds, fit = (
            {name: kind for name, kind in table.items() if kind == "linear"}
            for table in (kinds, fit)
        )
    chosen, more = select_targets(text, list(fit), model, without_factors, list(kinds))
    notes += more
    if selection.exclude is not None:
        chosen = _excluded(chosen, fit, selection.exclude)
    if selection.layers is not None:
        chosen = _in_layers(chosen, selection.layers)
    if not chosen:
        raise Refused(
            "no module is a target",
            expected="one or more",
            where="--targets",
            hint="check --exclude and --layers",
        )
    order = {name: number for number, name in enumerate(fit)}
    return sorted(chosen, key=order.__getitem__)


def _usual(names: Names, fit: Collection[str]) -> str:
    """PEFT's targets for the model's type, as `--targets`: those of several that match."""
    kind = names.base.config.get("model_type")
    usual = USUAL_TARGETS.get(str(kind))
    if isinstance(usual, tuple):
        usual = tuple(end for end in usual if any(has_end(name, end) for name in fit)) or usual
    if usual is None:
        raise Refused(
            f"no usual targets of model type {shown(str(kind))}",
            expected="--targets",
            where="--targets",
            hint="give --targets all-linear, or ends of modules' names",
        )
    return WHOLE.format(usual) if isinstance(usual, str) else ",".join(usual)


def _excluded(chosen: list[str], kinds: Collection[str], exclude: str) -> list[str]:
    matches = selecting("--exclude", exclude, kinds)
    return [name for name in chosen if not matches(name)]


def _in_layers(chosen: list[str], text: str) -> list[str]:
    """Those in the layers `0-11,20`: by the first number among the parts of a name."""
    parts = text.replace(" ", "").split(",")
    numbers: set[int] = set()
    for part in parts:
        first, _, last = part.partition("-")
        if not RANGE.fullmatch(part) or int(last or first) < int(first):
            raise Refused(
                f"--layers {shown(part)!r}",
                expected="numbers and ranges, e.g. 0-11,20",
                where="--layers",
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    layer_of = {name: _layer(name) for name in chosen}
    missing = sorted(numbers - {*layer_of.values()} - {None})
    if missing:
        raise Refused(
            f"--layers {', '.join(map(str, missing[:4]))}: no target there",
            expected="layers with targets",
            where="--layers",
            hint="check the number of layers",
        )
    return [name for name in chosen if layer_of[name] in numbers]


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _target(names: Names, name: str, kind: str, rules: Rules) -> Target:
    module = name.rpartition(".")[0] if kind == "experts" else name
    parameter = names.parameter(name if kind == "experts" else f"{name}.weight")
    weight = _weight(names, module, kind, parameter, name)
    rank, alpha = rules.of(name)
    shape, experts = weight.weight_shape, None
    if kind == "experts":
        experts, *matrix = weight.shape
        shape = tuple(matrix[::-1] if weight.transposed else matrix)
    place = Place.of_weight(
        module, shape, "embedding" if kind == "embedding" else "module", experts
    )
    scale = rules.scaling.scale_of(rank, alpha)
    return Target(name, module, kind, weight, place, rank, alpha, scale)


def _weight(
    names: Names, module: str, kind: str, parameter: Parameter | None, name: str
) -> StoredParameter:
    base = names.base
    if parameter is None or 0 in parameter.shape:
        raise Refused(
            f"no weight of {shown(name)}",
            expected="a stored weight for each target",
            where=base.name,
            hint="remove it from --targets",
        )
    if kind == "conv" and names.groups(module) > 1:
        raise Refused(
            f"a grouped convolution: {shown(module)} has {names.groups(module)} groups",
            expected="groups 1 (PEFT cannot merge these either)",
            where=base.name,
            hint="remove it from --targets",
        )
    weight = StoredParameter.of(parameter, base.tensors)
    if not weight.dtypes <= set(dtypes.FLOATS):
        raise Refused(
            f"{shown(name)} is {', '.join(sorted(weight.dtypes))}",
            expected=" ".join(dtypes.FLOATS),
            where=base.name,
            hint="dequantize it first",
        )
    if kind == "experts":
        transposed = names.transposed_experts(module)
    else:
        transposed = kind == "embedding" or names.transposed(module)
    return replace(weight, transposed=transposed)


def _nested(names: Names, targets: list[Target]) -> list[Target]:
    """The targets with keys for a file in which PEFT wraps modules for their parameters: once for
    each, the last one of the module's code outermost."""
    stacks = Counter(target.module for target in targets if target.is_parameter)
    if not stacks:
        return targets
    depths: dict[str, int] = {}
    for module in stacks:
        leaves = names.children(module) or []
        own = [t.name for t in targets if t.is_parameter and t.module == module]
        own.sort(key=lambda name: leaves.index(name.rpartition(".")[2]))
        depths |= {name: len(own) - 1 - i for i, name in enumerate(own)}
    nested = []
    for target in targets:
        depth = depths.get(target.name, 0)
        kind = "embedding" if target.kind == "embedding" else "module"
        a_key, b_key = factor_keys(target.module, stacks, depth, kind)
        place = replace(target.place, a_key=a_key, b_key=b_key)
        nested.append(replace(target, place=place, depth=depth))
    return nested
