"""A new adapter on a base: target modules, scaling, and where the factors of a linear layer go."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.patterns import matcher, similar_names
from adapterkit.plan import Task
from adapterkit.planning import adapter_config, adapter_output
from adapterkit.planning.quantization import is_linear
from adapterkit.weights.bypassed import is_bypassed
from adapterkit.weights.names import Names

NAMES = re.compile(r"[\w.-]+( *, *[\w.-]+)*")  # no regex: a dot is one of the names'
HEADS = ("score", "classifier")  # what PEFT takes for a classifier's head


@dataclass(frozen=True)
class Scaling:
    """What the factors' product is multiplied by: alpha / rank, or alpha / √rank; alpha is the rank unless it is given."""

    rank: int
    alpha: float | None
    rslora: bool

    @property
    def given(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.given / (math.sqrt(self.rank) if self.rslora else self.rank)


def targeted(
    targets: str, usable: Collection[str], model: Any, lacking: str
) -> tuple[list[str], list[str]]:
    """Of the modules that can get factors those that `--targets` means, and a note; `Refused` with all names that mean none.

    `all-linear`, as in PEFT: all linear layers but the output head, also that of a classifier; ends of modules' names, with commas
    between; or, where it holds other characters, a regex that is found in a name. `lacking`: what a layer is that cannot."""
    classes = (
        {name: type(module).__name__ for name, module in model.named_modules()}
        if model is not None
        else {}
    )
    linear = (
        [name for name, module in model.named_modules() if is_linear(module)]
        if model is not None
        else list(usable)
    )
    if targets.lower() == "all-linear":
        wanted = [name for name in linear if name not in _heads(model)]
        found, left = (
            [name for name in wanted if name in usable],
            [name for name in wanted if name not in usable],
        )
        named = ", ".join(map(shown, left[:3])) + (
            f" and {len(left) - 3} more" if len(left) > 3 else ""
        )
        notes = [f"--targets all-linear: no factors for {named}: {lacking}"] if left else []
        if not found:
            raise Refused(
                "--targets all-linear matches none",
                expected="a linear layer",
                where="--targets",
                hint="check the model",
            )
        return found, notes
    if not NAMES.fullmatch(targets):
        wanted = matcher(targets, "--targets")
        found = [name for name in usable if wanted(name)]
        if not found:
            raise Refused(
                f"--targets {targets!r} matches none",
                expected="a linear layer that can get factors",
                where="--targets",
                hint=similar_names(targets, usable) or "check the regex",
            )
        return found, []
    ends = {end: _ending(end, usable) for end in targets.replace(" ", "").split(",")}
    errors: list[AdapterkitError] = []
    for end in (end for end, found in ends.items() if not found):
        other = next(iter(_ending(end, linear) or _ending(end, classes)), None)
        why = (
            ""
            if other is None
            else f": {shown(other)} is {lacking if other in linear else f'a {classes[other]}'}"
        )
        errors.append(
            Refused(
                f"--targets {end!r} matches none{why}",
                expected="the end of the name of a linear layer that can get factors",
                where="--targets",
                hint=(similar_names(end, usable) if other is None else "") or "check the names",
            )
        )
    refuse_all(errors)
    return [name for name in usable if any(name in found for found in ends.values())], []


def wrappable(names: Names, modules: Iterable[str], notes: list[str]) -> list[str]:
    """Of linear layers those on which PEFT's factors act; the others go to the notes."""
    modules = list(modules)
    bypassed = [module for module in modules if is_bypassed(names, module)]
    if bypassed:
        said = ", ".join(map(shown, bypassed[:3])) + (
            f" and {len(bypassed) - 3} more" if len(bypassed) > 3 else ""
        )
        notes.append(
            f"no factors for {said}: PEFT refuses them, or the model's code reads the weight itself"
        )
    return [module for module in modules if module not in bypassed]


def _ending(end: str, modules: Iterable[str]) -> list[str]:
    return [name for name in modules if f".{name}".endswith(f".{end}")]


def _heads(model: Any) -> list[str]:
    """The output layer; where there is none, a classifier's."""
    if model is None:
        return []
    output = model.get_output_embeddings()
    if output is None and type(model).__name__.endswith("ForSequenceClassification"):
        output = next(
            (getattr(model, name) for name in HEADS if getattr(model, name, None) is not None), None
        )
    return [name for name, module in model.named_modules() if module is output]


def adapter_of(
    base: Checkpoint, factors: Sequence[Task], scaling: Scaling, summary: str, folder: str = ""
) -> adapter_output.Output:
    """The adapter of these factors, for a base made from this one."""
    modules = {task.name: task.name for task in factors}
    settings = adapter_config.plain_settings() | {"use_rslora": scaling.rslora}
    base_settings = {
        "base_model_name_or_path": adapter_config.hub_id(base.folder),
        "task_type": adapter_config.task_type(base.config),
    }
    return adapter_output.Output(
        [],
        factors,
        modules,
        settings,
        summary,
        folder,
        alpha=scaling.given,
        base_settings=base_settings,
    )
