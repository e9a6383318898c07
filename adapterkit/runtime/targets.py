"""What a config means on a live model: the modules and parameters that get factors, those trained
in full, and the rows of tokens."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.targets import (
    ALL_LINEAR,
    USUAL_TARGETS,
    WHOLE,
    Patterns,
    has_end,
    is_within,
    output_head,
)
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.patterns import matcher, similar_names
from adapterkit.runtime.fitness import (
    WHERE,
    Target,
    model_type,
    unfit_as_parameter,
    unfit_module,
    unfit_parameter,
    unfit_settings,
    unread,
    weight_reader,
)
from adapterkit.runtime.layers import kind_of
from adapterkit.runtime.quantized import quantization_of
from adapterkit.runtime.site import CHILD
from adapterkit.weights.bypassed import is_taken_for_experts
from adapterkit.weights.linear import is_linear

PARAMETER = "parameter"
LISTS_OF_MODULES = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The targets in the order of the model, modules before parameters; parameters of one module in
    the order of its code, the first one innermost (PEFT nests wrappers in that order).

    PEFT 0.21's rules, with these deviations: each name and pattern must match something;
    modules_to_save match at dots; `layers` finds a list of layers that starts the name as well;
    "all-linear" has quantized linears of all classes, leaves out weights that the code around them
    reads itself, and does not turn Mixtral's router and experts into parameters.

    `Refused` with all names that match nothing, and all modules that take no factors."""
    modules = own_modules(model)
    errors: list[AdapterkitError] = []
    paths = _selected(model, modules, config, errors)
    leaves = _leaves(model, modules, config, errors)
    errors += [
        Refused(
            f"{shown(path)} is a target, and so is a parameter of it",
            expected="one of them",
            where=WHERE,
            hint="exclude the module from targets, or give targets=[]",
        )
        for path in dict.fromkeys(path for path, _ in leaves)
        if path in paths
    ]
    ranks = Patterns(config.rank_pattern, f"{WHERE}: rank_pattern")
    alphas = Patterns(config.alpha_pattern, f"{WHERE}: alpha_pattern")

    def target(path: str, leaf: str | None, kind: str, tied: str | None = None) -> Target:
        name = tied or (path if leaf is None else f"{path}.{leaf}")
        rank, alpha = ranks.value(name, config.rank), alphas.value(name, config.alpha)
        scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        return Target(path, modules[path], kind, rank, scale, leaf, tied)

    tied = _tied(model, modules, config, paths, errors)
    targets = [
        target(path, None, kind, tied.get(path))
        for path in paths
        if (kind := kind_of(modules[path]))
    ]
    targets += [target(path, leaf, PARAMETER) for path, leaf in leaves]
    errors += filter(None, (unfit_module(model, modules, path) for path in paths))
    for one in targets:
        errors += unfit_settings(one, config)
    taken = [one for one in targets if one.leaf is None and _is_taken(model, one.path)]
    errors += filter(None, (unfit_as_parameter(one.path, one.module, config) for one in taken))
    if taken and config.dropout:
        warnings.warn(
            f"dropout of {listed([one.path for one in taken])} is not saved: a file has these as "
            "parameters, as PEFT takes their names for stacks of experts",
            stacklevel=2,
        )
    names = [one.name for one in targets]
    for key, patterns in ("rank_pattern", ranks), ("alpha_pattern", alphas):
        errors += [_no_match(key, one, "a target", names) for one in patterns.unmatched(names)]
    refuse_all(errors)
    return targets


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules below itself, without the adapters; a shared one by its first name."""
    return dict(_below(model, "", {model}))


def _below(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, whose walk through all adapters would make each load dearer."""
    for name, child in module._modules.items():
        if child is not None and name != CHILD and child not in seen:
            seen.add(child)
            yield prefix + name, child
            yield from _below(child, f"{prefix}{name}.", seen)


