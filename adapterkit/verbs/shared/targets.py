"""Resolve the modules and parameters that an option or a config names, and those that get factors:
PEFT's rules, on a live model and on a stored one, which is built without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapterkit.core.adapter.record import is_inside
from adapterkit.core.adapter.targets import (
    ALL_LINEAR,
    ENDING,
    USUAL_TARGETS,
    Patterns,
    TargetMatcher,
    entries_in,
    is_within,
    output_head,
)
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.lazy import torch
from adapterkit.core.options import targets as text_of_targets
from adapterkit.core.patterns import MODULES, matcher, similar_names
from adapterkit.core.weights.layers import (
    is_bypassed,
    is_linear,
    is_taken_for_experts,
    kind_of,
    looks_up_otherwise,
    weight_reader,
)
from adapterkit.core.weights.names import Names
from adapterkit.verbs.shared.lora_config import LoraConfig

LINEAR = ("linear", "conv1d")
PARAMETER = "parameter"
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
OPTIONS = {
    "targets": "--targets", "exclude": "--exclude", "layers": "--layers:",
    "rank_pattern": "--rank-for", "alpha_pattern": "--alpha-for",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A module that gets factors, or its parameter `leaf`.

    `tied`: the embedding whose factors a head shares, transposed."""

    path: str
    module: torch.nn.Module
    kind: str
    rank: int
    alpha: float
    rslora: bool
    leaf: str | None = None
    tied: str | None = None

    @property
    def name(self) -> str:
        """The name of the module or parameter that patterns match."""
        return self.path if self.leaf is None else f"{self.path}.{self.leaf}"

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def model_type(model: torch.nn.Module) -> str | None:
    """The type of a transformers model."""
    return getattr(getattr(model, "config", None), "model_type", None)


