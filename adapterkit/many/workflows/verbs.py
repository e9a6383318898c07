"""The verbs that a plan file or a file of steps can call."""

from adapterkit.core.records import Check, invalid_value
from adapterkit.core.registry import verb_named
from adapterkit.core.verb import WritingVerb
from adapterkit.doors import VERBS


def writing_verbs() -> dict[str, type[WritingVerb]]:
    """Return the verbs that write, by name: those that a plan file or a pipeline can call."""
    verbs = {name: verb_named(name) for name in VERBS if name not in ("run", "finish")}
    return {name: verb for name, verb in sorted(verbs.items()) if issubclass(verb, WritingVerb)}


def _writing_verb(name: object) -> type[WritingVerb]:
    known = writing_verbs()
    if not isinstance(name, str) or name not in known:
        expected = f"a verb that writes: {', '.join(known)}"
        raise invalid_value(name, expected, "use one of these", list(known))
    return known[name]


VERB = Check("a verb that writes", _writing_verb)
