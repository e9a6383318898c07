"""The schema of the TOML files: each word with its type; an unknown word is an error.

A format describes files of adapters; an architecture describes names of modules. Nothing in them is
evaluated as code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from adapterkit.adapters.formats.files.configs import WORDS, unknown_words
from adapterkit.adapters.formats.modules.kinds import KINDS
from adapterkit.core import records
from adapterkit.core.errors import Damaged
from adapterkit.core.records import Json, Settings
from adapterkit.core.registry import STABLE, Tier

R = TypeVar("R")
MODEL = "model"  # the naming of the loaded model
ADAPTER_LAYOUT = "adapter"  # PEFT's: read and written by `core/adapter/`
PEFT = "peft"  # the format of that layout that is PEFT's own; others are dialects
# rules' words that are no namings
RULE_WORDS = ("rows", "parts", "steps", "columns", "embedding", "untied", "matrix")
HEADS = ("heads", "kv_heads")  # shares of rows that come from a model's config


@dataclass(frozen=True)
class FileSchema:
    """The files that hold the adapter."""

    container: Literal["safetensors", "gguf", "pickle"] = "safetensors"
    name: str = "adapter_model.safetensors"  # in a folder
    # config files: the first is written, all are read, earlier ones first
    config: tuple[str, ...] = ()
    carry: tuple[re.Pattern[str], ...] = ()  # other files that go along within a layout


@dataclass(frozen=True)
class DetectSchema:
    """Features by which a file of the format is recognized."""

    priority: int = 0
    keys: tuple[re.Pattern[str], ...] = ()  # each matches some key
    no_keys: tuple[re.Pattern[str], ...] = ()  # none matches any
    axes: int = 0  # of the tensors whose keys match; 0: any
    config: tuple[str, ...] = ()  # settings that are there
    no_config: tuple[str, ...] = ()  # settings that are not
    settings: Mapping[str, re.Pattern[str]] = field(default_factory=dict)  # their values, as JSON
    metadata: Mapping[str, re.Pattern[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class InSchema:
    """Names in one architecture that differ from the format's others."""

    naming: tuple[str, ...] | None = None
    components: Mapping[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class NameSchema:
    """The way in which keys name modules."""

    style: Literal["dots", "underscores"] = "dots"  # underscores: every dot written as _
    # columns of the architectures' rules: the first is written, all are read
    naming: tuple[str, ...] = (MODEL,)
    # regex -> replacement, in order: spellings of keys that are read like others, never written
    renames: Mapping[str, str] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()  # none: names are the model's, of any architecture
    unlisted: bool = False  # names that the rules do not list are the model's
    file: bool = False  # also the names in a given base's file
    absent: tuple[re.Pattern[str], ...] = ()  # unlisted ones that no client's model has
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # -> prefixes of keys
    architecture_key: str = ""  # of the metadata: the architecture, if names fit several
    inside: Mapping[str, InSchema] = field(default_factory=dict)  # "in" in the file


@dataclass(frozen=True)
class ScaleSchema:
    """The location of the scale."""

    # shared: a word of the metadata
    place: Literal["tensor", "config", "metadata", "shared", "none"] = "none"
    default: str | float = "rank"  # alpha if there is none: rank (scale 1), a number, ask
    means: Literal["alpha", "scale"] = "alpha"  # scale: the stored number is alpha / rank
    uniform: bool = False  # one rank and one scale for all modules
    key: str = ""  # of the metadata: PEFT's settings in JSON, by component
    older: str = ""  # the versions that multiplied a scale by the alpha
    without: str = ""  # prefix that names in the declaration omit


@dataclass(frozen=True)
class MetadataSchema:
    """Metadata of the file."""

    carry: tuple[re.Pattern[str], ...] = ()  # keys that stay within the format
    write: Mapping[str, str] = field(default_factory=dict)  # key -> template


@dataclass(frozen=True)
class ConfigSchema:
    """The file of settings: a template, and the path of each value."""

    write: Settings = field(default_factory=dict)
    read: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # dotted paths, any of them


@dataclass(frozen=True)
class RefusedSchema:
    """A setting that the readers of a dialect do not accept."""

    value: re.Pattern[str]  # as JSON
    why: str
    hint: str


@dataclass(frozen=True)
class AdapterSchema:
    """A dialect of PEFT's layout."""

    # each: one module for each; base: as the base's file has them
    experts: Literal["stacks", "each", "base"] = "stacks"
    # the side that a stack's a is over: inputs; first axis, of the matrices as the model keeps
    # them; outputs
    a_over: Literal["inputs", "first axis", "outputs"] = "inputs"
    slowest: Literal["rank", "expert"] = "rank"  # the slowest index in the columns of a stack's b
    # rows: a (E·r, in), under its module's key; axis: a (E, r, in), under the parameter's
    stacks: Literal["rows", "axis"] = "rows"
    names: Literal["model", "base"] = "model"  # base: as the base's file has them
    targets: Literal["names", "ends"] = "names"  # ends: target_modules are the last words of names
    saved: tuple[str, ...] = ()  # modules trained in full that are read; none: all
    together: tuple[tuple[str, ...], ...] = ()  # modules that readers need together
    # of these, one that the model's code may lack -> one with as many rows, if there is one
    alike: Mapping[str, str] = field(default_factory=dict)
    # linear attention's joined projection -> those of keys, keys and values, as readers need them
    split: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    # modules that readers name otherwise, if no base gives the names
    renames: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)  # that are written
    refuse: Mapping[str, RefusedSchema] = field(default_factory=dict)  # by the setting

    @property
    def is_read_by_peft(self) -> bool:
        """True if some version of PEFT reads it correctly."""
        is_flat = self.stacks == "rows" and self.slowest == "rank"
        return is_flat and self.a_over != "outputs"


