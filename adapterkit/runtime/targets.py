"""What a config means on a live model: the modules and parameters that get factors, those trained
in full, and the rows of tokens."""

import warnings
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.resolve import (
    Resolver,
    Target,
    input_embedding,
    model_type,
    tied_modules,
)
from adapterkit.adapters.targets import has_end, is_within
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.patterns import similar_names
from adapterkit.runtime.fitness import WHERE, unfit_as_parameter, unread
from adapterkit.runtime.quantized import quantization_of
from adapterkit.runtime.site import CHILD
from adapterkit.weights.bypassed import is_taken_for_experts
from adapterkit.weights.linear import kind_of

LISTS_OF_MODULES = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class LiveResolver(Resolver):
    """A config on a live model: layers may be quantized, and those that PEFT takes for stacks of
    experts get the factors that a file has as their weights'."""

    def unread(self, path: str) -> Refused | None:
        return unread(self.model, self.modules, path)

    def is_quantized(self, module: nn.Module) -> bool:
        return quantization_of(module) is not None

    def fitting(self, paths: list[str]) -> list[str]:
        paths = super().fitting(paths)
        unfit = [path for path in paths if self._unfit_as_parameter(path)]
        if unfit:
            text = "PEFT takes them for stacks of experts, whose factors have no such settings"
            warnings.warn(f"no factors for {listed(unfit)}: {text}", stacklevel=2)
        return [path for path in paths if path not in unfit]

    def resolve(self) -> list[Target]:
        targets = super().resolve()
        taken = [one.path for one in targets if one.leaf is None and self._is_taken(one.path)]
        if taken and self.config.dropout:
            warnings.warn(
                f"dropout of {listed(taken)} is not saved: a file has these as parameters, as PEFT "
                "takes their names for stacks of experts",
                stacklevel=2,
            )
        return targets

    def unfit(self, path: str) -> Refused | None:
        return super().unfit(path) or self._unfit_as_parameter(path)

    def _is_taken(self, path: str) -> bool:
        return is_taken_for_experts(model_type(self.model), path)

    def _unfit_as_parameter(self, path: str) -> Refused | None:
        if not self._is_taken(path):
            return None
        return unfit_as_parameter(path, self.modules[path], self.config)


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The targets of a config on a live model; `Refused` with all that is wrong."""
    return LiveResolver(model, own_modules(model), config).resolve()


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
