"""Write the tables of format-tables.md and integrations.md from the TOML files in formats/.

python docs/formats.py
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from adapterkit.adapters.formats.engines import RankLimit, engines
from adapterkit.verbs.look.formats import list_formats, scale_text

PAGES = [Path(__file__).with_name(name) for name in ("format-tables.md", "integrations.md")]
FEW = 4  # names in a cell; a longer list is counted
PART = re.compile(r"(<!-- (\w+): python docs/formats.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def document(page: Path) -> str:
    """The whole page: its text, with each table generated again."""
    listed = list_formats()
    formats, families = listed["formats"], listed["architectures"]
    image, language, other = groups(families, formats)
    tables = {
        "engines": engine_table(),
        "limits": limits(),
        "written": summaries([one for one in formats.items() if one[1]["writes"]]),
        "read": summaries([one for one in formats.items() if not one[1]["writes"]]),
        "contents": contents(formats),
        "scales": scales(formats),
        "image": matrix(image, formats),
        "language": table(["`--architecture`", "models"], [row[:2] for row in language]),
        "other": table(["`--architecture`", "models", "formats"], other),
    }
    return PART.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[4]}", page.read_text("utf-8"))


def summaries(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """A link to the source of each format, and the programs that read it."""
    cells = []
    for name, one in rows:
        link, clients = f"[`{name}`]({one['sources'][0]})", ", ".join(one["clients"])
        cells.append([link, one["tier"], one["summary"], clients])
    return table(["format", "tier", "what it is", "read by"], cells)


def contents(formats: dict[str, dict[str, Any]]) -> str:
    """The kinds of adapter that each format stores, with what each kind may have."""
    own = ("lora", "loha", "lokr")
    rows = []
    for name, one in formats.items():
        texts = {kind: ", ".join(_roles(kind, roles)) for kind, roles in one["kinds"].items()}
        others = [kind + (f" ({text})" if text else "") for kind, text in texts.items()]
        others = [text for text in others if text.partition(" ")[0] not in own]
        rows.append([f"`{name}`", *(_cell(texts, kind) for kind in own), ", ".join(others)])
    return table(["format", "LoRA", "LoHa", "LoKr", "other values"], rows)


def _cell(texts: dict[str, str], kind: str) -> str:
    return (texts[kind] or "plain") if kind in texts else ""


def _roles(kind: str, roles: list[str]) -> list[str]:
    """What a kind may have besides its factors."""
    names = {
        "magnitude": "DoRA",
        "input_magnitude": "DoRA of inputs",
        "mid": "Tucker",
        "t1": "Tucker",
        "t2": "Tucker",
    }
    if kind in ("lora", "full"):
        names |= {"bias": "bias", "diff_b": "bias"}
    return list(dict.fromkeys(names[role] for role in roles if role in names))


def scales(formats: dict[str, dict[str, Any]]) -> str:
    """The models of each format, its scale and its files."""
    rows = []
    for name, one in formats.items():
        families = [f"`{family}`" for family in one["architectures"]]
        models = ", ".join(families) if len(families) <= FEW else f"{len(families)} families"
        files = one["container"] + "".join(f", `{file}`" for file in one["config"][:1])
        rows.append([f"`{name}`", models or "any", scale_text(one["scale"]), files])
    return table(["format", "models", "scale", "file"], rows)


def engine_table() -> str:
    """The formats that each engine reads, and its largest rank."""
    rows = [
        [
            f"[`{name}`]({one.sources[0]})",
            f"{one.title} {one.version}",
            f"`{one.format}`",
            _largest_rank(one.rank),
        ]
        for name, one in engines().items()
    ]
    return table(["`--for`", "engine", "reads", "largest rank"], rows)


def _largest_rank(rank: RankLimit) -> str:
    """The engine's option with its default, or the number that no option changes."""
    if not rank.flag:
        return str(rank.most or "any")
    return f"`{rank.flag}`" + (f" (default {rank.most})" if rank.most else "")


def limits() -> str:
    """The modules that engines do not take as they are, and long lists of models after them."""
    found: dict[tuple[str, str, str], list[str]] = {}
    lists: dict[str, None] = {}
    for one in engines().values():
        for rule in one.rules:
            modules, models = _modules(rule.modules.pattern), [f"`{name}`" for name in rule.of]
            if len(models) > FEW:
                line = f"The model types with {modules}: {', '.join(models)}."
                lists[textwrap.fill(line, 100, break_on_hyphens=False)] = None
                modules += f" of {len(models)} model types (below)"
            elif models:
                modules += f" of {', '.join(models)}"
            found.setdefault((modules, rule.verdict, rule.why), []).append(one.title)
    happens = {"drops": "dropped", "refuses": "refused", "renames": "renamed"}
    rows = [
        [", ".join(titles), modules, happens[verdict], why]
        for (modules, verdict, why), titles in found.items()
    ]
    columns = ["engine", "modules", "what happens", "why"]
    return "\n\n".join([table(columns, rows), *lists])


def _modules(pattern: str) -> str:
    """A rule's modules in words of their names."""
    names = re.findall(r"[a-z_]{3,}\d?", pattern)
    return ", ".join(f"`{name}`" for name in names) or "all modules"


def groups(families: dict[str, Any], formats: dict[str, Any]) -> tuple[list[list[str]], ...]:
    """Image and video models; language models of llama.cpp alone; others: name, models, formats."""
    image, language, other = [], [], []
    for name, one in families.items():
        users = [key for key, format in formats.items() if name in format["architectures"]]
        if any(one["components"]) and users:
            image.append([name, one["title"], ", ".join(one["components"])])
        else:
            shown = ", ".join(f"`{user}`" for user in users)
            group = language if users == ["gguf"] else other
            group.append([f"`{name}`", one["title"], shown])
    return image, language, other


def matrix(rows: list[list[str]], formats: dict[str, Any]) -> str:
    """A column for the formats that have the same families."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, one in formats.items():
        mine = tuple(row[0] for row in rows if row[0] in one["architectures"])
        if mine:
            columns.setdefault(mine, []).append(f"`{name}`")
    columns = dict(sorted(columns.items(), key=lambda column: -len(column[0])))
    titles = ["`--architecture`", "models", "components", *map(", ".join, columns.values())]
    cells = [
        [f"`{name}`", title, parts, *("yes" if name in mine else "" for mine in columns)]
        for name, title, parts in rows
    ]
    return table(titles, cells)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(document(path), encoding="utf-8", newline="\n")
