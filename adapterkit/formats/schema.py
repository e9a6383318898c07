"""The words of the TOML files, each with its type; a word that is not here is an error.

A format says how files hold an adapter; an architecture says how modules are named. Nothing of
theirs is evaluated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from adapterkit.formats.configs import WORDS, unknown_words
from adapterkit.formats.kinds import KINDS

R = TypeVar("R")
MODEL = "model"  # the naming of the loaded model
ADAPTER_LAYOUT = "adapter"  # PEFT's: read and written by the package `adapters`
# rules' words that are no namings
RULE_WORDS = ("rows", "parts", "steps", "embedding", "untied")
HEADS = ("heads", "kv_heads")  # shares of rows that a model's config tells


@dataclass(frozen=True)
class FileWords:
    """Which files hold the adapter."""

    container: str = "safetensors"  # or gguf, pickle
    name: str = "adapter_model.safetensors"  # in a folder
    # files of settings beside it: the first is written, all are read, earlier ones first
    config: tuple[str, ...] = ()
    carry: tuple[re.Pattern[str], ...] = ()  # other files that go along within a layout


@dataclass(frozen=True)
class DetectWords:
    """What a file of the format looks like."""

    priority: int = 0
    keys: tuple[re.Pattern[str], ...] = ()  # each matches some key
    no_keys: tuple[re.Pattern[str], ...] = ()  # none matches any
    config: tuple[str, ...] = ()  # settings that are there
    no_config: tuple[str, ...] = ()  # settings that are not
    settings: Mapping[str, re.Pattern[str]] = field(default_factory=dict)  # their values, as JSON
    metadata: Mapping[str, re.Pattern[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class InWords:
    """Names in one architecture, where they differ from the format's others."""

    naming: tuple[str, ...] | None = None
    components: Mapping[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class NameWords:
    """How a key names its module."""

    style: str = "dots"  # or underscores: every dot written as _
    # columns of the architectures' rules: the first is written, all are read
    naming: tuple[str, ...] = (MODEL,)
    # regex -> replacement, in order: spellings of keys that are read like others, never written
    renames: Mapping[str, str] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()  # none: names are the model's, of any architecture
    unlisted: bool = False  # names that the rules do not list are the model's
    file: bool = False  # and, of a base that is given, those in its file
    absent: tuple[re.Pattern[str], ...] = ()  # unlisted ones that no client's model has
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # -> prefixes of keys
    architecture_key: str = ""  # of the metadata: the architecture's name, which names do not tell
    inside: Mapping[str, InWords] = field(default_factory=dict)  # "in" in the file


@dataclass(frozen=True)
class ScaleWords:
    """Where the scale is."""

    place: str = "none"  # tensor, config, metadata, shared (a word of the metadata), none
    default: str | float = "rank"  # alpha where there is none: rank (scale 1), a number, ask
    means: str = "alpha"  # or scale: the stored number is alpha / rank
    uniform: bool = False  # one rank and one scale for all modules
    key: str = ""  # of the metadata: PEFT's settings in JSON, by component
    older: str = ""  # the versions that multiplied a scale by an alpha beside it
    without: str = ""  # what the names of modules that it declares do not begin with


@dataclass(frozen=True)
class MetadataWords:
    """Metadata of the file."""

    carry: tuple[re.Pattern[str], ...] = ()  # keys that stay within the format
    write: Mapping[str, str] = field(default_factory=dict)  # key -> template


@dataclass(frozen=True)
class ConfigWords:
    """The file of settings: a tree with places to fill in, and where to read each value."""

    write: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # dotted paths, any of them


@dataclass(frozen=True)
class RefusedWords:
    """A setting that the readers of a dialect do not take."""

    value: re.Pattern[str]  # as JSON
    why: str
    hint: str


@dataclass(frozen=True)
class AdapterWords:
    """A dialect of PEFT's layout."""

    experts: str = "stacks"  # or each: one module for each; base: as the base's file has them
    # the side that a stack's a is over: inputs; first axis, of the matrices as the model keeps
    # them; outputs
    a_over: str = "inputs"
    slowest: str = "rank"  # or expert: what counts slowest in the columns of a stack's b
    names: str = "model"  # or base: as the base's file has them
    targets: str = "names"  # or ends: target_modules are the last words of names
    saved: tuple[str, ...] = ()  # modules trained in full that are read; none: all
    together: tuple[tuple[str, ...], ...] = ()  # modules that are there with all others of theirs
    settings: Mapping[str, Any] = field(default_factory=dict)  # that are written
    refuse: Mapping[str, RefusedWords] = field(default_factory=dict)  # by the setting

    @property
    def is_read_by_peft(self) -> bool:
        """Whether PEFT of some version reads it as it is meant."""
        return self.a_over != "outputs" and self.slowest == "rank"


@dataclass(frozen=True)
class Format:
    """A layout of adapters."""

    name: str
    title: str
    summary: str
    sources: tuple[str, ...]
    writes: bool = True
    layout: str = "keys"  # or ADAPTER_LAYOUT
    clients: tuple[str, ...] = ()
    note: str = ""  # what to do with the file, of which {file} is the name
    file: FileWords = field(default_factory=FileWords)
    detect: DetectWords = field(default_factory=DetectWords)
    names: NameWords = field(default_factory=NameWords)
    kinds: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    widens: bool = False  # clients widen a weight of the base that has fewer inputs
    # kind -> the modules that clients take it of
    only: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    ties: bool = False  # factors of embeddings act in a head that the base ties to them
    alike: tuple[str, ...] = ()  # roles that all modules of a component have, or none
    # what no format holds, by name -> keys
    refused: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scale: ScaleWords = field(default_factory=ScaleWords)
    metadata: MetadataWords = field(default_factory=MetadataWords)
    config: ConfigWords = field(default_factory=ConfigWords)
    adapter: AdapterWords = field(default_factory=AdapterWords)

    def namings(self, architecture: str | None) -> tuple[str, ...]:
        """The columns of an architecture's rules in which names are; the first is written."""
        own = self.names.inside.get(architecture or "")
        return own.naming if own is not None and own.naming is not None else self.names.naming

    def components(self, architecture: str | None) -> Mapping[str, tuple[str, ...]]:
        """The prefixes of each component's keys in an architecture."""
        own = self.names.inside.get(architecture or "")
        if own is not None and own.components is not None:
            return own.components
        return self.names.components


@dataclass(frozen=True)
class Rule:
    """One module in each naming, or modules of the model that one of another naming fuses."""

    model: tuple[str, ...]
    namings: Mapping[str, str]
    rows: tuple[int | str, ...] = ()  # shares of the fused rows, or of HEADS; none: equal
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by naming, to the model
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # the architecture's
    embedding: bool = False  # its factors are an embedding's
    untied: bool = False  # adapted only where the base does not tie embeddings and head
    parts: tuple[str, ...] = ()  # words of the config: whether each of the modules is in the file


@dataclass(frozen=True)
class ComponentWords:
    """The modules of one component."""

    include: tuple[str, ...] = ()  # architectures whose rules hold here too
    rules: tuple[Rule, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)  # of modules that adapters may widen
    # regex of a module -> the kernel of its convolution; others are linear layers
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ArchitectureHints:
    """What tells architectures apart whose names are alike."""

    metadata: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    # regex of a module -> its inputs, or what they may be
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # likewise -> rows and inputs in their lowest terms, of models of any width
    ratios: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    models: tuple[str, ...] = ()  # model_type in config.json of the base
    # path of a stack of blocks -> how many there are, or may be
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """Module names of a family of models."""

    name: str
    title: str
    sources: tuple[str, ...]
    components: Mapping[str, ComponentWords]
    detect: ArchitectureHints = field(default_factory=ArchitectureHints)
    words: Mapping[str, str] = field(default_factory=dict)  # for formats' templates of metadata
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def format_from(name: str, table: dict[str, Any]) -> Format:
    """The format of a parsed TOML file; `ValueError` with what is wrong in it."""
    table = {"name": name, **table}
    if "in" in table.get("names", {}):
        names = dict(table["names"])
        inside = names.pop("in")
        table["names"] = names | {"inside": inside}
    one = _record(Format, table, name)
    unknown = unknown_words(dict(one.config.write)) + sorted(set(one.config.read) - set(WORDS))
    if unknown or (one.config.write and not one.file.config):
        raise ValueError(f"{name}: settings {unknown or 'without a file'}")
    for kind, roles in one.kinds.items():
        if kind not in KINDS or set(roles) - KINDS[kind].roles:
            raise ValueError(f"{name}: kind {kind!r} with roles {sorted(roles)}")
    choices = [
        ("layout", one.layout, ("keys", ADAPTER_LAYOUT)),
        ("container", one.file.container, ("safetensors", "gguf", "pickle")),
        ("style", one.names.style, ("dots", "underscores")),
        ("place", one.scale.place, ("tensor", "config", "metadata", "shared", "none")),
        ("means", one.scale.means, ("alpha", "scale")),
        ("experts", one.adapter.experts, ("stacks", "each", "base")),
        ("a_over", one.adapter.a_over, ("inputs", "first axis", "outputs")),
        ("slowest", one.adapter.slowest, ("rank", "expert")),
        ("names", one.adapter.names, ("model", "base")),
        ("targets", one.adapter.targets, ("names", "ends")),
    ]
    for word, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}: {word} = {value!r}, expected one of {', '.join(known)}")
    return one


