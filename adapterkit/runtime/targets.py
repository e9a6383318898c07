"""Resolve a config on a live model: modules and parameters that get factors, fully trained modules,
and rows of tokens; and reasons why factors on a module would not act as its weight does."""

import warnings
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.weights.layers import (
    is_taken_for_experts,
    kind_of,
    looks_up_otherwise,
    reader_of,
)
from adapterkit.runtime import layers
from adapterkit.runtime.quantized import quantization_of
from adapterkit.runtime.site import CHILD
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.targets import (
    Resolver,
    Target,
    input_embedding,
    model_type,
    tied_modules,
)

WHERE = Resolver.where
SETTINGS = {  # that some kinds of layers do not take, with those that do
    "dora": "a linear layer, an embedding or a convolution",
    "invocation_tokens": "linear layers",
    "lora_bias": "a linear layer or a convolution",
}
LISTS_OF_MODULES = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class LiveResolver(Resolver):
    """A config on a live model: layers may be quantized, and those that PEFT takes for stacks of
    experts get the factors that a file stores for their weights."""

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__(model, own_modules(model), config)

    def unread(self, path: str) -> Refused | None:
        return unread(self.model, self.modules, path)

    def kind_of(self, module: nn.Module) -> str | None:
        patch = layers.kind_of(module)
        return None if patch is None else patch.kind

    def is_quantized(self, module: nn.Module) -> bool:
        return quantization_of(module) is not None

    def fitting(self, paths: list[str]) -> list[str]:
        paths = super().fitting(paths)
        unfitting = [path for path in paths if self._parameter_refusal(path)]
        if unfitting:
            text = "PEFT takes them for stacks of experts, whose factors have no such settings"
            warnings.warn(f"no factors for {listed(unfitting)}: {text}", stacklevel=2)
        return [path for path in paths if path not in unfitting]

    def resolve(self) -> list[Target]:
        targets = super().resolve()
        taken = [one.path for one in targets if one.leaf is None and self._is_taken(one.path)]
        if taken and self.config.dropout:
            warnings.warn(
                f"dropout of {listed(taken)} is not saved, because a file has these as parameters: "
                "PEFT takes their names for stacks of experts",
                stacklevel=2,
            )
        return targets

    def refusal_reason(self, path: str) -> Refused | None:
        return super().refusal_reason(path) or self._parameter_refusal(path)

    def unfit_settings(self, target: Target) -> Iterator[Refused]:
        patch, config = layers.KINDS[target.kind], self.config
        wrong = [
            (setting, expected)
            for setting, expected in SETTINGS.items()
            if getattr(config, setting) and setting not in patch.takes
        ]
        if target.tied is not None and (config.dora or "tie" not in patch.takes):
            wrong.append(("dora with tie" if config.dora else "tie", "a linear head without dora"))
        if (unfit := patch.refusal_reason(target.module, target.rank)) is not None:
            wrong.append(unfit)
        for setting, expected in wrong:
            yield Refused(
                f"{setting} on {shown(target.name)}, a {type(target.module).__name__}",
                expected=expected,
                where=self.where,
                hint="exclude the module, or remove the setting",
                code="AK801",
            )

    def _is_taken(self, path: str) -> bool:
        return is_taken_for_experts(model_type(self.model), path)

    def _parameter_refusal(self, path: str) -> Refused | None:
        if not self._is_taken(path):
            return None
        return parameter_refusal(path, self.modules[path], self.config)

    def saved(self) -> list[str]:
        """Paths of the fully trained modules (`modules_to_save`).

        As in PEFT, an entry means every module whose name ends with it: `norm` also `q_norm`.
        `Refused` with all entries that match nothing or cannot be copied."""
        modules = {
            path: module
            for path, module in self.model.named_modules(remove_duplicate=False)
            if path and CHILD not in path.split(".")
        }
        paths = [path for path in modules if any(map(path.endswith, self.config.saved))]
        entries = [
            entry
            for entry in self.config.modules_to_save or ()
            if not any(path.endswith(entry) for path in paths)
        ]
        self.no_match("modules_to_save", entries, "the end of a module's name", modules)
        if self.config.tie and (embedding := input_embedding(self.model, modules)):
            shared = {embedding, *tied_modules(modules, embedding)}
            if shared & set(paths):
                paths = [path for path in modules if path in shared.union(paths)]
        different = {modules[path]: path for path in reversed(paths)}  # the first name of each
        outer = [
            path
            for path in reversed(different.values())
            if not any(path.startswith(f"{other}.") for other in different.values())
        ]
        for path in outer:
            if isinstance(modules[path], LISTS_OF_MODULES):
                problem = f"modules_to_save: {shown(path)} is a {type(modules[path]).__name__}"
                self.errors.add(
                    problem, "modules that are called", "name the modules inside it", code="AK801"
                )
        self.errors.raise_all()
        return outer

    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Embedding (or head) -> its trained rows. Without a name it is the model's input
        embedding.

        `Refused` with all names that match no embedding or head, or a fully trained one, and all
        rows that they lack."""
        tokens, rows = self.config.trainable_tokens, dict[str, tuple[int, ...]]()
        if tokens is None:
            return {}
        if not isinstance(tokens, Mapping):
            tokens = {input_embedding(self.model, self.modules) or "embed_tokens": tokens}
        for name, indices in tokens.items():
            paths = [path for path in self.modules if path.endswith(name)]
            if not paths:
                self.no_match("trainable_tokens", [name], "an embedding", self.modules)
            for path in paths:
                self._check_tokens(path, indices, path in rows)
                rows[path] = tuple(indices)
        self.errors.raise_all()
        return rows

    def _check_tokens(self, path: str, indices: Sequence[int], has_rows: bool) -> None:
        """Refuse rows of a module that cannot be trained."""
        module, of = self.modules[path], f"trainable_tokens: {shown(path)}"
        if kind_of(module) not in ("embedding", "linear"):
            self.errors.add(
                f"{of} is a {type(module).__name__}", "an embedding or a head", "", code="AK801"
            )
            return
        if self.saved_with(path):
            self.errors.add(
                f"{of} is fully trained (modules_to_save)",
                "one of the two",
                "remove one of them",
                code="AK801",
            )
        if has_rows:
            self.errors.add(
                f"{of} has two lists", "one list", "give each its whole name", code="AK801"
            )
        if problem := self.unread(path):
            self.errors.append(problem)
        size = len(module.get_parameter("weight"))
        if outside := [index for index in indices if index >= size]:
            hint = "resize the embedding first (resize_token_embeddings)"
            self.errors.add(f"{of} has no rows {outside}", f"rows below {size}", hint, code="AK801")


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules, without the adapters; a shared one by its first name."""
    return dict(_below(model, "", {model}))


