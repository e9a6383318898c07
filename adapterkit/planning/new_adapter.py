"""A new adapter on a base: target modules, scaling, and where the factors of a linear layer go."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.adapters import adapter_config
from adapterkit.adapters.targets import ALL_LINEAR, has_end, output_head
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.patterns import matcher, similar_names
from adapterkit.plan import Task
from adapterkit.planning import adapter_output
from adapterkit.weights.bypassed import is_bypassed, is_taken_for_experts
from adapterkit.weights.linear import is_linear
from adapterkit.weights.names import Names

NAMES = re.compile(r"[\w.-]+( *, *[\w.-]+)*")  # no regex: a dot is one of the names'


@dataclass(frozen=True)
class Scaling:
    """The scale of b @ a: alpha / rank, or alpha / √rank; alpha is the rank if it is None.

    `rank_for` and `alpha_for`: `REGEX=N`, others for some modules; of several that match, the last
    counts."""

    rank: int
    alpha: float | None = None
    rslora: bool = False
    rank_for: tuple[str, ...] = ()
    alpha_for: tuple[str, ...] = ()

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank, self.lora_alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def select_targets(
    targets: str,
    usable: Collection[str],
    model: Any,
    lacking: str,
    layers: Collection[str] | None = None,
) -> tuple[list[str], list[str]]:
    """The usable modules that `--targets` selects, and notes; `Refused` with all names that match
    none.

    `all-linear`, as in PEFT: all linear layers but the output head, also that of a classifier; ends
    of modules' names, with commas between; or, where it has other characters, a regex that is
    searched in the names. `lacking`: what the other ones of `layers` are, for messages; these are
    by default the linear layers of the model."""
    modules = [] if model is None else list(model.named_modules())
    if layers is None:
        layers = [name for name, module in modules if is_linear(module)] if modules else usable
    if targets.lower() == ALL_LINEAR:
        is_classifier = type(model).__name__.endswith("ForSequenceClassification")
        return _all_linear(layers, usable, output_head(model, is_classifier), lacking)
    if not NAMES.fullmatch(targets):
        matches = matcher(targets, "--targets")
        chosen = [name for name in usable if matches(name)]
        if not chosen:
            raise Refused(
                f"--targets {targets!r} matches none",
                expected="a linear layer that can get factors",
                where="--targets",
                hint=similar_names(targets, usable) or "check the regex",
            )
        return chosen, []
    classes = {name: type(module).__name__ for name, module in modules}
    by_end = {end: _ending(end, usable) for end in targets.replace(" ", "").split(",")}
    errors: list[AdapterkitError] = []
    for end in (end for end, names in by_end.items() if not names):
        other = next(iter(_ending(end, layers) or _ending(end, classes)), None)
        reason, hint = "", similar_names(end, usable)
        if other is not None:
            kind = lacking if other in layers else f"a {classes[other]}"
            reason, hint = f": {shown(other)} is {kind}", ""
        errors.append(
            Refused(
                f"--targets {end!r} matches none{reason}",
                expected="the end of the name of a linear layer that can get factors",
                where="--targets",
                hint=hint or "check the names",
            )
        )
    refuse_all(errors)
    return [name for name in usable if any(name in its for its in by_end.values())], []


def _all_linear(
    linear: Collection[str], usable: Collection[str], head: str | None, lacking: str
) -> tuple[list[str], list[str]]:
    inside = f"{head}."
    candidates = [name for name in linear if name != head and not name.startswith(inside)]
    modules = [name for name in candidates if name in usable]
    others = [name for name in candidates if name not in usable]
    if not modules:
        raise Refused(
            "--targets all-linear matches none",
            expected="a linear layer",
            where="--targets",
            hint="check the model",
        )
    note = f"--targets all-linear: no factors for {listed(others)}: {lacking}"
    return modules, [note] if others else []


def wrappable(names: Names, modules: Iterable[str], notes: list[str]) -> list[str]:
    """Those linear layers on which PEFT's factors act; the others join the notes."""
    modules = list(modules)
    model_type = names.base.config.get("model_type")
    bypassed = [
        module
        for module in modules
        if is_bypassed(names, module) or is_taken_for_experts(model_type, module)
    ]
    if bypassed:
        notes.append(
            f"no factors for {listed(bypassed)}: PEFT refuses them or takes them for experts, or "
            "the model's code reads the weight itself"
        )
    return [module for module in modules if module not in bypassed]


def _ending(end: str, modules: Iterable[str]) -> list[str]:
    return [name for name in modules if has_end(name, end)]


def new_adapter(
    base: Checkpoint,
    factors: Sequence[Task],
    scaling: Scaling,
    summary: str,
    folder: str = "",
    *,
    fingerprint: str | None,
) -> adapter_output.Output:
    """The output of these factors: an adapter for a base made from this one, with the
    fingerprint."""
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
        alpha=scaling.lora_alpha,
        base_settings=base_settings,
        base_fingerprint=fingerprint,
    )
