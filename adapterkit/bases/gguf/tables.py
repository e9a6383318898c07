"""Names and layouts of architectures that transformers does not read from GGUF: the tables of
`convert --to gguf`, inverted, and transformers' model for a config with the metadata's sizes.

Such a model provides the names and classes of modules. Shapes come from the file, and the config
cannot run the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from adapterkit.adapters.formats.base_model import model_heads
from adapterkit.adapters.formats.library import architectures, format_named
from adapterkit.adapters.formats.modules.names import ComponentNames, names_of
from adapterkit.adapters.formats.modules.row_permutations import model_order
from adapterkit.bases.gguf.config import class_name_of
from adapterkit.bases.gguf.file import GgufFile, number_of
from adapterkit.bases.gguf.header import EMBEDDING, HEAD, Entry, GgufHeader
from adapterkit.bases.gguf.placement import Build, ReadArray
from adapterkit.bases.gguf.weight import as_tensor, converted
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.skeleton import Skeleton

COLUMNS = 3
FORMAT = "gguf"
ONLY_MODELS = "gguf_model"  # the naming of modules that llama.cpp's graphs take no adapter for
EXPERT = "*"  # in a key: the number of each matrix of a stack
# architecture -> the norms whose weights llama.cpp adds 1 to
SHIFTED = {"gemma": re.compile("norm"), "qwen3next": re.compile(r"^(?!.*\.linear_attn\.)")}
# metadata that decide which modules there are -> the names of it in the configs that have it
SIZES: Mapping[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "intermediate_size_mlp"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_shared_count": ("n_shared_experts",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "attention.key_length": ("head_dim",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
}


@dataclass(frozen=True)
class TablePlace:
    """A tensor in a transformers checkpoint: its key, with `EXPERT` for each matrix of a stack, and
    the orders of its rows in the file."""

    key: str
    steps: tuple[str, ...] = ()
    shift: int = 0  # the constant that the file adds to each value


@cache
def table_of(architecture: str) -> "NameTable | None":
    """The table of an architecture by its name in GGUF, or None."""
    format = format_named(FORMAT).names
    if architecture not in format.architectures:
        return None
    namings = (names_of(architecture, "", one) for one in (*format.naming, ONLY_MODELS))
    return NameTable(architectures()[architecture].detect.models, tuple(namings))


@dataclass(frozen=True)
class NameTable:
    """The rules of an architecture."""

    models: tuple[str, ...]  # transformers' model types, to try in this order
    namings: tuple[ComponentNames, ...]

    def places(self, name: str) -> list[TablePlace]:
        """Possible places of a tensor of that name, by rules for one module, because slices of
        several could not be distinguished."""
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
        """The file's row for each of so many rows of the model; None: the same order. `Refused`
        without a number of heads that the steps need."""
        if not place.steps:
            return None
        return torch.tensor(model_order(place.steps, size, model_heads(config), place.key))


def sizes_of(header: GgufHeader) -> dict[str, int]:
    """The sizes in the metadata, by all their names in configs."""
    stated = ((header.metadata.get(f"{header.architecture}.{key}"), SIZES[key]) for key in SIZES)
    return {name: value for value, names in stated if type(value) is int for name in names}


def table_config(file: GgufFile, model_type: str) -> Json:
    """The config of a model of that type with the sizes of a file."""
    from transformers import AutoConfig

    defaults = file.call_transformers("config", lambda: AutoConfig.for_model(model_type).to_dict())
    is_nested = isinstance(defaults.get("text_config"), dict)
    known = defaults["text_config"] if is_nested else defaults
    sizes: Json = {"pad_token_id": None} if "pad_token_id" in known else {}
    sizes |= {name: value for name, value in sizes_of(file.header).items() if name in known}
    if sizes.get("num_experts") and "enable_moe_block" in known:
        sizes["enable_moe_block"] = True
    if EMBEDDING in file.entries:
        sizes["vocab_size"] = file.entries[EMBEDDING].shape[0]
    tied = {"tie_word_embeddings": HEAD not in file.entries}
    kind = known.get("model_type")
    text = {"text_config": {"model_type": kind} | sizes | tied} if is_nested else sizes
    classes = {"architectures": [class_name_of(file, model_type)]}
    return {"model_type": model_type} | classes | text | tied


class TableNames:
    """Names of an architecture, from a table and then from transformers' loader."""

    def __init__(self, table: NameTable, model: Skeleton, architecture: str):
        self.table, self.model, self.architecture = table, model, architecture

    def place(self, name: str) -> TablePlace | None:
        """The place of a tensor in the model. Otherwise the table's first place that is no stack,
        because the config may lack the layer's kind."""
        places = [*self.table.places(name), *self._norms.get(name, ())]
        found = (one for one in places if self._target(one)[0] in self.model.state)
        return next(found, next((one for one in places if EXPERT not in one.key), None))

    @cached_property
    def _norms(self) -> dict[str, list[TablePlace]]:
        """Norms by their names in the gguf package."""
        import gguf

        number = number_of(self.architecture)
        if number is None:
            return {}
        layers = self.model.model.config.get_text_config().num_hidden_layers
        table, shifted = gguf.get_tensor_name_map(number, layers), SHIFTED.get(self.architecture)
        return {
            name: [TablePlace(key, shift=int(bool(shifted and shifted.search(key))))]
            for key, value in self.model.state.items()
            if value.dim() == 1 and "norm" in key
            if (name := table.get_name(key, try_suffixes=(".weight", ".bias"))) is not None
        }

    def target(self, name: str) -> str | None:
        place = self.place(name)
        return None if place is None else self._target(place)[0]

    def shape(self, build: Build, entries: list[Entry]) -> tuple[int, ...] | None:
        """The shape of the built parameter; None if a few columns do not reveal it."""
        import numpy as np

        widths = {entry.shape[-1] for entry in entries if len(entry.shape) > 1}
        if not widths:
            return entries[0].shape if len(entries) == 1 else None
        narrow = {entry.name: (*entry.shape[:-1], COLUMNS) for entry in entries}
        try:
            built = build(lambda name: np.zeros(narrow[name], np.float32)).shape
        except Exception:  # transformers' code, on shapes that it does not expect
            return None
        return (*built[:-1], *widths) if built[-1] == COLUMNS and len(widths) == 1 else None

    def _target(self, place: TablePlace) -> tuple[str, str | None]:
        return self.model.loaded_as(place.key.replace(EXPERT, "0"))

    def build(self, key: str, names: list[str]) -> Build:
        sources = []
        for name in names:
            place = self.place(name) or TablePlace(name)
            sources.append(_PlacedTensor(name, place, self._target(place)[1]))
        patterns = {source.pattern for source in sources}
        among = (c for c in self.model.converters if patterns & {*c.source_patterns})
        converter = next(among, None)
        if converter is not None:  # in the order of its sources, gate before up
            sources.sort(key=lambda source: converter.source_patterns.index(source.pattern))
        return _Tabled(key, tuple(sources), converter, self.table, self.model.base.config)