@dataclass(frozen=True)
class Format:
    """A layout of adapters."""

    name: str
    title: str
    summary: str
    sources: tuple[str, ...]
    tier: Tier = STABLE
    writes: bool = True
    layout: Literal["keys", "adapter"] = "keys"  # or ADAPTER_LAYOUT
    clients: tuple[str, ...] = ()
    note: str = ""  # how to use the file {file}
    file: FileSchema = field(default_factory=FileSchema)
    detect: DetectSchema = field(default_factory=DetectSchema)
    names: NameSchema = field(default_factory=NameSchema)
    kinds: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    widens: bool = False  # clients widen a weight of the base that has fewer inputs
    # kind -> the modules that clients take it of
    only: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    ties: bool = False  # factors of embeddings act in a head that the base ties to them
    alike: tuple[str, ...] = ()  # roles that all modules of a component have, or none
    # kinds that no format stores: name -> keys
    refused: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scale: ScaleSchema = field(default_factory=ScaleSchema)
    metadata: MetadataSchema = field(default_factory=MetadataSchema)
    config: ConfigSchema = field(default_factory=ConfigSchema)
    adapter: AdapterSchema = field(default_factory=AdapterSchema)

    def namings(self, architecture: str | None) -> tuple[str, ...]:
        """The possible namings in an architecture (columns of its rules); the first is written."""
        own = self.names.inside.get(architecture or "")
        return own.naming if own is not None and own.naming is not None else self.names.naming

    def components(self, architecture: str | None) -> Mapping[str, tuple[str, ...]]:
        """The prefixes of each component's keys in an architecture."""
        own = self.names.inside.get(architecture or "")
        if own is not None and own.components is not None:
            return own.components
        return self.names.components


