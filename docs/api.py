"""Write docs/api.md from the signatures and docstrings of the package.

python docs/api.py
"""

import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import adapterkit
from adapterkit import runtime
from adapterkit.cli.parameters import sections_of
from adapterkit.core import options, registry
from adapterkit.core.options import option_of
from adapterkit.core.registry import verb_named
from adapterkit.core.shared_options import RUNNING, RunOptions
from adapterkit.core.verb import Verb
from adapterkit.doors import VERBS

WIDTH = 100
TARGET = Path(__file__).with_name("api.md")
FAMILIES = {
    "combinations": "Combination methods",
    "inits": "Initialization methods",
    "kinds": "Adapter types",
    "codecs": "Quantized formats",
}
INTRODUCTION = """\
# Python API

You call adapterkit from Python, or write a program that uses it. This page is generated from the
docstrings by `python docs/api.py`; do not edit it by hand.

Every command, except `explain` and `completion`, is a function of the same name, which you import
from `adapterkit`. You pass its options by name, in snake case: for example `--max-shard-size 5GB`
is `max_shard_size="5GB"`. A few names differ: `--set` is `settings={...}`, `check --for` is
`program=`, `compare --name` is `served=`, `--adapter` is `adapters=`, and `--plan` is the function
[`write_plan`](#write_plan).
Only the command line has options for printing (`--json`, `--quiet`, `inspect --modules`) and those
of `convert` for several files or none (`--from-list`, `--out-pattern`, `--detect`, `--list`).

Each function is loaded when you first use it, so `import adapterkit` loads neither torch nor
transformers.

`StrPath` is `str | os.PathLike`: a folder, a file or a Hub id. `Sources` is one such path or an
iterable of them. You can give each a weight, as `"PATH=0.7"`, as a pair `(path, 0.7)` or as an item
of a mapping `{path: 0.7}`. A function that writes an output returns its `Receipt`, whose `data` is
the content of `adapterkit.json`. With `dry_run=True` it writes nothing and returns the `Plan`."""

RUN_OPTIONS = """\
Verbs that write share these options. Their signatures show them as `**run_options`, and you pass
them by name, for example `merge("BASE", "ADAPTER", out="merged", dry_run=True)`."""
PROGRESS = "A function that is called with the number of bytes just done (default: none)."


def document() -> str:
    """The whole page."""
    names = [name for name in adapterkit.__all__ if not name.startswith("_")]
    values = {name: getattr(adapterkit, name) for name in names}
    verbs = [name for name, value in values.items() if inspect.isfunction(value)]
    contents = " · ".join(f"[{name}](#{name})" for name in verbs)
    parts = [INTRODUCTION, *run_options()]
    parts += ["## Verbs", textwrap.fill(contents, WIDTH, break_on_hyphens=False)]
    parts += [part for name in verbs for part in function(name, values[name], _verb(name))]
    parts += ["## Errors and records"]
    for name, value in values.items():
        if inspect.isclass(value):
            bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
            parts += [f"### {name}" + f" ({bases})" * bool(bases), *prose(value.__doc__ or "")]
    parts += ["## Runtime", "`adapterkit.runtime`; see [training and running](runtime.md)."]
    for name in runtime.__all__:
        parts += live(name, getattr(runtime, name))
    for family, title in FAMILIES.items():
        parts += [f"## {title}", table(family)]
    return "\n\n".join(parts) + "\n"


def live(name: str, value: Callable) -> Iterator[str]:
    """A function or class of the runtime, with the class's public methods."""
    if not inspect.isclass(value):
        yield from function(name, value)
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"### {name}" + f" ({bases})" * bool(bases)
    yield from tier_of(value)
    yield from prose(value.__doc__ or "")
    if value is not runtime.Adapters:
        return
    for method, member in vars(value).items():
        if inspect.isfunction(member) and not method.startswith("_"):
            yield from function(f"adapters.{method}", member)


def _verb(name: str) -> type[Verb] | None:
    """The record of a verb; None for another function."""
    return verb_named(name) if name in VERBS else None


def tier_of(value: object) -> Iterator[str]:
    """How far a member can be relied on, where it says so."""
    if tier := getattr(value, "tier", None):
        yield f"{tier.capitalize()}: {registry.TIERS[tier]}."


