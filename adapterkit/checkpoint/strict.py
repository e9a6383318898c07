"""JSON from strangers, read strictly: what two readers could understand in two ways is an error."""

import json
import re
from typing import Any

LONGEST_NUMBER = 100  # characters; float() of a longer whole number may overflow
# where there is none, no number needs a look of its own
_ODD = re.compile(rb"-0|[0-9]{%d}" % LONGEST_NUMBER)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def strict_json(data: bytes) -> Any:
    """The value of UTF-8 JSON; `ValueError` with a plain reason when it is none.

    It is none either with a key twice, half a surrogate pair or an absurd number. NaN and Infinity
    pass as floats: transformers writes them into some configs.
    """
    try:
        whole = _whole if _ODD.search(data) else None
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=whole)
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
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} twice")
    return table


def _whole(text: str) -> int:
    if text == "-0" or len(text) > LONGEST_NUMBER:
        raise ValueError("the number -0" if text == "-0" else f"a number of {len(text)} digits")
    return int(text)
