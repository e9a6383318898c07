"""The verbs that write, by name: all that a plan file or a pipeline can call."""

from adapterkit.records import Check, unfit
from adapterkit.registry import members
from adapterkit.verb import WritingVerb


def writing_verbs() -> dict[str, type[WritingVerb]]:
    """Their records by name."""
    return {name: verb for name, verb in members("verbs").items() if issubclass(verb, WritingVerb)}


def _verb(name: object) -> type[WritingVerb]:
    known = writing_verbs()
    if not isinstance(name, str) or name not in known:
        expected = f"a verb that writes: {', '.join(known)}"
        raise unfit(name, expected, "use one of these", list(known))
    return known[name]


VERB = Check("a verb that writes", _verb)
