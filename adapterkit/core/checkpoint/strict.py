"""Read JSON from strangers strictly: a text that two readers could understand differently is an
error."""

import json
import re
from typing import Any

from adapterkit.core.checkpoint.folder import Folder, parsed
from adapterkit.core.errors import Damaged, shown

MAX_JSON = 50_000_000  # bytes
MAX_DEPTH = 100  # of nested lists and objects

MAX_DIGITS = 100  # characters; float() of a longer integer may overflow
# without a match, no number needs to be checked
_ODD = re.compile(rb"(?<![eE])-0(?![.eE])|[0-9]{%d}" % MAX_DIGITS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def strict_json(data: bytes) -> Any:
    """Return the value of UTF-8 JSON; `ValueError` with a short reason if it is invalid.

    A duplicate key, half a surrogate pair or an absurd number is invalid too. NaN and Infinity are
    floats, because transformers writes them into some configs."""
    try:
        parse_int = _integer if _ODD.search(data) else None
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=parse_int)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _unique(pairs: list) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):
        known: set = set()
        repeated = next(key for key, _ in pairs if key in known or known.add(key))
        raise ValueError(f"key {repeated!r} twice")
    return table


def _integer(text: str) -> int:
    if text == "-0" or len(text) > MAX_DIGITS:
        raise ValueError("the number -0" if text == "-0" else f"a number of {len(text)} digits")
    return int(text)


def nested_json(text: str | bytes) -> Any:
    """Return `strict_json` of a text inside a file, no deeper than `check_depth` allows."""
    value = strict_json(text.encode() if isinstance(text, str) else text)
    check_depth(value)
    return value


def read_json(folder: Folder, name: str) -> dict:
    """Return the JSON object in a file of the folder. It may be shared with other readers: copy it
    to change it. `Damaged` for other content, or more than 50 MB."""
    size = folder.files().get(name, 0)
    return parsed(folder, ("json", name), lambda: (size, _read_json(folder, name, size)))


def _read_json(folder: Folder, name: str, size: int) -> dict:
    try:
        if size > MAX_JSON:
            raise ValueError(f"{size} bytes, more than {MAX_JSON}")
        value = nested_json(folder.read(name, 0, size))
    except ValueError as error:
        raise Damaged(
            f"this is not JSON: {shown(error)}",
            expected="a JSON object",
            where=f"{folder.name}/{name}",
            hint="fix the file",
            code="AK204",
        ) from error
    if not isinstance(value, dict):
        raise Damaged(
            f"this is a JSON {type(value).__name__}",
            expected="a JSON object",
            where=name,
            hint="fix the file",
            code="AK204",
        )
    return value


def check_depth(value: object) -> None:
    """Raise `ValueError` for lists and objects nested too deep, because code that walks them
    recurses."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for v in level
            if isinstance(v, list | dict)
            for inner in (v.values() if isinstance(v, dict) else v)
        ]
    if level:
        raise ValueError("nested too deeply")
