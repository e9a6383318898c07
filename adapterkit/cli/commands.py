"""The commands, by section of the help: each is made of the record of its verb."""

from functools import partial
from importlib import import_module
from inspect import cleandoc
from typing import Any

import click

from adapterkit.cli.actions import ACTIONS, OWN_OPTIONS
from adapterkit.cli.command import WritingCommand
from adapterkit.cli.completion import completion
from adapterkit.cli.methods import LISTS
from adapterkit.cli.output import run_verb
from adapterkit.cli.parameters import arguments_of, parameters_of
from adapterkit.verb import Verb, WritingVerb
from adapterkit.verbs import HOMES
from adapterkit.verbs import SECTIONS as VERBS

UNITS = {"stats": " layers"}  # of the progress, where it is not bytes


def command_of(verb: type[Verb]) -> click.Command:
    """The command of a verb."""
    params = [*parameters_of(verb), *OWN_OPTIONS.get(verb.name, ())]
    action = ACTIONS.get(verb.name) or partial(run_verb, unit=UNITS.get(verb.name, "B"))

    def callback(**values: Any) -> None:
        sources, options = arguments_of(verb, values)
        action(verb, *sources, **options)

    more: dict[str, Any] = {"callback": callback, "help": cleandoc(verb.command)}
    if not issubclass(verb, WritingVerb):
        return click.Command(verb.name, params=params, **more)
    if verb.name == "convert":  # --list and --from-list stand in place of what it takes else
        for parameter in params:
            parameter.required = False
    return WritingCommand(verb.name, params=params, lists=LISTS.get(verb.name), **more)


def command_named(name: str) -> click.Command:
    """The command of this name; only its own record is read."""
    return completion if name == completion.name else command_of(_record(name))


def summary_of(name: str) -> str:
    """The first paragraph of a command's help."""
    text = str(completion.help) if name == completion.name else cleandoc(_record(name).command)
    return " ".join(text.partition("\n\n")[0].split())


def _record(name: str) -> type[Verb]:
    return getattr(import_module(f"adapterkit.{HOMES[name]}"), name.capitalize())


SECTIONS = VERBS | {"Shell": (str(completion.name),)}
