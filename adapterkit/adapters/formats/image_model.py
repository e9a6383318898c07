"""An image or video model in a single file: its family and components, found by its keys."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import TypeVar

from adapterkit.adapters.formats.library import architectures, single_file_format
from adapterkit.adapters.formats.modules.names import (
    ComponentNames,
    Match,
    Size,
    first_words,
    likely,
    names_of,
)
from adapterkit.adapters.formats.schema import Format, NameSchema
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused

IN_PROJ = re.compile(r"(?<=\.in_proj)_(weight|bias)$")  # of OpenCLIP's attention
LEAST = 0.5  # share of the denoiser's modules with known names in a file of the family


@dataclass(frozen=True)
class FileComponent:
    """The position of a pipeline's component in the file."""

    prefix: str  # of its keys
    naming: str  # the column of the architecture's rules that its names are in


@dataclass(frozen=True)
class SingleFileModel(Checkpoint):
    """The checkpoint of an image or video model in its publisher's names."""

    architecture: str = ""
    parts: Mapping[str, FileComponent] = field(default_factory=dict)  # by component

    @cached_property
    def modules(self) -> set[str]:
        """The modules by their names in the file."""
        return _modules(self.tensors)

    def names_layer(self, module: str) -> bool:
        return any(self.found(module))

    def found(self, module: str) -> Iterator[tuple[str, ComponentNames, Match]]:
        """The components that may own a module of the file, with the rule that names it."""
        for component, part in self.parts.items():
            if module.startswith(part.prefix):
                names = names_of(self.architecture, component, part.naming)
                for match in names.find(module.removeprefix(part.prefix)):
                    yield component, names, match

    @property
    def names(self) -> Format:
        """A format whose modules are named as in this file."""
        prefixes = {component: (part.prefix,) for component, part in self.parts.items()}
        format = single_file_format()
        words = NameSchema(architectures=(self.architecture,), components=prefixes)
        return replace(format, names=words)

    @property
    def namings(self) -> dict[str, str]:
        """The column of each component's names."""
        return {component: part.naming for component, part in self.parts.items()}


Model = TypeVar("Model", bound=SingleFileModel)


@dataclass(frozen=True)
class _Known:
    """The modules of one component of a file that an architecture knows."""

    part: FileComponent
    names: ComponentNames
    matches: Mapping[str, Match]  # by the name in the file
    of: int  # modules of the part

    @property
    def is_denoiser(self) -> bool:
        return bool(self.matches) and len(self.matches) >= LEAST * self.of

    def has(self, modules: Iterable[str]) -> bool:
        own = (self.names.models(match) for match in self.matches.values())
        return {one for models in own for one in models}.issuperset(modules)

    @property
    def meaning(self) -> dict[str, tuple]:
        """The model's modules behind its names, and their row orders."""
        naming = self.part.naming
        return {
            head: (*self.names.models(match), match.rule.rows, match.rule.steps.get(naming))
            for head, match in self.matches.items()
        }


Found = dict[str, dict[str, _Known]]  # architecture -> component -> its modules


def with_parts(checkpoint: Checkpoint, kind: type[Model] = SingleFileModel) -> Model | None:
    """The checkpoint as an image or video model's; None if its keys fit none. `Refused` if they fit
    several families with different modules. `kind` is its container's."""
    modules, format = sorted(_modules(checkpoint.tensors)), single_file_format()
    found: Found = {}
    for name in format.names.architectures:
        denoiser, *others = format.components(name)
        known = _known(format, name, denoiser, modules, LEAST)
        needed = architectures()[name].detect.modules
        if known is not None and known.is_denoiser and (not needed or known.has(needed)):
            parts = {one: _known(format, name, one, modules) for one in others}
            found[name] = {denoiser: known} | {k: v for k, v in parts.items() if v and v.matches}
    if not found:
        return None
    fits = _best(found, lambda parts: len(next(iter(parts.values())).matches))
    sizes = {name: list(_sizes(checkpoint, next(iter(found[name].values())))) for name in fits}
    metadata = next(iter(checkpoint.shards.values())).metadata
    fits = {name: fits[name] for name in likely(sizes, metadata)}
    fits = _best(fits, lambda parts: sum(len(one.matches) for one in parts.values()))
    meanings = [[one.meaning for one in parts.values()] for parts in fits.values()]
    if any(meaning != meanings[0] for meaning in meanings):
        raise Refused(
            f"the file's names are those of {' and '.join(fits)}",
            expected="keys of one family of models",
            where=checkpoint.folder.label,
            hint="use the publisher's original file",
            code="AK502",
        )
    name = next(iter(fits))
    parts = {component: known.part for component, known in fits[name].items()}
    known = {one.name for one in fields(kind)}
    own = {key: value for key, value in vars(checkpoint).items() if key in known}
    return kind(**own, architecture=name, parts=parts)


def family_of(checkpoint: Checkpoint) -> str | None:
    """The architecture of an image or video model, in its publisher's names or the model's, or
    None."""
    with suppress(Refused):
        model = checkpoint if isinstance(checkpoint, SingleFileModel) else with_parts(checkpoint)
        return None if model is None else model.architecture
    return None


def _best(found: Found, count: Callable[[dict[str, _Known]], int]) -> Found:
    most = max(map(count, found.values()))
    return {name: parts for name, parts in found.items() if count(parts) == most}


def _modules(keys: Iterable[str]) -> set[str]:
    return {IN_PROJ.sub(r".\1", key).rpartition(".")[0] for key in keys}


def _known(
    format: Format, name: str, component: str, modules: Sequence[str], least: float = 0
) -> _Known | None:
    """An architecture's modules of a component, in the naming that fits best; None if the file has
    none of its prefixes, or first words fit less than the share `least` of the modules."""
    prefixes = format.components(name)[component]
    prefix = next((p for p in prefixes if any(one.startswith(p) for one in modules)), None)
    if prefix is None:
        return None
    heads = [one.removeprefix(prefix) for one in modules if one.startswith(prefix)]
    words, ways = Counter(head.partition(".")[0] for head in heads), []
    for naming in format.namings(name):
        own = first_words(name, component, naming)
        if least and sum(words[word] for word in own) < least * len(heads):
            continue  # before patterns are made, which takes longer than all else
        names = names_of(name, component, naming)
        matches = {head: found[0] for head in heads if (found := names.find(head))}
        ways.append(_Known(FileComponent(prefix, naming), names, matches, len(heads)))
    return max(ways, key=lambda way: len(way.matches), default=None)


def _sizes(checkpoint: Checkpoint, known: _Known) -> Iterator[Size]:
    """Rows and inputs of the model's modules, from the file's weights."""
    for head, match in known.matches.items():
        spec = checkpoint.tensors.get(f"{known.part.prefix}{head}.weight")
        if spec is None or len(spec.shape) < 2:
            continue
        inputs = spec.shape[1] * (2 if spec.dtype == "U8" else 1)  # pairs of FP4 values
        models = known.names.models(match)
        shares = [one if isinstance(one, int) else 1 for one in match.rule.rows]
        shares = shares if len(shares) == len(models) else [1] * len(models)
        for module, share in zip(models, shares, strict=True):
            yield Size(module, Fraction(spec.shape[0] * share, sum(shares)), inputs)
