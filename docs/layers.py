"""Write the lists in docs/architecture.md: the levels of the core and the needs of extensions from
tests/hostile/test_layers.py, the doors from comments in adapterkit/doors.py.

python docs/layers.py
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import adapterkit

HERE = Path(__file__).parent
PAGE = HERE / "architecture.md"
LAYERS = HERE.parent / "tests" / "hostile" / "test_layers.py"
DOORS = Path(adapterkit.__file__).with_name("doors.py")
PART = re.compile(r"(<!-- (\w+): python docs/layers.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"^((?:# .*\n)+)([A-Z]+) = ", re.MULTILINE)


def document() -> str:
    """The whole page: its text, with each list generated again."""
    lists = {"levels": levels(), "doors": doors(), "needs": needs()}
    return PART.sub(lambda m: f"{m[1]}\n{lists[m[2]]}\n\n{m[4]}", PAGE.read_text("utf-8"))


def constant(name: str) -> Any:
    """A constant of the test of layers, read without pytest."""
    for node in ast.parse(LAYERS.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(name)


def levels() -> str:
    """The parts of the core, from the top; those of one level between commas."""
    text = " > ".join(", ".join(parts.split()) for parts in constant("CORE"))
    return "```text\n" + textwrap.fill(text, 100) + "\n```"


def doors() -> str:
    """One row for each table, with its comment."""
    rows = ["| table | what is in it |", "|---|---|"]
    for comment, name in TABLE.findall(DOORS.read_text("utf-8")):
        words = " ".join(line.removeprefix("# ") for line in comment.splitlines())
        rows.append(f"| `{name}` | {words} |")
    return "\n".join(rows)


def needs() -> str:
    """One row for each extension that needs others, those that need least first."""
    rows = ["| extension | needs |", "|---|---|"]
    for name, others in constant("NEEDS").items():
        rows.append(f"| `{name}` | {', '.join(f'`{one}`' for one in sorted(others.split()))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(document(), "utf-8")