def _selected(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    errors: list[AdapterkitError],
) -> list[str]:
    """Paths of the modules that targets, exclude, layers and modules_to_save select."""
    targets = _usual(model, config, errors) if config.targets is None else config.targets
    if targets == ALL_LINEAR:
        head = output_head(model, config.task_type == "SEQ_CLS")
        paths = [path for path in modules if path != head and _is_linear(model, modules, path)]
        paths = _fit_as_parameters(model, modules, config, paths)
    elif isinstance(targets, str):
        paths = list(filter(matcher(targets, f"{WHERE}: targets", WHOLE), modules))
    else:
        paths = _ending(modules, targets, errors if config.targets else [])
    paths = _in_layers(paths, () if isinstance(targets, str) else targets, config, errors)
    # an attention's factors are for both of its projections
    attentions = {path for path in paths if kind_of(modules[path]) == "attention"}
    paths = [path for path in paths if path.rpartition(".")[0] not in attentions]
    is_excluded = _exclusion(modules, config, errors)
    left = [path for path in paths if not is_excluded(path)]
    if targets and not left and not errors:
        hint = "check exclude and modules_to_save" if paths else "check targets"
        errors.append(_no_targets("no module is a target", hint))
    return left


def _fit_as_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, paths: list[str]
) -> list[str]:
    """The paths without layers that PEFT takes for stacks of experts and whose settings no target
    parameter has."""
    unfit = [path for path in paths if _is_taken(model, path)]
    unfit = [path for path in unfit if unfit_as_parameter(path, modules[path], config)]
    if unfit:
        text = "PEFT takes them for stacks of experts, whose factors have no such settings"
        warnings.warn(f"no factors for {listed(unfit)}: {text}", stacklevel=2)
    return [path for path in paths if path not in unfit]


def _is_taken(model: nn.Module, path: str) -> bool:
    return is_taken_for_experts(model_type(model), path)


def _usual(
    model: nn.Module, config: LoraConfig, errors: list[AdapterkitError]
) -> Sequence[str] | str:
    """What is usual for the model's type."""
    kind = model_type(model)
    targets = USUAL_TARGETS.get(kind or "", ())
    if not targets and not config.parameters:
        name = type(model).__name__ if kind is None else f"model type {shown(kind)}"
        errors.append(_no_targets(f"no usual targets of {name}", "give targets"))
    return targets


def _ending(
    modules: Mapping[str, nn.Module], names: Sequence[str], errors: list[AdapterkitError]
) -> list[str]:
    """Paths that are one of the names or end with it."""
    known, matching, paths = set(names), set(), []
    for path in modules:
        if ends := known & _ends(path):
            matching |= ends
            paths.append(path)
    errors += [
        _no_match("targets", name, "the end of a module's name", modules)
        for name in names
        if name not in matching
    ]
    return paths


def _no_targets(problem: str, hint: str) -> Refused:
    return Refused(problem, expected="at least one target", where=WHERE, hint=hint)


def _ends(name: str) -> set[str]:
    """A dotted name and its ends."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _is_linear(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether all-linear has a module: no container, and nothing whose weight others read."""
    module = modules[path]
    children = [name for name, _ in module.named_children() if name != CHILD]
    is_plain = isinstance(module, nn.Linear) and quantization_of(module) is None
    is_whole = is_linear(module) if is_plain else not children or isinstance(module, nn.Linear)
    fits = kind_of(module) in ("linear", "conv1d") and is_whole
    return fits and weight_reader(model, modules, path) is None


