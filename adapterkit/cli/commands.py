"""The commands, by section of the help, each made from its verb's record. Methods and formats are
listed without importing them."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import cleandoc

import click

from adapterkit.cli.actions import ACTIONS, OWN_OPTIONS
from adapterkit.cli.completion import completion
from adapterkit.cli.group import Rows, VerbCommand
from adapterkit.cli.output import print_json, run_verb
from adapterkit.cli.parameters import arguments_of, parameters_of, sections_of
from adapterkit.core.errors import AdapterkitError, Interrupted, Refused, Waiting, codes, shown
from adapterkit.core.merge.verb import merge_methods
from adapterkit.core.options import option_of
from adapterkit.core.records import Json
from adapterkit.core.registry import TIERS, Declaration, as_flag, declarations, verb_named
from adapterkit.core.verb import Verb, WritingVerb, fields_of
from adapterkit.doors import SECTIONS as VERBS
from adapterkit.verbs.combine.methods import ALIASES


def combinations() -> dict[str, Rows]:
    """Methods by their operands, and PEFT's names for them."""
    on_factors: Rows = []
    on_elements: Rows = []
    for name, method in declarations("combinations").items():
        rows = on_elements if method.constants["acts_on"] == "elements" else on_factors
        rows.append((name, _described(method, method.options)))
    rank = {"exact": "exact", "largest": "refitted to the largest rank of the inputs"}
    return {
        "Methods on factors (exact without --rank and --energy)": on_factors,
        "Methods on elements (refitted to --rank, or the largest rank of the inputs)": on_elements,
        "PEFT's names": [(name, f"{of}, {rank[to]}") for name, (of, to) in ALIASES.items()],
    }


def methods() -> dict[str, Rows]:
    """Methods for merging deltas."""
    factors, elements, _ = combinations().values()
    possible = merge_methods()
    return {"Methods": sorted(row for row in [*factors, *elements] if row[0] in possible)}


def initializations() -> dict[str, Rows]:
    """Inits by their effect on the base."""
    titles = {
        False: "Methods that do not change the base",
        True: "Methods that move a component of each weight into the factors",
    }
    groups: dict[str, Rows] = {title: [] for title in titles.values()}
    for name, init in declarations("inits").items():
        row = name, _described(init, init.options)
        groups[titles[init.constants["changes_base"]]].append(row)
    return groups


def _described(one: Declaration, options: Sequence[str] = ()) -> str:
    """The text on a member of a family: its summary with its options, and its tier."""
    flags = ", ".join(map(as_flag, options))
    text = one.summary.rstrip(".") + f" ({flags})" * bool(flags)
    return f"{text}. {one.tier.capitalize()}."


TARGETS = ("targets", "image_targets")  # of a codec


def formats() -> dict[str, Rows]:
    """The formats that a quantization can write, codec by codec, and those of GGUF files."""
    from adapterkit.bases.gguf.mixes import MIXES

    codecs = declarations("codecs").values()
    lists = ((codec, codec.constants.get(n, ())) for n in TARGETS for codec in codecs)
    rows = [(", ".join(names), _described(codec)) for codec, names in lists if names]
    return {
        "Formats": [
            *rows,
            (
                ", ".join(MIXES),
                "GGUF types, and llama.cpp's mixes of them, for a base in a GGUF file. Stable.",
            ),
        ]
    }


def adapter_formats() -> dict[str, Rows]:
    """The formats of adapters, by whether they can be written."""
    from adapterkit.adapters.formats import library

    groups: dict[str, Rows] = {"Formats": [], "Formats that are only read": []}
    for name, one in library.described().items():
        title = "Formats" if one.writes else "Formats that are only read"
        groups[title].append((name, f"{one.summary}. {one.tier.capitalize()}."))
    return groups


# lists in the help of a command
LISTS: dict[str, Callable[[], dict[str, Rows]]] = {
    "combine": combinations,
    "convert": adapter_formats,
    "init": initializations,
    "merge": methods,
    "quantize": formats,
}


def command_of(verb: type[Verb]) -> click.Command:
    """The command of a verb."""
    params = [*parameters_of(verb), *OWN_OPTIONS.get(verb.name, ())]
    action = ACTIONS.get(verb.name) or partial(run_verb)

    def callback(**values: object) -> None:
        _check_sources(verb, params, values)
        sources, options = arguments_of(verb, values)
        try:
            action(verb, *sources, **options)
        except AdapterkitError as error:
            if values.get("as_json") and not isinstance(error, (Interrupted, Waiting)):
                print_json({"errors": [one.row() for one in getattr(error, "errors", (error,))]})
            raise

    if verb.name == "convert":  # --list and --from-list replace its source
        for parameter in params:
            parameter.required = False
    return VerbCommand(
        verb.name,
        params=params,
        callback=callback,
        help=cleandoc(verb.command),
        tier=f"{verb.tier.capitalize()}: {TIERS[verb.tier]}.",
        sections=sections_of(verb),
        lists=LISTS.get(verb.name, dict),
        writes=issubclass(verb, WritingVerb),
    )


def _check_sources(verb: type[Verb], params: Sequence[click.Parameter], values: Json) -> None:
    """Check sources that an option can replace; click checks other missing ones."""
    for field in fields_of(verb):
        unless = option_of(field).unless
        if unless and not values[field.name] and not values[unless]:
            own = next(parameter for parameter in params if parameter.name == field.name)
            raise click.MissingParameter(ctx=click.get_current_context(), param=own)


def command_named(name: str) -> click.Command:
    """The command of this name; only its own record is imported."""
    return OWN[name] if name in OWN else command_of(verb_named(name))


def summary_of(name: str) -> str:
    """The first paragraph of a command's help."""
    text = str(OWN[name].help) if name in OWN else cleandoc(verb_named(name).command)
    return " ".join(text.partition("\n\n")[0].split())


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Explain an error code.

    Prints its meaning, its usual cause, the fix and an example. Without CODE it lists all codes.

    \b
    Example:
      adapterkit explain AK401
    """
    known = codes()
    if code is None:
        for name, entry in known.items():
            click.echo(f"{name}  {entry['title']}")
        return
    name = code.strip("[]").upper()
    if name not in known:
        raise Refused(
            f"no code {shown(code)}",
            expected=f"{min(known)} to {max(known)}",
            where="options",
            hint="list all codes\nadapterkit explain",
            code="AK101",
        )
    entry = known[name]
    lines = [f"{name}: {entry['title']}", "", f"How it comes about: {entry['cause']}"]
    command = [f"$ adapterkit {entry['command']}"] if "command" in entry else []
    lines += [f"What to do: {entry['do']}", "", *command, *entry["example"].splitlines()]
    click.echo("\n".join(lines))


OWN = {str(command.name): command for command in (explain, completion)}
SECTIONS = VERBS | {"Errors and the shell": tuple(OWN)}
