"""README.md and docs/*.md: their blocks and commands.

In them a block marked `sh` holds commands that a user types, `console` commands with what they
print, and `python` a program, or a file to add to the package where its first line is a comment
with the file's path.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    document: Path
    language: str
    text: str


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Path) else None


def blocks(document: Path, *languages: str) -> list[Block]:
    actual = [Block(document, *match.groups()) for match in FENCE.finditer(document.read_text())]
    return [block for block in actual if not languages or block.language in languages]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for last, group in itertools.groupby(words, key=lambda word: word == "&&"):
            if not last:
                yield list(group)


def sessions(text: str) -> Iterator[tuple[list[str], str]]:
    """Each command of a console block, with what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            line, _, output = output.partition("\n")
            command = command[:-1] + line
        yield shlex.split(command, comments=True), output


def typed(document: Path) -> list[list[str]]:
    """All commands of a document's blocks."""
    lines = [words for block in blocks(document, "sh") for words in commands(block.text)]
    return lines + [w for block in blocks(document, "console") for w, _ in sessions(block.text)]
