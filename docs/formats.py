"""Writes the tables of docs/formats.md from the TOML files in formats/.

python docs/formats.py
"""

import re
from pathlib import Path
from typing import Any

from adapterkit.reports.formats import list_formats, scale_text

TARGET = Path(__file__).with_name("formats.md")
PART = re.compile(r"(<!-- (\w+): python docs/formats.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def document() -> str:
    """The whole page: the text as it is, each table anew."""
    listed = list_formats()
    tables = {
        "written": formats([one for one in listed["formats"].items() if one[1]["writes"]]),
        "read": formats([one for one in listed["formats"].items() if not one[1]["writes"]]),
        "architectures": architectures(listed["architectures"], listed["formats"]),
    }
    return PART.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[4]}", TARGET.read_text())


def formats(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """What each format holds: kinds with the roles besides their factors, the scale, the file."""
    columns = ["format", "what it is", "models", "holds", "scale", "file", "read by"]
    return table(
        columns,
        [
            [
                f"[`{name}`]({one['sources'][0]})",
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


def architectures(rows: dict[str, Any], formats: dict[str, Any]) -> str:
    """Each family of models, the names that its modules have, and the formats for it alone."""
    columns = ["`--architecture`", "models", "parts", "formats with its names"]
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
    TARGET.write_text(document())