class Resolver:
    """The resolution of a config on a model.

    PEFT 0.21's rules, with these deviations. Each name and pattern must match something. `layers`
    also finds a list of layers that starts the name. "all-linear" includes quantized linears of all
    classes, excludes fully trained modules and weights that the surrounding code reads itself, and
    does not turn Mixtral's router and experts into parameters.

    `modules`: those below the model, by name, without adapters."""

    where = "LoraConfig"
    names_hint, layers_hint = "check the names", "check layers and layers_pattern"
    whole_in_any_layer = True  # full names are targets whatever `layers` selects

    def __init__(
        self, model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], config: LoraConfig
    ):
        self.model, self.modules, self.config = model, modules, config
        self.alpha: float | None = config.alpha  # None: each rank is its own alpha
        layers = config.layers
        self.layers = (layers,) if isinstance(layers, int) else layers
        self.stacks: Collection[str] = ()  # parameters that `targets` name, too
        self.errors = Problems(where=self.where)

    def label(self, setting: str) -> str:
        """The name of a setting in messages."""
        return f"{setting}:"

    def unread(self, path: str) -> Refused | None:
        """Why factors on a layer would not act as its weight does; None if they do."""
        raise NotImplementedError

    def kind_of(self, module: torch.nn.Module) -> str | None:
        """The kind of a layer; None for a module that takes no factors."""
        return kind_of(module)

    def is_quantized(self, module: torch.nn.Module) -> bool:
        return False

    @property
    def is_classifier(self) -> bool:
        return self.config.task_type == "SEQ_CLS"

    def resolve(self) -> list[Target]:
        """The targets in model order, modules before parameters. Parameters of one module come in
        the order of its code, the first one innermost, because PEFT nests wrappers in that order.

        `Refused` with all names that match nothing, and all modules that take no factors."""
        chosen = self.selected()
        paths = [name for name in chosen if name in self.modules]
        leaves = [name for name in chosen if name not in self.modules]
        leaves += self._parameters() if self.config.parameters else []
        for path in dict.fromkeys(name.rpartition(".")[0] for name in leaves):
            if path in paths:
                self.errors.add(
                    f"{shown(path)} is a target, and so is a parameter of it",
                    "one of them",
                    "exclude the module from targets, or give targets=[]",
                    code="AK105",
                )
        tied = self._tied(paths) if self.config.tie else {}
        targets = self._with_ranks(paths, leaves, tied)
        self.errors += filter(None, map(self.refusal_reason, paths))
        for target in targets:
            self.errors += self.unfit_settings(target)
        self.errors.raise_all()
        return targets

    def _with_ranks(
        self, paths: Sequence[str], leaves: Sequence[str], tied: Mapping[str, str]
    ) -> list[Target]:
        """The targets on modules and on parameters, each with its rank and alpha."""
        config = self.config
        tables = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
        patterns = {key: Patterns(table, self.label(key)) for key, table in tables.items()}

        def target(path: str, kind: str, leaf: str | None = None) -> Target:
            name = tied.get(path, path) if leaf is None else f"{path}.{leaf}"
            rank = patterns["rank_pattern"].value(name, config.rank)
            alpha = patterns["alpha_pattern"].value(
                name, rank if self.alpha is None else self.alpha
            )
            head = tied.get(path) if leaf is None else None
            return Target(path, self.modules[path], kind, rank, alpha, config.rslora, leaf, head)

        kinds = {path: self.kind_of(self.modules[path]) for path in paths}
        targets = [target(path, kind) for path, kind in kinds.items() if kind]
        targets += [
            target(path, PARAMETER, leaf) for path, _, leaf in (n.rpartition(".") for n in leaves)
        ]
        names = [one.name for one in targets]
        for key, one in patterns.items():
            self.no_match(key, one.unmatched(names), "a target", names)
        return targets

    # -- modules ---------------------------------------------------------------------------------

    def selected(self) -> list[str]:
        """The names that targets, exclude, layers and modules_to_save select."""
        config = self.config
        targets = self._usual() if config.targets is None else config.targets
        names = self.named(targets)
        if self.layers is not None:
            names = self._in_layers(names, targets, self.layers)
        # an attention's factors are for both of its projections
        kinds = {name: self.kind_of(self.modules[name]) for name in names if name in self.modules}
        attentions = {name for name, kind in kinds.items() if kind == "attention"}
        names = [name for name in names if name.rpartition(".")[0] not in attentions]
        left = self.without_excluded(names)
        if targets and not left and not self.errors:
            hint = similar_names(str(targets), self.names()) or "check targets"
            hint = "check exclude and modules_to_save" if names else hint
            self.errors.add("no module is a target", "at least one target", hint, code="AK105")
        return left

    def names(self) -> list[str]:
        """All names that targets can mean."""
        return [*self.modules, *self.stacks]

    def named(self, targets: str | Sequence[str]) -> list[str]:
        """The names that targets mean."""
        if targets == ALL_LINEAR:
            return self.all_linear()
        names, is_named = self.names(), TargetMatcher(targets, f"{self.where}: targets")
        if not isinstance(targets, str) and self.config.targets:
            entries = is_named.unmatched(names)
            self.no_match("targets", entries, "the end of a module's name", names)
        return list(filter(is_named, names))

    def all_linear(self) -> list[str]:
        """All linear layers on which factors act, except the head and the layers in it."""
        head = output_head(self.model, self.is_classifier) or ""
        linear = [p for p in self.modules if self._is_whole_linear(p) and not self.saved_with(p)]
        return self.fitting([path for path in linear if not f"{path}.".startswith(f"{head}.")])

    def fitting(self, paths: list[str]) -> list[str]:
        """The linear layers on which factors act."""
        return [path for path in paths if self.unread(path) is None]

    def _is_whole_linear(self, path: str) -> bool:
        """True if a module is a linear layer and no container."""
        module = self.modules[path]
        if self.kind_of(module) not in LINEAR:
            return False
        if isinstance(module, torch.nn.Linear):
            return self.is_quantized(module) or is_linear(module)
        return not any(f"{path}.{name}" in self.modules for name, _ in module.named_children())

    def _usual(self) -> Sequence[str] | str:
        """The default targets of the model's type."""
        kind = model_type(self.model)
        targets = USUAL_TARGETS.get(kind or "", ())
        if not targets and not self.config.parameters:
            name = type(self.model).__name__ if kind is None else f"model type {shown(kind)}"
            self.errors.add(
                f"no usual targets of {name}", "at least one target", "give targets", code="AK105"
            )
        return targets

    def _in_layers(
        self, names: list[str], targets: str | Sequence[str], layers: Sequence[int]
    ) -> list[str]:
        """The names that are in these layers."""
        whole = targets if self.whole_in_any_layer and not isinstance(targets, str) else ()
        where = f"{self.where}: layers_pattern"
        lists = [matcher(one, where, ENDING) for one in self.config.layers_pattern or ()]
        layer = {name: layer_number(name, lists) for name in names if name not in whole}
        for number in layers:
            if number not in layer.values():
                self.errors.add(
                    f"{self.label('layers')} no target in layer {number}",
                    "layers with targets",
                    self.layers_hint,
                    code="AK105",
                )
        return [name for name in names if name in whole or layer[name] in layers]

    def without_excluded(self, names: list[str]) -> list[str]:
        """The names without those of exclude, and without names inside fully trained modules."""
        known, saved = self.names(), self.config.saved
        is_excluded = TargetMatcher(self.config.exclude or (), f"{self.where}: exclude")
        self.no_match("exclude", is_excluded.unmatched(known), "a module", known)
        return [
            name
            for name in names
            if not is_excluded(name) and not any(is_within(name, entry) for entry in saved)
        ]

    def refusal_reason(self, path: str) -> Refused | None:
        """Why a module takes no factors; None if it does."""
        module = self.modules[path]
        if entry := self.saved_with(path):
            return Refused(
                f"target {shown(path)}, which modules_to_save {shown(entry)} means, too",
                expected="one of both: an entry means every module whose name ends with it",
                where=self.where,
                hint="exclude it from targets, or give the names of modules_to_save in full",
                code="AK105",
            )
        if self.kind_of(module) is not None:
            return self.unread(path)
        hint = "exclude it from targets"
        leaves = [leaf for leaf, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)]
        if leaves:
            name = f"{path.rpartition('.')[2]}.{leaves[0]}"
            hint = f"parameters={[name]!r} adapts the parameter itself"
        elif any(self.kind_of(child) for child in module.modules()):
            hint = "target the layers inside it"
        return Refused(
            f"target {shown(path)} is a {type(module).__name__}",
            expected="a linear layer, an embedding, a convolution or torch's MultiheadAttention",
            where=self.where,
            hint=hint,
            code="AK105",
        )

    def saved_with(self, path: str) -> str | None:
        """The modules_to_save entry of a module or of one around it."""
        return next((one for one in self.config.saved if is_inside(f"{path}.", one)), None)

    def unfit_settings(self, target: Target) -> Iterable[Refused]:
        """Refusals of settings that a target does not take."""
        return ()

    # -- parameters and tied heads ---------------------------------------------------------------

    def _parameters(self) -> list[str]:
        """The parameters that `config.parameters` names."""
        assert self.config.parameters
        is_named, known, names = TargetMatcher(self.config.parameters, self.where), [], []
        for path, module in [("", self.model), *self.modules.items()]:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}".removeprefix(".")
                known.append(name)
                if not is_named(name):
                    continue
                problem = self._unfit_parameter(path, name, parameter)
                if problem is None:
                    names.append(name)
                else:
                    self.errors.append(problem)
        entries = is_named.unmatched(known)
        self.no_match("parameters", entries, "the end of a parameter's name", known)
        homes = dict.fromkeys(name.rpartition(".")[0] for name in names)
        for path in homes:
            for other in homes:
                if other.startswith(f"{path}."):
                    self.errors.add(
                        f"parameters of {shown(path)} and of {shown(other)} inside it",
                        "modules that are not nested, because PEFT's layout cannot store these",
                        "remove those of one of them",
                        code="AK105",
                    )
        return names

    def _unfit_parameter(
        self, path: str, name: str, parameter: torch.nn.Parameter
    ) -> Refused | None:
        """Why a parameter takes no factors; None if it does."""
        problem, hint = f"parameter {shown(name)}", "remove it from parameters"
        shape = tuple(parameter.shape)
        if path == "":
            problem, hint = f"{problem} of the model itself", "put the model into another module"
        elif len(shape) not in (2, 3) or not parameter.is_floating_point():
            problem = f"{problem} with shape {shape}, {parameter.dtype}"
        elif entry := self.saved_with(path):
            problem = f"{problem} inside {shown(entry)}, which is fully trained"
        else:
            return self.unread(path) if name.endswith(".weight") else None
        expected = "2 or 3 dimensions of floats, in a module"
        return Refused(problem, expected=expected, where=self.where, hint=hint, code="AK105")

    def _tied(self, paths: list[str]) -> dict[str, str]:
        """Head -> the embedding whose weight it shares. If one of them is among the `paths`, all of
        them are added."""
        embedding = input_embedding(self.model, self.modules)
        heads = [] if embedding is None else tied_modules(self.modules, embedding)
        if embedding is None or not heads:
            problem = "tie = True, but the model has no tied weights"
            self.errors.add(problem, "tied weights", "remove tie", code="AK105")
            return {}
        if not {embedding, *heads} & set(paths):
            return {}
        paths[:] = [path for path in self.modules if path in {embedding, *heads, *paths}]
        return dict.fromkeys(heads, embedding)

    # -- refusals --------------------------------------------------------------------------------

    def no_match(
        self, setting: str, entries: Sequence[str], expected: str, known: Collection[str]
    ) -> None:
        """Refuse the entries of a setting that match none of the known names."""
        for entry in entries:
            problem = f"{self.label(setting)} {shown(entry)!r} matches none"
            hint = similar_names(entry, known) or self.names_hint
            where = self.where if self.where != self.label(setting) else "options"
            self.errors.add(problem, expected, hint, where=where, code="AK105")