def function(name: str, verb: Callable, record: type[Verb] | None = None) -> Iterator[str]:
    """A function; the options of a verb by the sections of its help."""
    yield f"### {name}"
    signature = inspect.signature(verb)
    titles = sections_of(record) if record else {}
    order = ["", *titles.values()]
    lines, positional, section = [], True, ""
    shared = [] if record is None else shared_with(signature)
    parameters = (
        p for p in signature.parameters.values() if p.name != "self" and p.name not in shared
    )
    for parameter in sorted(parameters, key=lambda p: order.index(titles.get(p.name, ""))):
        if parameter.kind is parameter.KEYWORD_ONLY and positional:
            positional = False
            lines.append("*")
        positional = positional and parameter.kind is not parameter.VAR_POSITIONAL
        if section != (section := titles.get(parameter.name, "")):
            lines.append(f"# {section}")
        lines.append(argument(parameter))
    lines += ["**run_options"] if shared else []
    body = "".join(f"    {line}{',' * (line[0] != '#')}\n" for line in lines)
    yield f"```py\n{name}(\n{body}) -> {annotation(signature.return_annotation)}\n```"
    yield from tier_of(record or verb)
    yield from prose(verb.__doc__ or "")


def argument(parameter: inspect.Parameter) -> str:
    """A parameter with its type and default."""
    default = parameter.default
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}: {annotation(parameter.annotation)}"
    if default is not parameter.empty:
        text += f" = {'...' if callable(default) else repr(default)}"
    return text


def running() -> dict[str, inspect.Parameter]:
    """The options that say where and how a plan runs, by name."""
    parameters = inspect.signature(RunOptions).parameters
    return {name: parameters[name] for name in sorted(RUNNING - {"out"}, key=[*parameters].index)}


def shared_with(signature: inspect.Signature) -> list[str]:
    """The names of the run options, if a verb has all of them with the same types and defaults."""
    shown = {argument(parameter) for parameter in signature.parameters.values()}
    return [*running()] if shown >= {argument(one) for one in running().values()} else []


def run_options() -> Iterator[str]:
    """The options that nearly all writing verbs share, each with its help."""
    helps = {field.name: option_of(field).help for field in dataclasses.fields(RunOptions)}
    helps["progress"] = PROGRESS
    yield "## Run options"
    yield RUN_OPTIONS
    cells = ((argument(one).replace("|", "\\|"), helps[name]) for name, one in running().items())
    rows = [f"| `{option}` | {help} |" for option, help in cells]
    yield "\n".join(["| option | meaning |", "|---|---|", *rows])


def annotation(value: object) -> str:
    """A type as the source has it, without modules."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    for alias in ("Sources", "StrPath"):
        text = text.replace(inspect.formatannotation(getattr(options, alias)), alias)
    return re.sub(r"\b[a-z_]+\.(?=[\w.]*[A-Z])", "", text.replace("'", ""))


def prose(docstring: str) -> Iterator[str]:
    """A docstring as Markdown, wrapped again, so that line breaks in the source do not change the
    page. Its indented lines are code, except those that continue a list."""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if paragraph.startswith("- "):
            items = re.split(r"\n(?=- )", paragraph)
            yield "\n".join(wrapped(item, "  ") for item in items)
            continue
        for code, lines in itertools.groupby(paragraph.splitlines(), lambda x: x.startswith("  ")):
            text = "\n".join(lines)
            yield fenced(text) if code else wrapped(text)


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most WIDTH characters, none broken inside of `code`."""
    words = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


def fenced(text: str) -> str:
    """Indented lines as they are; a long one continues under its second column."""
    lines = []
    for line in textwrap.dedent(text).splitlines():
        column = re.match(r"\S.*?  +(?=\S)", line)
        lines += textwrap.wrap(
            line, WIDTH, subsequent_indent=" " * (column.end() if column else 0),
            break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
        ) or [""]  # fmt: skip
    return "```text\n" + "\n".join(lines) + "\n```"


def table(family: str) -> str:
    """One row for each member of a family."""
    records = registry.members(family)
    with_source = any(hasattr(record, "source") for record in records.values())
    columns = ["name", "tier", "what it is"] + ["options", "source"] * with_source
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, record in records.items():
        summary = inspect.cleandoc(record.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        cells = [f"`{name}`", record.tier, summary]
        if with_source:
            fields = dataclasses.fields(record)
            required = dataclasses.MISSING
            defaults = ("" if f.default is required else f" = {f.default}" for f in fields)
            texts = (f"`{f.name}{d}`" for f, d in zip(fields, defaults, strict=True))
            cells += [", ".join(texts), record.source]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    TARGET.write_text(document())