def architecture_from(name: str, table: dict[str, Any]) -> Architecture:
    """The architecture of a parsed TOML file; `ValueError` with what is wrong in it."""
    table = {"name": name, **table}
    components = {}
    for component, words in table.get("components", {}).items():
        tables = table.get("tables", {})
        rules = [_rule(rule, tables, f"{name}.{component}") for rule in words.get("rules", [])]
        components[component] = words | {"rules": rules}
    return _record(Architecture, table | {"components": components}, name)


def _rule(table: dict[str, Any], tables: dict[str, dict[str, str]], where: str) -> Rule:
    model = table.get("model", [])
    namings = {k: v for k, v in table.items() if k not in (*RULE_WORDS, MODEL)}
    if not all(isinstance(text, str) for text in namings.values()):
        raise ValueError(f"{where}: a naming that is no text in {table}")
    rule = Rule(
        (model,) if isinstance(model, str) else tuple(model),
        namings,
        tuple(table.get("rows", ())),
        {naming: tuple(steps) for naming, steps in table.get("steps", {}).items()},
        tables,
        table.get("embedding") is True,
        table.get("untied") is True,
        tuple(table.get("parts", ())),
    )
    sizes = {len(own) for own in (rule.rows, rule.parts) if own}
    if not rule.model or sizes - {len(rule.model)}:
        raise ValueError(f"{where}: model, rows and parts of {table}")
    unknown = {share for share in rule.rows if share not in HEADS and not isinstance(share, int)}
    if unknown or set(rule.parts) - set(WORDS):
        raise ValueError(f"{where}: rows or parts of {table}")
    return rule


def _record(kind: type[R], table: Any, where: str) -> R:
    """A record of a table; every word is a field of it."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {table!r} is no table")
    hints = get_type_hints(kind)
    # a dataclass, which no bound of a type variable says
    names = {one.name for one in fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = set(table) - names
    if unknown:
        raise ValueError(f"{where}: unknown words {sorted(unknown)}")
    values = {k: _value(hints[k], v, f"{where}.{k}") for k, v in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the TOML file as the field's type has it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        options = [one for one in arguments if one is not type(None)]
        simple = [one for one in options if isinstance(one, type) and isinstance(value, one)]
        return value if simple else _value(options[0], value, where)
    if hint is Any or isinstance(value, hint if isinstance(hint, type) else ()):
        return value
    if hint is re.Pattern or origin is re.Pattern:
        return re.compile(value)
    if origin is tuple:
        values = [value] if isinstance(value, str | int) else value
        if isinstance(values, list):
            return tuple(_value(arguments[0], one, where) for one in values)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _value(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return _record(hint, value, where)
    raise ValueError(f"{where}: {value!r}")