@dataclass(frozen=True)
class _PlacedTensor:
    name: str  # of the GGUF tensor
    place: TablePlace
    pattern: str | None  # of the converter, that its key matches


@dataclass(frozen=True)
class _Tabled:
    """A parameter built as by transformers' loader, from tensors in their checkpoint layout."""

    key: str
    sources: tuple[_PlacedTensor, ...]
    converter: Any | None
    table: NameTable
    config: Json

    def __call__(self, read: ReadArray, /) -> Tensor:
        tensors = [self._in_order(source.place, read(source.name)) for source in self.sources]
        if self.converter is None:
            (tensor,) = tensors
            return tensor
        return converted(
            self.converter,
            self.key,
            (
                (source.place.key.replace(EXPERT, str(number)), source.pattern, one)
                for source, tensor in zip(self.sources, tensors, strict=True)
                for number, one in enumerate(tensor if EXPERT in source.place.key else [tensor])
            ),
        )

    def _in_order(self, place: TablePlace, array: Any) -> Tensor:
        tensor = as_tensor(array)
        tensor = tensor - place.shift if place.shift else tensor
        rows = self.table.rows(place, len(tensor), self.config)
        return tensor if rows is None else tensor[rows]


def model_by_table(file: GgufFile, table: NameTable, checkpoint: Checkpoint) -> Skeleton:
    """The first of the table's models that transformers can build in the sizes of a file; `Refused`
    with the first problem."""
    problem: AdapterkitError | None = None
    for model_type in table.models:
        try:
            config = table_config(file, model_type)
            return Skeleton(replace(checkpoint, config=config), config["architectures"][0])
        except AdapterkitError as error:
            problem = problem or error
    assert problem is not None
    raise problem
