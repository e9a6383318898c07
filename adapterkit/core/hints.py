"""Hints of errors in the words of a verb's call: its options, and the paths of its sources."""

import dataclasses
import os
import re

from adapterkit.core.calls import spelled_source
from adapterkit.core.commands import argument, line
from adapterkit.core.errors import shown
from adapterkit.core.options import OptionRecord, option_of, weighted
from adapterkit.core.registry import load

# An option in a hint, except those that are quoted
_OPTION = re.compile(r"`[^`]*`|(?<![\w-])--([a-z][a-z0-9-]*)(?: [A-Z]+\b)?")
_OF_COMMANDS = {"help", "json", "plan", "quiet"}  # options of every command, which no verb declares
# a word of a command with its quotes; one that stands for a source, and what follows it
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")
_STANDS_FOR = re.compile(r"([A-Z]+)(=\S*)?")
_ADAPTERS = {"adapters", "general", "paths", "src"}


def own_hint(hint: str, verb: OptionRecord | type[OptionRecord], where: str = "") -> str:
    """Return a hint that spells options as the verb does, without alternatives that name options of
    other verbs; its commands get the paths of the call."""
    fields = dataclasses.fields(verb)
    known = {field.name.replace("_", "-") for field in fields if field.kw_only}
    known |= {"adapter"} if "adapters" in known else set()
    arguments = {field.name for field in fields if not field.kw_only}
    name = lambda m: m[1].upper() if m[1] in arguments else m[0]
    fits = lambda text: all(m[1] in known | _OF_COMMANDS for m in _OPTION.finditer(text) if m[1])
    text, newline, commands = hint.partition("\n")
    text = _OPTION.sub(name, text)
    parts = [text] if fits(text) else re.split(r", or |, then |; (?=give |--)", text)
    kept = ", or ".join(part for part in parts if fits(part))
    if hint and not kept:
        kept = "first run" if commands else f"read its options\nadapterkit {verb.name} --help"
    return with_paths(kept + newline + commands, verb, where)


def with_paths(hint: str, verb: OptionRecord | type[OptionRecord], where: str = "") -> str:
    """Return a hint whose commands name the call's sources instead of the words that stand for
    them; of several adapters, the one that the error is about. `ADAPTERS=W` are all with their
    weights."""
    text, newline, commands = hint.partition("\n")
    sources: dict[str, list[str]] = {}
    weighted_sources: list[str] = []
    for field in dataclasses.fields(verb):
        if isinstance(verb, OptionRecord) and (given := _given(verb, field)):
            name = "ADAPTER" if field.name in _ADAPTERS else field.name.upper()
            sources.setdefault(name, []).extend(text for text, _ in given)
            if field.name == "adapters":
                weighted_sources += [text + weight for text, weight in given]

    def filled(word: re.Match) -> str:
        if (stands := _STANDS_FOR.fullmatch(word[0])) is None:
            return word[0]
        name, rest = stands.groups("")
        if rest == "=W":
            return line(map(argument, weighted_sources)) or name
        texts = sources.get(name) or sources.get(name.removesuffix("S"), [])
        if name in sources and len(texts) > 1:
            texts = [text for text in texts if where.startswith(shown(text))][:1]
        return line(argument(text + rest) for text in texts) if texts else word[0]

    return text + newline + _WORD.sub(filled, commands)


def refuse_missing_sources(verb: OptionRecord) -> None:
    """`Refused` with all sources of a call that are no paths and no ids, if there are several."""
    fields = dataclasses.fields(verb)
    texts = [text for field in fields for text, _ in _given(verb, field)]
    load("core.inputs.sources:refuse_missing")(dict.fromkeys(texts))


def _given(verb: OptionRecord, field: dataclasses.Field) -> list[tuple[str, str]]:
    """The sources that one field of a call names, each with its weight as `=W`, or ""."""
    value = getattr(verb, field.name)
    if not value or not option_of(field).check.is_source:
        return []
    given = (spelled_source(*one, lambda _, path: os.fspath(path)) for one in weighted(value))
    return [(one, "") if isinstance(one, str) else (one[0], f"={one[1]:g}") for one in given]
