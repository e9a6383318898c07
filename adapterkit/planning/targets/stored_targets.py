"""Which layers of a stored model options mean: PEFT's rules on the model without data."""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.resolve import LINEAR, Resolver, Target
from adapterkit.adapters.targets import ALL_LINEAR
from adapterkit.errors import Problems, Refused, listed, shown
from adapterkit.patterns import matcher
from adapterkit.planning.targets.changed_meanings import (
    layers_readings,
    rule_readings,
    text_readings,
)
from adapterkit.planning.targets.values_by_regex import Rule
from adapterkit.weights.bypassed import is_bypassed, is_taken_for_experts, looks_up_otherwise
from adapterkit.weights.linear import is_linear, kind_of
from adapterkit.weights.names import Names

NAMES = re.compile(r"[\w.-]+( *, *[\w.-]+)*")  # no regex: a dot is one of the names'
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
OPTIONS = {
    "targets": "--targets", "exclude": "--exclude", "layers": "--layers:",
    "rank_pattern": "--rank-for", "alpha_pattern": "--alpha-for",
}  # fmt: skip


def entries_of(option: str, text: str) -> str | tuple[str, ...]:
    """A text of --targets or --exclude as PEFT has it: "all-linear", ends of names, of several with
    commas between, or a regular expression for whole names."""
    if text.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if NAMES.fullmatch(text):
        return tuple(text.replace(" ", "").split(","))
    matcher(text, option)
    return text


class StoredResolver(Resolver):
    """A config on a stored model. `among`: the layers that can get factors; the others are
    `lacking`, as messages say. What "all-linear" leaves out joins the notes."""

    where = "--targets"

    def __init__(
        self,
        names: Names,
        config: LoraConfig,
        notes: list[str],
        among: Collection[str] | None = None,
        lacking: str = "",
    ):
        model = nn.Module() if names.model is None else names.model.model
        modules = {name: module for name, module in model.named_modules() if name}
        for name in among or ():  # transformers does not know the model, or has these elsewhere
            modules.setdefault(name, nn.Linear(1, 1, device="meta"))
        super().__init__(model, modules, config)
        self.stored_names, self.notes, self.among, self.lacking = names, notes, among, lacking
        self.exclude: str | None = None  # the text of --exclude
        self.rules: dict[str, Sequence[Rule]] = {}  # of --rank-for and --alpha-for, by the option

    def label(self, setting: str) -> str:
        return OPTIONS[setting]

    @property
    def is_classifier(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def why_not(self, path: str) -> str:
        """What a layer is on which no factors can start; "" for one on which they can."""
        module, names = self.modules[path], self.stored_names
        kind, cls = kind_of(module), type(module)
        model_type = names.base.config.get("model_type")
        is_plain = is_linear(module) if kind in LINEAR else cls.__name__ in CONVOLUTIONS
        if kind == "embedding":
            is_plain = not looks_up_otherwise(cls.__mro__)
        elif is_bypassed(names, path) or is_taken_for_experts(model_type, path):
            return "passed by in PEFT, or its weight is read by others"
        if not is_plain:
            return f"a {cls.__name__}, on which no factors start"
        return "" if self.among is None or path in self.among else self.lacking

    def unread(self, path: str) -> Refused | None:
        problem = self.why_not(path)
        if not problem:
            return None
        return Refused(
            f"target {shown(path)} is {problem}",
            expected="layers on which factors act",
            where=self.where,
            hint="leave it out",
        )

    def fitting(self, paths: list[str]) -> list[str]:
        left_out: dict[str, list[str]] = {}
        for path in paths:
            left_out.setdefault(self.why_not(path), []).append(path)
        fit = left_out.pop("", [])
        self.notes += [f"no factors for {listed(its)}: {why}" for why, its in left_out.items()]
        return fit

    def named(self, targets: str | Sequence[str]) -> list[str]:
        if isinstance(self.config.targets, str) and targets != ALL_LINEAR:
            others = [path for path in self.modules if self.unfit(path)]
            fit = [name for name in self.names() if name not in others]
            Problems(
                text_readings("--targets", self.config.targets, targets, fit, others)
            ).raise_all()
        return super().named(targets)

    def in_layers(self, names: list[str], whole: Sequence[str]) -> list[str]:
        chosen = super().in_layers(names, ())
        if self.layers is not None:
            before = [name for name in names if _first_number(name) in self.layers]
            Problems(layers_readings(chosen, before)).raise_all()
        return chosen

    def without_excluded(self, names: list[str]) -> list[str]:
        text, entries = self.exclude, self.config.exclude
        if text is not None and entries is not None:
            Problems(text_readings("--exclude", text, entries, names)).raise_all()
        return super().without_excluded(names)

    def with_ranks(
        self, paths: Sequence[str], leaves: Sequence[str], tied: Mapping[str, str]
    ) -> list[Target]:
        readings = [rule_readings(o, its, [*paths, *leaves]) for o, its in self.rules.items()]
        Problems([error for errors in readings for error in errors]).raise_all()
        return super().with_ranks(paths, leaves, tied)


def _first_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def select_layers(
    names: Names, targets: str | None, among: Collection[str], lacking: str, notes: list[str]
) -> list[str]:
    """Those of the layers that --targets means, in the model's order; without it all on which
    factors act. `lacking`: what a model's other layers are."""
    config = LoraConfig(targets=ALL_LINEAR if targets is None else entries_of("--targets", targets))
    resolver = StoredResolver(names, config, notes, among, lacking)
    if targets is None:
        return resolver.fitting(list(among))
    return [target.path for target in resolver.resolve()]
