"""A verb's call as data: its arguments in a file, and as a command."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any

from adapterkit.errors import shown
from adapterkit.hub.ids import COMMIT, parse
from adapterkit.options import OptionRecord, StrPath, finite, flag_of, option_of
from adapterkit.records import Json
from adapterkit.run_options import RUNNING

# (kind of the check: source or file, path) -> its text
Spelling = Callable[[str, StrPath], str]
COMMAND = "(the command)"  # its place in a card


def arguments_of(verb: OptionRecord, spell: Spelling, without: Collection[str]) -> Json:
    """The arguments that were given, as JSON has them where it can; sources with their weights."""
    arguments = {}
    for field in dataclasses.fields(verb):
        value = getattr(verb, field.name)
        if field.name not in without and value != field.default:
            arguments[field.name] = _spelled(option_of(field).check.kind, value, spell)
    return arguments


def _spelled(kind: str, value: Any, spell: Spelling) -> Any:
    if kind == "sources":
        pairs = [one if isinstance(one, tuple) else (one, None) for one in value]
        return [_weighted(source, weight, spell) for source, weight in pairs]
    if isinstance(value, list | tuple):
        return [_spelled(kind, one, spell) for one in value]
    is_path = kind in ("source", "file") and isinstance(value, StrPath)
    return spell(kind, value) if is_path else value


def _weighted(source: StrPath, weight: float | None, spell: Spelling) -> Any:
    """A source, with its weight where it has one."""
    text = os.fspath(source)
    path, _, number = text.rpartition("=")
    if weight is None and path and not os.path.exists(text) and finite(number) is not None:
        text, weight = path, finite(number)
    name = spell("source", text)
    return name if weight is None else [name, weight]


def call_of(verb: OptionRecord) -> Json:
    """What makes an output again, without what is of one machine: of paths the last part, ids of
    the Hub without their commits, which the recipe has, and nothing of how the job ran."""
    return arguments_of(verb, _name, {*RUNNING, "push", "verify"})


def is_data(value: object) -> bool:
    """Whether JSON has the value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _name(kind: str, path: StrPath) -> str:
    text = os.fspath(path)
    hub_id = None if os.path.exists(text) else parse(text)
    if hub_id is None:
        return shown(os.path.basename(os.path.normpath(text)))
    is_commit = COMMIT.fullmatch(hub_id.revision or "") is not None
    return str(dataclasses.replace(hub_id, revision=None) if is_commit else hub_id)


def command_of(kind: type[OptionRecord], call: Json, out: str) -> str:
    """The command of a call, quoted as in a POSIX shell: the same text on every system."""
    words = ["adapterkit", kind.name]
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.kw_only is True)
    for field in fields:
        if field.name not in call:
            continue
        value, option = call[field.name], option_of(field)
        flag = (option.flags or (flag_of(field.name),))[-1] if field.kw_only else None
        if option.check.kind == "flag":
            words += [flag] if flag and value else []
            continue
        if isinstance(value, dict):
            several = [f"{name}={number}" for name, number in value.items()]
        else:
            repeats = option.check.several or option.check.kind == "sources"
            several = [_word(one) for one in (value if repeats else [value])]
        for word in several:
            words += [flag, shlex.quote(word)] if flag else [shlex.quote(word)]
    return " ".join([*words, "--out", out])


def with_command(files: Mapping[str, Any], kind: type[OptionRecord], call: Json) -> dict[str, Any]:
    """Small files with the command in the place that they have for it."""
    printed = "".join(filter(str.isprintable, command_of(kind, call, "OUT")))
    text = printed.replace("`", "'").encode()  # which would end the block of code
    return {
        name: data.replace(COMMAND.encode(), text) if isinstance(data, bytes) else data
        for name, data in files.items()
    }


def _word(value: Any) -> str:
    """One value; of a source with a weight `SOURCE=WEIGHT`."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], float | int):
        return value[0] if value[1] == 1 else f"{value[0]}={value[1]:g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