def _in_layers(
    paths: list[str],
    targets: Sequence[str],
    config: LoraConfig,
    errors: list[AdapterkitError],
) -> list[str]:
    """Those of the paths that are in `config.layers`; whole names count in any layer."""
    layers = config.layers
    if layers is None:
        return paths
    assert not isinstance(layers, int)
    where = f"{WHERE}: layers_pattern"
    lists = [matcher(one, where, r"\A(?:.*\.)?(?:{})\Z") for one in config.layers_pattern or ()]
    layer_of = {path: _layer(path, lists) for path in paths if path not in targets}
    errors += [
        Refused(
            f"layers: no target in layer {layer}",
            expected="layers with targets",
            where=WHERE,
            hint="check layers and layers_pattern",
        )
        for layer in layers
        if layer not in layer_of.values()
    ]
    return [path for path in paths if path in targets or layer_of[path] in layers]


def _layer(path: str, lists: Sequence[Callable[[str], bool]]) -> int | None:
    """The number after a list of layers in a path: after the first of `lists` that is in it, or
    without them the first number that is no part's own name.

    PEFT passes over a list without a module around it, unless layers_pattern names it."""
    parts = path.split(".")
    numbers = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
    if lists:
        numbers = [i for is_list in lists for i in numbers if is_list(".".join(parts[:i]))]
    else:
        numbers = [i for i in numbers if i > 1] or numbers
    return int(parts[numbers[0]]) if numbers else None


def _exclusion(
    modules: Mapping[str, nn.Module], config: LoraConfig, errors: list[AdapterkitError]
) -> Callable[[str], bool]:
    """Whether a path is excluded, by exclude or as a part of a module that is trained in full."""
    exclude = config.exclude or ()
    if isinstance(exclude, str):
        is_named = matcher(exclude, f"{WHERE}: exclude", WHOLE)
        unknown = [] if any(map(is_named, modules)) else [exclude]
    else:
        names = set(exclude)
        is_named = lambda path: not names.isdisjoint(_ends(path))
        unknown = sorted(names.difference(*map(_ends, modules)))
    errors += [_no_match("exclude", name, "a module", modules) for name in unknown]
    return lambda path: is_named(path) or any(is_within(path, entry) for entry in config.saved)


def _leaves(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    errors: list[AdapterkitError],
) -> list[tuple[str, str]]:
    """Paths and names of the parameters that `config.parameters` names."""
    names = set(config.parameters or ())
    if not names:
        return []
    leaves, matching, known = [], set(), []
    for path, module in [("", model), *modules.items()]:
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            known.append(name)
            if names.isdisjoint(ends := _ends(name)):
                continue
            matching |= names & ends
            problem = unfit_parameter(path, name, parameter, config)
            if problem is None and leaf == "weight":
                problem = unread(model, modules, path)
            if problem is None:
                leaves.append((path, leaf))
            else:
                errors.append(problem)
    errors += [
        _no_match("parameters", name, "the end of a parameter's name", known)
        for name in sorted(names - matching)
    ]
    homes = dict.fromkeys(path for path, _ in leaves)
    errors += [
        Refused(
            f"parameters of {shown(path)} and of {shown(other)} inside it",
            expected="modules beside each other: PEFT's layout has no such nest",
            where=WHERE,
            hint="remove those of one of them",
        )
        for path in homes
        for other in homes
        if other.startswith(f"{path}.")
    ]
    return leaves


def _tied(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    paths: list[str],
    errors: list[AdapterkitError],
) -> dict[str, str]:
    """With `config.tie`: head -> the embedding that it shares its weight with. Where one of them is
    among the `paths`, all of them are added."""
    if not config.tie:
        return {}
    embedding = input_embedding(model, modules)
    heads = [] if embedding is None else tied_modules(modules, embedding)
    if embedding is None or not heads:
        hint = "remove tie"
        problem = "tie = True, but the model has no tied weights"
        errors.append(Refused(problem, expected="tied weights", where=WHERE, hint=hint))
        return {}
    if not {embedding, *heads} & set(paths):
        return {}
    paths[:] = [path for path in modules if path in {embedding, *heads, *paths}]
    return dict.fromkeys(heads, embedding)


