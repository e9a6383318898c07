"""The tables of `convert --to gguf`, read backwards: names in GGUF to a model's."""

from dataclasses import dataclass, replace
from functools import cache

from adapterkit.adapters.formats.base_model import model_heads
from adapterkit.adapters.formats.library import architectures, format_named
from adapterkit.adapters.formats.modules.names import ComponentNames, names_of
from adapterkit.adapters.formats.modules.row_permutations import model_order
from adapterkit.bases.gguf.tables import EXPERT, TablePlace
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json

FORMAT = "gguf"
ONLY_MODELS = "gguf_model"  # the naming of modules that llama.cpp's graphs take no adapter for


@cache
def table_of(architecture: str) -> "ArchitectureNames | None":
    """The table of an architecture by its name in GGUF; None without one."""
    format = format_named(FORMAT).names
    if architecture not in format.architectures:
        return None
    namings = (names_of(architecture, "", one) for one in (*format.naming, ONLY_MODELS))
    return ArchitectureNames(architectures()[architecture].detect.models, tuple(namings))


@dataclass(frozen=True)
class ArchitectureNames:
    """The rules of an architecture; a `NameTable`."""

    models: tuple[str, ...]
    namings: tuple[ComponentNames, ...]

    def places(self, name: str) -> list[TablePlace]:
        """Of rules for one module: parts of several would not be told apart."""
        stem, _, leaf = name.rpartition(".")
        found = []
        for names in self.namings:
            for match in names.find(stem):
                if len(match.rule.model) > 1 or leaf not in ("weight", "bias"):
                    continue
                number = names.stacked(match.rule)
                if number is not None:
                    match = replace(match, values=(*match.values, (number, EXPERT)))
                (module,) = names.models(match)
                found.append(TablePlace(f"{module}.{leaf}", match.rule.steps.get(names.naming, ())))
        return found

    def rows(self, place: TablePlace, size: int, config: Json) -> Tensor | None:
        """As the steps say; `Refused` without a number of heads that they need."""
        if not place.steps:
            return None
        return torch.tensor(model_order(place.steps, size, model_heads(config), place.key))
