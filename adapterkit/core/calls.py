"""A verb's call as data: its arguments in a file, and as a command.

A file that holds a call may come from a stranger, so it says only which output is computed. The
user alone decides where the job runs, what it replaces and where it is sent."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from adapterkit.core.checkpoint.hub_ids import portable_name
from adapterkit.core.commands import argument, line
from adapterkit.core.errors import AdapterkitError, Problems, listed
from adapterkit.core.options import OptionRecord, StrPath, finite, flag_of, option_of
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.core.shared_options import RUNNING

# (kind of the check: source or file, path) -> its text
Spelling = Callable[[str, StrPath], str]
COMMAND = "(the command)"  # its placeholder in a card
# Options that no file holds: the user gives them on the command line. The driver of a Ray cluster
# unpickles what it is sent, so the address of a cluster is one of them.
OF_THE_USER = (
    "accept", "allow_pickle", "choose", "dry_run", "engine", "overwrite", "progress", "push",
    "ray_address", "resume",
)  # fmt: skip
# a receipt does not hold how the job ran, or how its output was checked
NOT_IN_RECEIPTS = frozenset({*OF_THE_USER, *RUNNING, "verify", "fail_below"})


def arguments_of(verb: OptionRecord, spell: Spelling, without: Collection[str]) -> Json:
    """Return the arguments that were given, as JSON values if possible; sources with their
    weights."""
    arguments = {}
    for field in dataclasses.fields(verb):
        value, option = getattr(verb, field.name), option_of(field)
        if field.name not in without and value != field.default:
            value = load(option.contents)(value) if option.contents else value
            arguments[field.name] = _spelled(option.check.kind, value, spell)
    return arguments


def check_call(
    kind: type[OptionRecord], call: Json, without: Collection[str], where: str, hint: str
) -> None:
    """Refuse a call in a file that has options of the user, or contents of files instead of their
    paths."""
    errors, fields = Problems(where=where, hint=hint, code="AK114"), kind.__dataclass_fields__
    if more := sorted(name for name in call if name in without):
        errors.add(f"it holds {listed(more)}", "what is computed: the rest is the user's to say")
    named = [name for name in call if name in fields and option_of(fields[name]).contents]
    for name in named:
        texts = call[name] if isinstance(call[name], list) else [call[name]]
        if paths := [text for text in texts if isinstance(text, str) and _may_be_path(text)]:
            errors.add(f"{flag_of(name)} names a file: {listed(paths)}", "what the file holds")
    errors.raise_all()


def _may_be_path(text: str) -> bool:
    text = re.sub(r"^\d+:", "", text)
    if text.lstrip().startswith("{"):
        return False
    names = (text, text.rpartition(":")[0])
    return re.search(r"[/\\]|\.(txt|json)\b", text) is not None or any(map(os.path.isfile, names))


def _spelled(kind: str, value: Any, spell: Spelling) -> Any:
    if kind == "sources":
        pairs = [one if isinstance(one, tuple) else (one, None) for one in value]
        return [spelled_source(source, weight, spell) for source, weight in pairs]
    if isinstance(value, list | tuple):
        return [_spelled(kind, one, spell) for one in value]
    is_path = kind in ("source", "file") and isinstance(value, str | os.PathLike)
    return spell(kind, value) if is_path else value


def spelled_source(source: StrPath, weight: float | None, spell: Spelling) -> Any:
    """Return a source, with its weight if it has one."""
    text = os.fspath(source)
    path, _, number = text.rpartition("=")
    if weight is None and path and not os.path.exists(text) and finite(number) is not None:
        text, weight = path, finite(number)
    name = spell("source", text)
    return name if weight is None else [name, weight]


def call_of(verb: OptionRecord) -> Json:
    """Return the call that makes an output again, without what is specific to one machine: only
    the last component of a path, Hub ids without commits (the recipe has them), no options of
    the run."""
    return arguments_of(verb, lambda _, path: portable_name(path), NOT_IN_RECEIPTS)


def is_data(value: object) -> bool:
    """Return whether JSON has the value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


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
            words += [flag, word] if flag else [argument(word)]
    return line([*words, "--out", out], shlex.quote)


def with_command(files: Mapping[str, Any], verb: OptionRecord) -> dict[str, Any]:
    """Return small files with the verb's command filled in."""
    # a backtick would end the block of code
    text = command_of(type(verb), call_of(verb), "OUT").replace("`", "_").encode()
    return {
        name: data.replace(COMMAND.encode(), text) if isinstance(data, bytes) else data
        for name, data in files.items()
    }


def _word(value: Any) -> str:
    """Return one value as text; a source with a weight as `SOURCE=WEIGHT`."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], float | int):
        return value[0] if value[1] == 1 else f"{value[0]}={value[1]:g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@contextlib.contextmanager
def own_hints(verb: OptionRecord | type[OptionRecord]) -> Iterator[None]:
    """Adapt the hints of errors in this block to the options of `verb`, because verbs share
    planning. In a nested verb, such as a step of `run`, the inner one's options count. Commands in
    hints get the paths of the call."""
    try:
        yield
    except AdapterkitError as error:
        own_hint = load("core.hints:own_hint")
        for one in getattr(error, "errors", (error,)):
            if not one.is_of_verb:
                one.hint, one.is_of_verb = own_hint(one.hint, verb, one.where), True
        raise
