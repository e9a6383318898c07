"""Regular expressions from outside (configs of strangers, the command line), matched with a time limit."""

import re
from collections.abc import Callable

from adapterkit.errors import Refused, shown

LONGEST = 1000
PATIENCE = 1.0  # seconds for one name


def matcher(pattern: str, where: str, wrap: str = "{}") -> Callable[[str], bool]:
    """`re.search` of `wrap` with the pattern put in; `Refused` when it does not compile or takes longer than a second."""
    whole = wrap.replace("{}", pattern)
    if re.fullmatch(r"\^?[\w.\-]*\$?", pattern):  # nothing that could backtrack
        plain = re.compile(whole)
        return lambda text: plain.search(text) is not None
    import regex  # one of transformers' own dependencies; the standard library's has no time limit

    if len(pattern) > LONGEST:
        raise Refused(f"a pattern of {len(pattern)} characters", expected=f"at most {LONGEST}", where=where)
    try:
        slow = regex.compile(whole)
    except regex.error as error:
        raise Refused(f"pattern {shown(pattern)!r}: {error}", expected="a regular expression", where=where) from error

    def search(text: str) -> bool:
        try:
            return slow.search(text, timeout=PATIENCE) is not None
        except TimeoutError:
            raise Refused(
                f"pattern {shown(pattern)!r} took more than {PATIENCE:g} s on one name",
                expected="a pattern without nested repeats",
                where=where,
                do="write it without nested repeats",
            ) from None

    return search