def input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of a transformers model's input embedding, if that is one weight: of images it is
    several modules."""
    ask = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if ask is None else ask()
    except NotImplementedError:  # a model without one
        return None
    if getattr(embedding, "weight", None) is None:
        return None
    return next((path for path, module in modules.items() if module is embedding), None)


def tied_modules(modules: Mapping[str, nn.Module], embedding: str) -> list[str]:
    """The other modules with the embedding's weight."""
    weight = modules[embedding].weight
    return [
        path
        for path, module in modules.items()
        if path != embedding and getattr(module, "weight", None) is weight
    ]


def resolve_saved(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained in full.

    An entry matches a whole name or its end after a dot (PEFT: any end, so that `head` also means
    lm_head). `Refused` with all entries that match nothing or cannot be copied."""
    modules = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and CHILD not in path.split(".")
    }
    entries = config.saved
    paths = [path for path in modules if any(has_end(path, entry) for entry in entries)]
    errors: list[AdapterkitError] = [
        _no_match("modules_to_save", entry, "the end of a module's name", modules)
        for entry in config.modules_to_save or ()
        if not any(has_end(path, entry) for path in paths)
    ]
    if config.tie and (embedding := input_embedding(model, modules)):
        shared = {embedding, *tied_modules(modules, embedding)}
        if shared & set(paths):
            paths = [path for path in modules if path in shared.union(paths)]
    different = {modules[path]: path for path in reversed(paths)}  # the first name of each
    outer = [
        path
        for path in reversed(different.values())
        if not any(path.startswith(f"{other}.") for other in different.values())
    ]
    errors += [
        Refused(
            f"modules_to_save: {shown(path)} is a {type(modules[path]).__name__}",
            expected="modules that are called",
            where=WHERE,
            hint="name the modules inside it",
        )
        for path in outer
        if isinstance(modules[path], LISTS_OF_MODULES)
    ]
    refuse_all(errors)
    return outer


def resolve_tokens(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Embedding (or head) -> the rows that are trained. Without a name it is the model's input
    embedding.

    `Refused` with all names that match no embedding or head, or one that is trained in full, and
    all rows that they have not."""
    tokens, modules = config.trainable_tokens, own_modules(model)
    if tokens is None:
        return {}
    if not isinstance(tokens, Mapping):
        tokens = {input_embedding(model, modules) or "embed_tokens": tokens}
    saved = config.saved
    rows: dict[str, tuple[int, ...]] = {}
    errors: list[AdapterkitError] = []

    def refuse(problem: str, expected: str, hint: str = "") -> None:
        problem = f"trainable_tokens: {problem}"
        errors.append(Refused(problem, expected=expected, where=WHERE, hint=hint))

    for name, indices in tokens.items():
        paths = [path for path in modules if has_end(path, name)]
        if not paths:
            errors.append(_no_match("trainable_tokens", name, "an embedding", modules))
        for path in paths:
            module = modules[path]
            if kind_of(module) not in ("embedding", "linear"):
                refuse(f"{shown(path)} is a {type(module).__name__}", "an embedding or a head")
                continue
            if any(is_within(path, entry) for entry in saved):
                refuse(f"{shown(path)} is trained in full", "one of both", "remove one of them")
            if path in rows:
                refuse(f"{shown(path)} has two lists", "one list", "give each its whole name")
            if problem := unread(model, modules, path):
                errors.append(problem)
            size = len(module.get_parameter("weight"))
            if outside := [index for index in indices if index >= size]:
                hint = "resize the embedding first (resize_token_embeddings)"
                refuse(f"{shown(path)} has no rows {outside}", f"rows below {size}", hint)
            rows[path] = tuple(indices)
    refuse_all(errors)
    return rows


def _no_match(setting: str, name: str, expected: str, known: Collection[str]) -> Refused:
    return Refused(
        f"{setting}: {shown(name)!r} matches none",
        expected=expected,
        where=WHERE,
        hint=similar_names(name, known) or "check the names",
    )
