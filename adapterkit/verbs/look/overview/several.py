"""inspect of several adapters: each, how they go together, and what to try."""

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.sources import if_given, open_model, open_source
from adapterkit.core.options import unweighted
from adapterkit.core.records import Json
from adapterkit.verbs.look.adapter import inspect_adapter
from adapterkit.verbs.look.checkpoint import VERSION
from adapterkit.verbs.look.overview.advice import advise
from adapterkit.verbs.look.overview.spaces import adapter_of, compare_adapters, distinct
from adapterkit.verbs.look.records.inspect import Inspect


def inspect_several(inspect: Inspect) -> Json:
    """What is said of each adapter, and how they go together."""
    sources, base = unweighted(inspect.paths), if_given(open_model, inspect.base)
    far = [one for one in map(open_source, sources) if not isinstance(one, LocalFolder)]
    unread = "headers alone (--headers)" if inspect.headers else ""
    unread = "weights on the Hub, without --download" if far and not inspect.download else unread
    if unread or inspect.plot is not None or not sources:
        raise Refused(
            f"{len(sources)} adapters, {unread or 'and --plot'}",
            expected="factors that are read, and no --plot",
            where="options",
            hint="inspect them one by one, or draw several\n"
            "adapterkit report ADAPTERS --out report.html",
            code="AK206",
        )
    folders = [adapter_of(source, base) for source in sources]
    adapters = [inspect_adapter(folder, base, True, inspect.progress) for folder in folders]
    for one, name in zip(adapters, distinct([one["name"] for one in adapters]), strict=True):
        one["name"] = name
    result = {
        "inspect": VERSION,
        "kind": "adapters",
        "readable": all(one["readable"] for one in adapters),
        "adapters": adapters,
        "pairs": compare_adapters(folders),
    }
    return result | {"advice": advise(result, sources, "BASE")}
