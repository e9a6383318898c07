"""Methods and formats for the help and completion, which must not import them."""

from collections.abc import Callable

from adapterkit.combinations import ALIASES
from adapterkit.registry import as_flag, declarations

Rows = list[tuple[str, str]]


def combinations() -> dict[str, Rows]:
    """Methods by what they act on, and PEFT's names of them."""
    on_factors: Rows = []
    on_elements: Rows = []
    for name, method in declarations("combinations").items():
        flags = ", ".join(map(as_flag, method.options))
        text = f"{method.summary.rstrip('.')} ({flags})." if flags else method.summary
        rows = on_elements if method.constants["acts_on"] == "elements" else on_factors
        rows.append((name, text))
    rank = {"exact": "exact", "largest": "refitted to the largest rank of the inputs"}
    return {
        "Methods on factors (exact without --rank and --energy)": on_factors,
        "Methods on elements (refitted, by default to the largest rank of the inputs)": on_elements,
        "PEFT's names": [(name, f"{of}, {rank[to]}") for name, (of, to) in ALIASES.items()],
    }


def initializations() -> dict[str, Rows]:
    """Inits by what they do to the base."""
    titles = {
        False: "Methods that leave the base as it is",
        True: "Methods that take a part of each weight",
    }
    groups: dict[str, Rows] = {title: [] for title in titles.values()}
    for name, init in declarations("inits").items():
        flags = ", ".join(map(as_flag, init.options))
        text = f"{init.summary.rstrip('.')} ({flags})." if flags else init.summary
        groups[titles[init.constants["changes_base"]]].append((name, text))
    return groups


def formats() -> dict[str, Rows]:
    """The formats that a quantization can write, codec by codec."""
    codecs = declarations("weights.codecs").values()
    targets = ((codec, codec.constants.get("targets", ())) for codec in codecs)
    return {"Formats": [(", ".join(names), codec.summary) for codec, names in targets if names]}


def adapter_formats() -> dict[str, Rows]:
    """The formats of adapters, by whether they are written."""
    from adapterkit.formats import library

    groups: dict[str, Rows] = {"Formats": [], "Formats that are only read": []}
    for name, one in library.formats().items():
        title = "Formats" if one.writes else "Formats that are only read"
        groups[title].append((name, one.summary))
    return groups


# what the help of a command lists
LISTS: dict[str, Callable[[], dict[str, Rows]]] = {
    "combine": combinations,
    "convert": adapter_formats,
    "init": initializations,
    "quantize": formats,
}
