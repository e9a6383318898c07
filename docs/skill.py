"""Write llms.txt and SKILL.md for coding agents from the help texts; run it after changing them.

python docs/skill.py
"""

import json
import re
from inspect import cleandoc
from pathlib import Path

import click

from adapterkit.cli import main
from adapterkit.cli.parameters import OF_RUNNING

ROOT = Path(__file__).parents[1]
ABOUT = cleandoc("""
    adapterkit edits LoRA adapters and checkpoints on disk: merge, combine, convert, extract,
    quantize, initialize, inspect and check, without loading the model. If it cannot do a job
    exactly, it refuses with the reasons before it writes anything. Outputs are complete or absent,
    and contain a receipt with hashes (adapterkit.json).
""")
RULES = [
    "Sources are folders, .safetensors or .gguf files, or Hub ids org/name[@revision][:path].",
    "ADAPTER=0.7 gives an adapter a weight; -1 unmerges it.",
    "Look first: --dry-run prints the plan; inspect, check and diagnose only read.",
    "--json prints one document to stdout; messages go to stderr; exit status 0 means done.",
    "An error names the problem, the expected value, the location and a hint: follow the hint.",
    "Check an output: adapterkit verify OUT. Make it again from its receipt: adapterkit rerun OUT.",
    "In Python the commands are functions of the same names: merge(base, {'a': 0.7}, out=...).",
]


def documents() -> list[Path]:
    return sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "CHANGELOG.md")


def title_of(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def need_of(path: Path) -> str:
    """`: ` and the first sentence of a page, the need of its reader; empty if it has no lead."""
    lead = path.read_text("utf-8").split("\n\n")[1]
    words = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", " ".join(lead.split()))
    return "" if lead.startswith("#") else f": {words.partition('. ')[0].rstrip('.:')}."


def llms() -> str:
    """The file that lists the pages and the commands."""
    pages = [f"- [{title_of(path)}](docs/{path.name}){need_of(path)}" for path in documents()]
    return "\n".join(["# adapterkit", "", f"> {' '.join(ABOUT.split())}", "", "## Documents", "",
                      "- [README](README.md)", *pages, "", *commands()])  # fmt: skip


def commands() -> list[str]:
    """The commands with their summaries, a line each."""
    names = (name for names in main.sections.values() for name in names)
    lines = (f"- `adapterkit {name}`: {summary(main.commands[name])}" for name in names)
    return ["## Commands", "", *lines, ""]


def summary(command: click.Command) -> str:
    """The first sentence of a command's help."""
    return " ".join(cleandoc(command.help or "").split("\n\n")[0].split())


def skill() -> str:
    """The skill file: an agent's guide to the command line."""
    about = json.dumps(" ".join(ABOUT.split()))
    head = ["---", "name: adapterkit", f"description: {about}", "---", ""]
    lines = ["# adapterkit", "", *(f"- {rule}" for rule in RULES), "", *commands()]
    shared = [one for one in main.commands["merge"].params if one.name in OF_RUNNING]
    lines += ["## Options of all commands that write", "", *map(_option, shared), ""]
    for title, names in main.sections.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"### {name}", "", *_command(main.commands[name]), ""]
    return "\n".join([*head, *lines])


def _command(command: click.Command) -> list[str]:
    """The help's text and examples, and each option with its help."""
    text, _, rest = cleandoc(command.help or "").replace("\b\n", "").partition("Example:\n")
    lines = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    block = ["", "```sh", *(line.strip() for line in rest.splitlines()), "```"] if rest else []
    own = (one for one in command.params if one.name not in OF_RUNNING)
    options = [_option(one) for one in own if isinstance(one, click.Option)]
    return ["\n\n".join(lines), *block, "", *options]


def _option(one: click.Option) -> str:
    return f"- `{', '.join(one.opts)}`: {' '.join((one.help or '').split())}"


if __name__ == "__main__":
    (ROOT / "llms.txt").write_text(llms(), encoding="utf-8", newline="\n")
    place = ROOT / "examples" / "integrations" / "skill" / "SKILL.md"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(skill(), encoding="utf-8", newline="\n")