def _below(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, which would walk through all adapters and so slow each load."""
    for name, child in module._modules.items():
        if child is not None and name != CHILD and child not in seen:
            seen.add(child)
            yield prefix + name, child
            yield from _below(child, f"{prefix}{name}.", seen)


def unread(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> Refused | None:
    """The reason why factors and rows, which act on a module's output, would not act as its weight
    does, or None: the code around it reads the weight and does not call the module, or an embedding
    has its own forward."""
    cls, hint = type(modules[path]), "exclude it from targets; modules_to_save trains it fully"
    if looks_up_otherwise(cls.__mro__):
        return Refused(
            f"{shown(path)} is a {cls.__name__}, with a forward of its own",
            expected="embeddings that give rows of their weight, or multiples",
            where=WHERE,
            hint=hint,
            code="AK801",
        )
    reader = weight_reader(model, modules, path)
    if reader is None:
        return None
    if kind_of(modules.get(path.rpartition(".")[0], model)) == "attention":
        hint = "target the attention: both projections get factors"
    return Refused(
        f"the weight of {shown(path)} is read by {reader}, not by its forward",
        expected="layers that are called",
        where=WHERE,
        hint=hint,
        code="AK801",
    )


def weight_reader(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The class around a module that multiplies by its weight directly; None if it calls it."""
    parent, _, leaf = path.rpartition(".")
    return reader_of(type(modules.get(parent, model)).__mro__, leaf, model_type(model))


def parameter_refusal(path: str, host: nn.Module, config: LoraConfig) -> Refused | None:
    """The reason why PEFT cannot read a linear layer's factors as those of its weight, as a file
    stores them if PEFT takes the layer's name for a stack of experts; None if it can."""
    settings = ("dora", "lora_bias", "invocation_tokens")
    wrong = [name for name in settings if getattr(config, name)]
    if quantization_of(host) is not None:
        wrong.append(f"a quantized weight ({type(host).__name__})")
    if not wrong:
        return None
    return Refused(
        f"{' and '.join(wrong)} on {shown(path)}, which PEFT takes for a stack of experts",
        expected="standard factors, which a file stores for the layer's weight",
        where=WHERE,
        hint="exclude the layer, or remove the setting",
        code="AK801",
    )
