"""The parameters of a command, made from the fields of a verb's record."""

import dataclasses
import glob
import inspect
import json
import os
from typing import Any

import click

from adapterkit.cli.completion import Name, Number, SourceType, Targets, Word
from adapterkit.cli.group import COMMON
from adapterkit.core.options import flag_of, option_of
from adapterkit.core.records import Check, Json
from adapterkit.core.shared_options import RUNNING
from adapterkit.core.verb import Verb, WritingVerb, fields_of

json_option = click.Option(
    ["--json", "as_json"], is_flag=True, help="Print one JSON document to stdout."
)
quiet_option = click.Option(
    ["-q", "--quiet"], is_flag=True, help="Show no progress and no summary."
)
plan_option = click.Option(
    ["--plan"],
    type=click.Path(),
    metavar="FILE",
    help="Write a plan file for `adapterkit run`, for example on several machines, and stop.",
)
# parameters of running a job, which do not change its result
OF_RUNNING = RUNNING - {"out"} | {"plan", "as_json", "quiet"}
SHORT = {"out": ("-o",), "quiet": ("-q",)}  # flags of one letter
TYPES = {
    "integer": Number("integer"),
    "number": Number("float"),
    "source": SourceType(),
    "sources": SourceType(),
}
TYPES |= {"file": click.Path(), "targets": Targets()}


def parameters_of(verb: type[Verb]) -> list[click.Parameter]:
    """The arguments and options of a verb's command, in the order of its help."""
    parameters: dict[str, click.Parameter] = {}
    for field in fields_of(verb):
        if option_of(field).help or not field.kw_only:
            parameters[field.name] = _parameter(field)
        if issubclass(verb, WritingVerb) and field.name == "dry_run":
            parameters |= {"plan": plan_option, "as_json": json_option}
        if issubclass(verb, WritingVerb) and field.name == "overwrite":
            parameters["quiet"] = quiet_option
    return [*parameters.values()]


def sections_of(verb: type[Verb]) -> dict[str, str]:
    """The sections of the help: parameter -> title, those of running last."""
    owns = [(vars(one).get("section", ""), one) for one in reversed(verb.__mro__)]
    titles = {name: title for title, one in owns for name in inspect.get_annotations(one)}
    fields = ((field.name, option_of(field).section) for field in fields_of(verb))
    own = {name: title for name, its in fields if (title := its or titles[name])}
    return own | dict.fromkeys(OF_RUNNING - own.keys(), COMMON)


def _parameter(field: dataclasses.Field) -> click.Parameter:
    """An argument or an option; it is required if it has no default."""
    option, default = option_of(field), field.default
    check = option.check
    is_required = default is dataclasses.MISSING
    more: dict[str, Any] = {"required": is_required, "metavar": option.metavar}
    if not field.kw_only:
        more["type"] = TYPES.get(check.kind, str)
        if check.several:
            return SourcesArgument([field.name], nargs=-1, **more)
        return click.Argument([field.name], **more)
    if not is_required and default is not None and default is not False and default != ():
        shown = str(default) if check.words else default
        more |= {"default": shown, "show_default": True}
    if check.kind == "flag":
        more |= {"is_flag": True, "metavar": None}
    else:
        more["type"] = _type(check)
        more["multiple"] = check.several or check.kind == "settings"
    flags = SHORT.get(field.name, ()) + (option.flags or (flag_of(field.name),))
    help = option.help + (f" {option.tier.capitalize()}." if option.tier else "")
    return click.Option([*flags, field.name], help=help, **more)


class SourcesArgument(click.Argument):
    """Several sources. cmd and PowerShell do not expand patterns, so a pattern that is no path
    stands for its matches, sorted by name."""

    def type_cast_value(self, ctx: click.Context, value: tuple[str, ...]) -> tuple[str, ...]:
        paths = [path for text in value or () for path in _matching(text)]
        return super().type_cast_value(ctx, tuple(paths))


def _matching(text: str) -> list[str]:
    is_path = os.path.lexists(text) or not glob.has_magic(text)
    return [text] if is_path else sorted(glob.glob(text)) or [text]


def _type(check: Check) -> Any:
    """click's type for a value."""
    if callable(check.words):
        return Name(check.words)
    return Word(check.words) if check.words else TYPES.get(check.kind, str)


def arguments_of(verb: type[Verb], values: Json) -> tuple[list[Any], Json]:
    """A command's values in the form of a verb's arguments: its sources, and the others by name."""
    fields = fields_of(verb)
    sources = [values.pop(field.name) for field in fields if not field.kw_only]
    for field in fields:
        if option_of(field).check.kind == "settings":
            flag = (*option_of(field).flags, flag_of(field.name))[0]
            values[field.name] = parse_settings(values[field.name], flag) or None
    return sources, values


def parse_settings(words: tuple[str, ...], flag: str) -> Json:
    """Options KEY=VALUE of this flag; a value is a JSON number, true or false, or else a string."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"{flag} {word}: give KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings
