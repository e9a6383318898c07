"""Write the tables of format-tables.md and integrations.md from the TOML files in formats/.

python docs/formats.py
"""

import re
from pathlib import Path
from typing import Any

from adapterkit.adapters.formats.engines import engines
from adapterkit.verbs.look.formats import list_formats, scale_text

PAGES = [Path(__file__).with_name(name) for name in ("format-tables.md", "integrations.md")]
PART = re.compile(r"(<!-- (\w+): python docs/formats.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def document(page: Path) -> str:
    """The whole page: its text, with each table generated again."""
    listed = list_formats()
    tables = {
        "engines": engine_table(),
        "written": formats([one for one in listed["formats"].items() if one[1]["writes"]]),
        "read": formats([one for one in listed["formats"].items() if not one[1]["writes"]]),
        "architectures": architectures(listed["architectures"], listed["formats"]),
    }
    return PART.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[4]}", page.read_text("utf-8"))


def formats(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """The contents of each format: kinds with their other roles, the scale, the file."""
    columns = ["format", "tier", "what it is", "models", "holds", "scale", "file", "read by"]
    return table(
        columns,
        [
            [
                f"[`{name}`]({one['sources'][0]})",
                one["tier"],
                one["summary"],
                ", ".join(f"`{name}`" for name in one["architectures"]) or "any",
                "; ".join(kind_text(kind, roles) for kind, roles in one["kinds"].items()),
                scale_text(one["scale"]),
                one["container"] + "".join(f", `{name}`" for name in one["config"][:1]),
                ", ".join(one["clients"]),
            ]
            for name, one in rows
        ],
    )


def kind_text(kind: str, roles: list[str]) -> str:
    """A kind with what it may have besides its factors."""
    names = {
        "magnitude": "DoRA",
        "input_magnitude": "DoRA of inputs",
        "mid": "Tucker",
        "t1": "Tucker",
        "t2": "Tucker",
    }
    if kind in ("lora", "full"):
        names |= {"bias": "bias", "diff_b": "bias"}
    more = dict.fromkeys(names[role] for role in roles if role in names)
    return kind + (f" ({', '.join(more)})" if more else "")


def engine_table() -> str:
    """The formats that each engine reads, its largest rank, and its limits."""
    rows = [
        [
            f"[`{name}`]({one.sources[0]})",
            f"{one.title} {one.version}",
            f"`{one.format}`",
            " or ".join(filter(None, (str(one.rank.most or ""), one.rank.flag))) or "any",
            "; ".join(f"{rule.verdict} {_modules(rule.modules.pattern)}: {rule.why}"
                      + (f" ({', '.join(rule.of)})" if rule.of else "") for rule in one.rules),
        ]
        for name, one in engines().items()
    ]  # fmt: skip
    return table(["`--for`", "engine", "reads", "rank", "does not take"], rows)


def _modules(pattern: str) -> str:
    """A rule's modules in words of their names."""
    names = re.findall(r"[a-z_]{3,}\d?", pattern)
    return ", ".join(f"`{name}`" for name in names) or "all modules"


def architectures(rows: dict[str, Any], formats: dict[str, Any]) -> str:
    """Each family of models, the names that its modules have, and the formats for it alone."""
    columns = ["`--architecture`", "models", "components", "formats with its names"]
    users = {
        name: [f"`{key}`" for key, one in formats.items() if name in one["architectures"]]
        for name in rows
    }
    return table(
        columns,
        [
            [f"`{name}`", one["title"], ", ".join(one["components"]), ", ".join(users[name])]
            for name, one in rows.items()
        ],
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(document(path), encoding="utf-8", newline="\n")
