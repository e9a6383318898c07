"""Find the parameters that transformers' loader misses in a checkpoint and initializes at random.

Only the model's code lists its parameters, and it takes seconds to import. Names and shapes alone
show whether a stack of equal layers is complete; `looks_whole` checks that."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.core.checkpoint.spec import LAYER_COUNTS, Checkpoint
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, listed, shown
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.names import plain_names
from adapterkit.core.weights.parameters import Unsupported, extent

if TYPE_CHECKING:
    from adapterkit.core.weights.skeleton import Skeleton

NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Gaps:
    """The parameters that the loader of a class misses in a checkpoint, by name."""

    base: str
    class_name: str
    backbone: str  # the class without the head, if only the head is missing
    stored: frozenset[str]  # patterns of the names of stored parameters, with # for numbers
    count: int  # number of all parameters
    missing: tuple[str, ...]
    misshapen: dict[str, tuple[Shape, Shape]]  # stored, the model's
    failed: dict[str, AdapterkitError]  # conversions
    unused: tuple[str, ...]  # keys without a parameter

    def without(self, names: Collection[str]) -> "Gaps":
        """These gaps except parameters that come from elsewhere."""
        missing = tuple(name for name in self.missing if name not in names)
        misshapen = {name: both for name, both in self.misshapen.items() if name not in names}
        return replace(self, missing=missing, misshapen=misshapen)

    @property
    def holes(self) -> tuple[str, ...]:
        """Missing parameters that other layers have: no model lacks these on purpose."""
        return tuple(name for name in self.missing if NUMBER.sub("#", name) in self.stored)

    def errors(self) -> list[AdapterkitError]:
        """A problem for each kind of gap."""
        errors = Problems(
            list({str(e): e for e in self.failed.values()}.values()),
            where=self.base,
            kind=Damaged,
            code="AK405",
        )
        if self.missing:
            every = len(self.missing) == self.count
            what = f"all {self.count}" if every else f"{len(self.missing)} of {self.count}"
            errors.add(
                f"{what} parameters of {self.class_name} are not stored: {listed(self.missing)}",
                "every parameter: a loader sets the missing ones at random",
                self._hint(),
            )
        if self.misshapen:
            texts = [
                f"{shown(name)} {stored}, not {wanted}"
                for name, (stored, wanted) in self.misshapen.items()
            ]
            errors.add(
                f"{len(texts)} parameters of other shapes than {self.class_name}'s: "
                f"{listed(texts)}",
                "the shapes that config.json says: a loader refuses others",
                "restore the weights, or correct config.json",
            )
        return errors

    def _hint(self) -> str:
        if self.unused:
            count = len(self.unused)
            return f"rename the tensors that are never read ({count}: {listed(self.unused)})"
        if self.backbone:
            return (
                "restore the head, or in config.json set tie_word_embeddings if the embedding is "
                f"it, or the class {self.backbone} if there is to be none"
            )
        return "restore them from the source of the weights"


def find_gaps(model: "Skeleton") -> Gaps:
    """The gaps of a checkpoint for a class."""
    ignored = model.model._keys_to_ignore_on_load_missing
    known = re.compile("|".join(f"({pattern})" for pattern in ignored)) if ignored else None
    # the first name of each parameter, by its other names
    groups = {
        name: next(n for n in model.state if n in {name, *others})
        for name, others in model.tied.items()
        if name in model.state
    }
    missing, misshapen = [], {}
    for name, value in model.state.items():
        parameter = model.parameters.get(name)
        if parameter is not None:
            shape, wanted = extent(parameter.slots), tuple(value.shape)
            if shape != wanted and not parameter.is_alias:
                misshapen[name] = (shape, wanted)
        elif (
            value.is_floating_point()  # integers are counters, which are not initialized at random
            and name not in model.unreadable
            and not (known and known.search(name))
            and groups.get(name, name) == name
        ):
            missing.append(name)
    failed = {
        name: error
        for name, error in model.unreadable.items()
        if not isinstance(error.__cause__, Unsupported)
    }
    prefix = f"{model.model.base_model_prefix}."
    is_headless = missing and prefix != "." and not any(n.startswith(prefix) for n in missing)
    has_base = model.model.base_model is not model.model
    return Gaps(
        model.base.name,
        type(model.model).__name__,
        type(model.model.base_model).__name__ if is_headless and has_base else "",
        frozenset(NUMBER.sub("#", name) for name in model.parameters),
        len(model.state.keys() - (groups.keys() - groups.values())),
        tuple(missing),
        misshapen,
        failed,
        tuple(model.unused),
    )


def gaps_of(base: Checkpoint) -> Gaps:
    """The gaps of a checkpoint for the class in its config; `Refused` if that is unknown."""
    from adapterkit.core.weights.skeleton import Skeleton

    classes = [str(name) for name in base.config.get("architectures") or ()]
    if not base.config.get("model_type"):
        raise Refused("no model_type", where=f"{base.name}/config.json", code="AK405")
    return find_gaps(Skeleton(decoded_view(base), classes[0] if classes else "AutoModel"))


def looks_whole(base: Checkpoint) -> bool:
    """Return whether keys are names, all layers have the same ones, their number is the config's,
    and the other keys include a norm, an embedding and, unless tied, a head."""
    config = base.config
    stacks: dict[str, dict[int, set[str]]] = {}  # by the names before the number
    others: list[Shape] = []
    for key, spec in base.tensors.items():
        if number := NUMBER.search(key):
            layers = stacks.setdefault(key[: number.start()], {})
            layers.setdefault(int(number[0]), set()).add(key[number.end() :])
        else:
            others.append(spec.shape)
    if len(stacks) != 1 or not plain_names(config):
        return False
    ((prefix, layers),) = stacks.items()
    counts = {config.get(name) for name in LAYER_COUNTS} - {None}
    embeddings = sum(shape[:1] == (config.get("vocab_size"),) for shape in others)
    return (
        prefix.count(".") <= 2  # no prefix was added to the names
        and counts == {len(layers)}
        and sorted(layers) == list(range(len(layers)))
        and all(names == layers[0] for names in layers.values())
        and any(len(shape) == 1 for shape in others)
        and embeddings >= (1 if config.get("tie_word_embeddings") is True else 2)
    )