@dataclass(frozen=True)
class NamingRule:
    """One module in each naming, or modules of the model that one of another naming fuses."""

    model: tuple[str, ...]
    namings: Mapping[str, str]
    # shares of the fused rows, or names from a model's config; none: equal
    rows: tuple[int | Literal["heads", "kv_heads"], ...] = ()
    # orders of rows, and of columns, by naming: from the file to the model
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # the architecture's, with its rules (`modules/names.py`)
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    embedding: bool = False  # its factors are an embedding's
    # namings that name a matrix (in, out) itself instead of a module with a weight
    matrix: tuple[str, ...] = ()
    untied: bool = False  # adapted only if the base does not tie embeddings and head
    parts: tuple[str, ...] = ()  # words of the config: whether each of the modules is in the file


@dataclass(frozen=True)
class ComponentSchema:
    """The modules of one component."""

    include: tuple[str, ...] = ()  # architectures whose rules also apply here
    # regex -> replacement: names of the model that rules have in another spelling
    renames: Mapping[str, str] = field(default_factory=dict)
    # naming -> prefix of all its names, also of unlisted ones, before the rules' own
    inside: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[NamingRule, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)  # of modules that adapters may widen
    # regex of a module -> the kernel of its convolution; others are linear layers
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ArchitectureHints:
    """Evidence that distinguishes architectures with similar names."""

    metadata: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    # regex of a module -> its inputs, or the possible ones
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # likewise -> rows and inputs in their lowest terms, of models of any width
    ratios: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    models: tuple[str, ...] = ()  # model_type in config.json of the base
    modules: tuple[str, ...] = ()  # names in the model without which a file is of another family
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # stack -> possible numbers


@dataclass(frozen=True)
class BlockSchema:
    """Blocks of the denoiser; adapters may have a weight for each."""

    # regex of a part and a module's original name -> the block, before the number that it captures
    names: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)  # length -> the blocks, in their order
    presets: Mapping[str, str] = field(default_factory=dict)  # name -> the weights of a list


@dataclass(frozen=True)
class Architecture:
    """Module names of a family of models."""

    name: str
    title: str
    sources: tuple[str, ...]
    components: Mapping[str, ComponentSchema]
    detect: ArchitectureHints = field(default_factory=ArchitectureHints)
    words: Mapping[str, str] = field(default_factory=dict)  # for formats' templates of metadata
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    blocks: BlockSchema = field(default_factory=BlockSchema)


def format_from(name: str, table: Json) -> Format:
    """The format of a parsed TOML file; `ValueError` or `Damaged` with the problems in it."""
    names = {"inside" if word == "in" else word: v for word, v in table.get("names", {}).items()}
    one = _record(Format, {"name": name, **table, "names": names}, name)
    unknown = unknown_words(dict(one.config.write)) + sorted(set(one.config.read) - set(WORDS))
    if unknown or (one.config.write and not one.file.config):
        raise ValueError(f"{name}: settings {unknown or 'without a file'}")
    for kind, roles in one.kinds.items():
        if kind not in KINDS or set(roles) - KINDS[kind].roles:
            raise ValueError(f"{name}: kind {kind!r} with roles {sorted(roles)}")
    return one


def architecture_from(name: str, table: Json) -> Architecture:
    """The architecture of a parsed TOML file; `ValueError` or `Damaged` with its problems."""
    components = {
        component: words | {"rules": [_rule(rule) for rule in words.get("rules", [])]}
        for component, words in table.get("components", {}).items()
    }
    one = _record(Architecture, {"name": name, **table, "components": components}, name)
    for rule in (rule for words in one.components.values() for rule in words.rules):
        sizes = {len(own) for own in (rule.rows, rule.parts) if own}
        if not rule.model or sizes - {len(rule.model)} or set(rule.parts) - set(WORDS):
            raise ValueError(f"{name}: model, rows and parts of {rule}")
    return one


def _rule(table: Json) -> Json:
    """A rule's table, with unknown words taken as namings."""
    own = {word: value for word, value in table.items() if word in (*RULE_WORDS, MODEL)}
    return own | {"namings": {k: value for k, value in table.items() if k not in own}}


def _record(kind: type[R], table: Json, name: str) -> R:
    return records.read(kind, table, f"{name}.toml", hint="fix the file", kind=Damaged)
