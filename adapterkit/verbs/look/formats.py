"""Describe the formats of adapters, and detect the one of a source, as plain dicts and as
tables."""

from collections import Counter
from collections.abc import Mapping, Sequence

from adapterkit.adapters.formats.capabilities import roles_by_kind
from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.adapters.formats.planning.source import AdapterConversion, read_contents
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, MODEL, Architecture, Format
from adapterkit.core.errors import AdapterkitError, MultipleErrors, shown
from adapterkit.core.inputs.sources import open_unconverted
from adapterkit.core.options import FLAG, SOURCE, StrPath, checked
from adapterkit.core.records import Json, Settings

RANKED = ("lora", "loha", "lokr")  # kinds whose modules have a rank
PLACES = {
    "tensor": "a tensor",
    "config": "the config",
    "metadata": "the metadata",
    "shared": "the metadata, one for all modules",
}


def list_formats() -> Json:
    """The capabilities of each format; a dict that `convert --list --json` prints unchanged.

      formats        name -> a format, read from formats/*.toml
      architectures  name -> {title, components, namings, sources}

    A format has title, summary, tier, reads, writes, kinds {kind: its roles}, scale {place (tensor,
    config, metadata, shared, none), means (alpha or scale), default, uniform}, container, config
    (files next to the weights, the first is written), architectures (empty: any), components,
    clients (its readers), note (how to use the file), sources (links)."""
    return {
        "formats": {name: _format(one) for name, one in formats().items()},
        "architectures": {name: _architecture(one) for name, one in architectures().items()},
    }


def _format(one: Format) -> Json:
    inside = one.names.inside
    components = [one.names.components, *(words.components or {} for words in inside.values())]
    return {
        "title": one.title,
        "summary": one.summary,
        "tier": one.tier,
        "reads": True,
        "writes": one.writes,
        "kinds": {kind: list(roles) for kind, roles in roles_by_kind(one).items()},
        "scale": {
            "place": "config" if one.layout == ADAPTER_LAYOUT else one.scale.place,
            "means": one.scale.means,
            "default": one.scale.default,
            "uniform": one.scale.uniform,
        },
        "container": one.file.container,
        "config": list(one.file.config),
        "architectures": list(one.names.architectures),
        "components": list(dict.fromkeys(name for table in components for name in table)),
        "clients": list(one.clients),
        "note": one.note,
        "sources": list(one.sources),
    }


def _architecture(one: Architecture) -> Json:
    rules = [rule for words in one.components.values() for rule in words.rules]
    return {
        "title": one.title,
        "components": list(one.components),
        "namings": [MODEL, *dict.fromkeys(name for rule in rules for name in rule.namings)],
        "sources": list(one.sources),
    }


def detect_format(src: StrPath, *, allow_pickle: bool = False) -> Json:
    """The format of an adapter and its contents, from its headers; a dict that `convert --detect
    --json` prints unchanged: format, title, architecture (null if no or several ones have its
    names), architectures (that have them), modules, kinds {kind: count}, components, ranks {rank:
    count}, problems [{found, expected, where, do}].

    Raises `Refused` if the source is in no known format."""
    source = open_unconverted(
        checked("src", SOURCE, src), checked("allow_pickle", FLAG, allow_pickle)
    )
    detection, errors = detect(source), []
    contents = Contents(detection.format.name, (source,), ())
    try:
        options = ConvertOptions(to=detection.format.name)
        contents = read_contents(AdapterConversion(source, detection, options))
    except MultipleErrors as error:
        errors += error.errors
    except AdapterkitError as error:
        errors.append(error)
    names = contents.architectures
    modules = contents.modules
    ranks = Counter(module.rank for module in modules if module.kind in RANKED)
    return {
        "format": detection.format.name,
        "title": detection.format.title,
        "architecture": names[0] if len(names) == 1 else None,
        "architectures": list(names),
        "modules": len(modules),
        "kinds": dict(Counter(module.kind for module in modules)),
        "components": [name for name in contents.components if name],
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "problems": [error.row() for error in errors],
    }


# -- tables ----------------------------------------------------------------------------------------


def formats_table(document: Settings) -> str:
    """`list_formats()` as lines for a terminal."""
    lines = []
    for name, one in document["formats"].items():
        lines.append(f"{name}{'' if one['writes'] else ' (read only)'}: {one['title']}")
        facts = {
            "tier": one["tier"],
            "kinds": ", ".join(one["kinds"]),
            "scale": scale_text(one["scale"]),
            "file": one["container"] + "".join(f" and {name}" for name in one["config"][:1]),
            "models": ", ".join(one["architectures"]) or "any",
            "read by": ", ".join(one["clients"]),
        }
        lines += [f"  {fact:8} {shown(text)}" for fact, text in facts.items() if text]
    lines.append("")
    for name, one in document["architectures"].items():
        lines.append(f"--architecture {name}: {one['title']}")
    return "\n".join(lines)


def scale_text(scale: Settings) -> str:
    """The storage of the scale, and its default."""
    if scale["place"] == "none":
        place = "none: in b"
    else:
        place = f"{scale['means']} in {PLACES[scale['place']]}"
    defaults = {"rank": "", "ask": "; without it --alpha is needed"}
    default = defaults.get(str(scale["default"]), f"; without it {scale['default']}")
    return place + default + ("; one for all modules" if scale["uniform"] else "")


def detection_table(document: Settings) -> str:
    """`detect_format()` as lines for a terminal."""
    counts = lambda table: ", ".join(f"{name} {count}" for name, count in table.items())
    facts = {
        "format": f"{document['format']} ({document['title']})",
        "architecture": " or ".join(document["architectures"]),
        "modules": str(document["modules"]),
        "kinds": counts(document["kinds"]),
        "components": ", ".join(document["components"]),
        "ranks": counts(document["ranks"]),
    }
    lines = [f"{fact:14} {shown(text)}" for fact, text in facts.items() if text]
    return "\n".join([*lines, *_problems(document["problems"])])


def _problems(problems: Sequence[Mapping[str, str]]) -> list[str]:
    rows = [[shown(one[name]) for name in ("where", "problem", "expected")] for one in problems]
    return [f"problem: {where}: {problem}; expected: {value}" for where, problem, value in rows]
