"""Read and write the config of an adapter: fields in JSON or YAML.

A format names its fields by words (WORDS); its TOML file maps them to paths in the config.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.strict import check_depth, read_json
from adapterkit.core.errors import Damaged, Problems, shown
from adapterkit.core.records import (
    FINITE,
    FLAG,
    POSITIVE_INT,
    TEXT,
    Check,
    Json,
    Settings,
    list_of,
    of_type,
    placed,
    table_of,
    values,
)

MAX_YAML = 100_000  # characters of four bytes at most; PyYAML takes a second for these


# the words for fields, and their valid values
WORDS: dict[str, Check] = {
    "rank": POSITIVE_INT, "alpha": FINITE, "scale": FINITE,
    "rank_pattern": table_of(TEXT, POSITIVE_INT), "alpha_pattern": table_of(TEXT, FINITE),
    "modules": list_of(TEXT), "suffixes": list_of(TEXT), "base": TEXT,
    "layers": of_type("a whole number", int),
    "rslora": FLAG,  # scale = alpha / √rank
    "dora": FLAG, "kind": TEXT, **dict.fromkeys("qkv", FLAG),  # which parts of a fused module
}  # fmt: skip


def read_config(folder: Folder, name: str) -> Json:
    """The table in a JSON or YAML file of the folder; `Damaged` if it holds none."""
    if not name.endswith((".yaml", ".yml")):
        return read_json(folder, name)
    size = folder.files()[name]
    try:
        value = strict_yaml(folder.read(name, 0, min(size, 4 * MAX_YAML + 1)).decode("utf-8"))
    except ValueError as error:
        raise Damaged(
            f"not YAML: {shown(error)}",
            expected="a table",
            where=name,
            hint="fix the file",
            code="AK204",
        ) from error
    if not isinstance(value, dict):
        problem = f"a YAML {type(value).__name__}"
        raise Damaged(problem, expected="a table", where=name, hint="fix the file", code="AK204")
    return value


def fields(
    config: Settings,
    paths: Mapping[str, Sequence[str]],  # word -> dotted paths; the first existing one counts
    where: str,
) -> Json:
    """The config's values by word; words without a value are missing.

    Raises `Refused` with all values that a word cannot have.
    """
    there = {
        word: next((path for path in options if _at(config, path) is not None), None)
        for word, options in paths.items()
    }
    names = {word: path for word, path in there.items() if path is not None}
    found = {word: _at(config, path) for word, path in names.items()}
    errors = Problems()
    values({word: WORDS[word] for word in found}, found, errors)
    Problems(placed(errors, where, hint="fix the file", name=names.__getitem__)).raise_all()
    return found


def filled(template: object, values: Settings) -> Any:
    """The template with each text "{word}" replaced by the word's value; fields without one are
    left out."""
    if isinstance(template, Mapping):
        pairs = ((key, filled(inner, values)) for key, inner in template.items())
        return {key: inner for key, inner in pairs if inner is not None}
    if isinstance(template, list):
        return [filled(inner, values) for inner in template]
    if isinstance(template, str) and template[:1] == "{":
        return values.get(template[1:-1])
    return template


def unknown_words(template: Any) -> list[str]:
    """The texts in braces in a template that are not words."""
    if isinstance(template, Mapping):
        return [word for inner in template.values() for word in unknown_words(inner)]
    if isinstance(template, list):
        return [word for inner in template for word in unknown_words(inner)]
    braces = isinstance(template, str) and template[:1] == "{"
    return [template] if braces and template not in {f"{{{word}}}" for word in WORDS} else []


def config_bytes(name: str, config: Settings) -> bytes:
    """The file's bytes: YAML if the name ends so, else JSON; equal configs give equal bytes."""
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_dump(dict(config), sort_keys=False).encode()
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _at(config: Settings, path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class _Strict(yaml.SafeLoader):
    """Loads plain values only, each key once, no aliases: these can expand without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise ValueError("an alias (*name) or a tag (!name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        table = super().construct_mapping(node, deep=deep)
        if len(table) != len(node.value):
            raise ValueError("a key twice")
        return table


def strict_yaml(text: str) -> Any:
    """The value of YAML text; `ValueError` with the reason if it is invalid or too long."""
    if len(text) > MAX_YAML:
        raise ValueError(f"more than {MAX_YAML} characters")
    try:
        value = yaml.load(text, _Strict)
        check_depth(value)
        json.dumps(value, skipkeys=True, default=str)  # fails for an integer too long to write
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value
