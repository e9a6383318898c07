"""Commands as text, for hints and messages: every printed command is made here.

Quoted words may come from a stranger: names of files, ids, the arguments in a receipt."""

import json
import os
from collections.abc import Callable, Iterable

from adapterkit.core.errors import printable
from adapterkit.core.system import system

# hints of several refusals: prose, then a command, whose words `hints.with_paths` fills in
PLAIN = "make it plain first\nadapterkit resize ADAPTER --base BASE --energy 0.99 --out plain"
WITHOUT_INITIAL = "make it plain first\nadapterkit rebase ADAPTER --initial INITIAL --out plain"
EXTRACT = (
    "merge it with the program that trained it, then take the difference\n"
    "adapterkit extract BASE MERGED --energy 0.99 --out extracted"
)
MERGE = "merge it\nadapterkit merge BASE ADAPTER --out merged"
ONE_PART = "take one part\nadapterkit convert ADAPTER --to diffusers --component PART --out part"
CHECK_BASE = "check that the adapter was trained on this base"
LIST_FORMATS = "list the formats\nadapterkit convert --list"


def line(words: Iterable[str], quote: Callable[[str], str] = system.quote) -> str:
    """Join words to one line that the shell of this system, or of `quote`, splits into the same
    words."""
    return " ".join(quote(printable(word)) for word in words)


def command(program: str, /, *arguments: str | os.PathLike[str], **options: object) -> str:
    """Return a command that can be copied into a shell and run; `program` stays as it is. An
    argument that begins with a dash is written as a path. An option that is True is a flag; None
    and False are left out."""
    words = [argument(os.fspath(one)) for one in arguments]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return f"{program} {line(words)}"


def argument(word: str) -> str:
    """Return a word that no program mistakes for an option."""
    return f"./{word}" if word.startswith("-") else word


def filled(template: str, **values: object) -> str:
    """Fill a command's template with values: escaped inside a Python string, else quoted."""
    is_python = '"{' in template
    escaped = lambda text: json.dumps(text, ensure_ascii=False)[1:-1]
    make = escaped if is_python else lambda text: line([argument(text)])
    return template.format(**{name: make(printable(str(v))) for name, v in values.items()})