class StoredResolver(Resolver):
    """A config on a stored model. `among`: the layers that can get factors; messages call the
    others `lacking`. Layers that "all-linear" leaves out join the notes."""

    where = "--targets"
    names_hint, layers_hint = MODULES, "choose layers of the model"
    whole_in_any_layer = False

    def __init__(
        self,
        names: Names,
        config: LoraConfig,
        notes: list[str],
        among: Collection[str] | None = None,
        lacking: str = "",
    ):
        model = torch.nn.Module() if names.model is None else names.model.model
        modules = {name: module for name, module in model.named_modules() if name}
        for name in among or ():  # transformers does not know the model, or has these elsewhere
            modules.setdefault(name, torch.nn.Linear(1, 1, device="meta"))
        super().__init__(model, modules, config)
        self.stored_names, self.notes = names, notes
        others = () if among is None else modules.keys() - set(among)
        self.lacking = dict.fromkeys(others, lacking)

    def label(self, setting: str) -> str:
        return OPTIONS[setting]

    @property
    def is_classifier(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def unsupported_kind(self, path: str) -> str:
        """The kind of a layer on which no factors can start, for messages; "" if they can."""
        reason = why_not_on_layer(self.stored_names, path, self.modules[path])
        return reason or self.lacking.get(path, "")

    def unread(self, path: str) -> Refused | None:
        problem = self.unsupported_kind(path)
        if not problem:
            return None
        return Refused(
            f"target {shown(path)} is {problem}",
            expected="layers on which factors act",
            where=self.where,
            hint="leave it out",
            code="AK105",
        )

    def fitting(self, paths: list[str]) -> list[str]:
        left_out: dict[str, list[str]] = {}
        for path in paths:
            left_out.setdefault(self.unsupported_kind(path), []).append(path)
        fit = left_out.pop("", [])
        self.notes += [
            f"no factors for {listed(its)}: {reason}" for reason, its in left_out.items()
        ]
        return fit


class CalledLayers(StoredResolver):
    """Layers whose inputs can be observed, because the surrounding code calls them; factors may
    have no effect there."""

    def unsupported_kind(self, path: str) -> str:
        reader = weight_reader(self.stored_names, path)
        return f"read by {reader}, and not called" if reader else self.lacking.get(path, "")


def select_layers(
    names: Names,
    targets: str | Sequence[str] | None,
    among: Collection[str],
    lacking: str,
    notes: list[str],
    kind: type[StoredResolver] = StoredResolver,
) -> list[str]:
    """The layers that --targets names, in model order; without it every layer that `kind` takes.
    `lacking`: the description of a model's other layers."""
    config = LoraConfig(targets=ALL_LINEAR if targets is None else entries_of("--targets", targets))
    resolver = kind(names, config, notes, among, lacking)
    if targets is None:
        return resolver.fitting(list(among))
    return [target.path for target in resolver.resolve()]


def entries_of(option: str, value: str | Sequence[str]) -> str | tuple[str, ...]:
    """The text of --targets or --exclude in PEFT's form: "all-linear", one or several ends of names
    separated by commas, or a regular expression for whole names."""
    text = text_of_targets(value)
    if text.lower() == ALL_LINEAR:
        return ALL_LINEAR
    entries = entries_in(text)
    if isinstance(entries, str):
        matcher(entries, option)
    return entries


def why_not_on_layer(names: Names, path: str, module: torch.nn.Module) -> str:
    """The kind of a module on which PEFT puts no factors as on a layer, for messages; "" for
    others."""
    kind, cls = kind_of(module), type(module)
    is_plain = is_linear(module) if kind in LINEAR else cls.__name__ in CONVOLUTIONS
    if kind == "embedding":
        is_plain = not looks_up_otherwise(cls.__mro__)
    elif is_bypassed(names, path) or is_taken_for_experts(
        names.base.config.get("model_type"), path
    ):
        return "passed by in PEFT, or its weight is read by others"
    return "" if is_plain else f"a {cls.__name__}, on which no factors start"


def layer_number(name: str, lists: Sequence[Callable[[str], bool]] = ()) -> int | None:
    """The layer number in a name: the number after the first of `lists` that is in it; without
    lists the first number, preferably not directly after the first component.

    PEFT ignores a list without a module around it, unless layers_pattern names it."""
    parts = name.split(".")
    numbers = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
    if lists:
        numbers = [i for is_list in lists for i in numbers if is_list(".".join(parts[:i]))]
    else:
        numbers = [i for i in numbers if i > 1] or numbers
    return int(parts[numbers[0]]) if numbers else None


def input_embedding(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> str | None:
    """The path of a transformers model's input embedding, if that is one weight: image models have
    several modules."""
    ask = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if ask is None else ask()
    except NotImplementedError:  # a model without one
        return None
    if getattr(embedding, "weight", None) is None:
        return None
    return next((path for path, module in modules.items() if module is embedding), None)


def embeddings_of(model: torch.nn.Module) -> list[torch.nn.Module | None]:
    """The input embedding and the head of a transformers model; empty for another."""
    ask = getattr(model, "get_input_embeddings", None)
    # nn.Module types its attributes as Tensor or Module
    return [] if ask is None else [ask(), model.get_output_embeddings()]  # type: ignore[operator]


def tied_modules(modules: Mapping[str, torch.nn.Module], embedding: str) -> list[str]:
    """The other modules with the embedding's weight."""
    weight = modules[embedding].weight
    return [
        path
        for path, module in modules.items()
        if path != embedding and getattr(module, "weight", None) is weight
    ]
