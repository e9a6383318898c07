"""Write model cards: the README.md of an output, with the Hub's metadata.

Texts of inputs are not interpreted: they are quoted as JSON in the metadata, and stripped of markup
in the body."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from adapterkit import __version__
from adapterkit.core.calls import COMMAND
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.output.stage import RECEIPT

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# fields of a base's card that are valid for the merged model too
INHERITED = re.compile(
    r"^(license|license_name|license_link|pipeline_tag|language): *+([\w .:/\-]++)$", re.MULTILINE
)
LONGEST = 65536  # bytes of a base's card that are read


class Merged(NamedTuple):
    """An adapter in a merged model."""

    folder: Folder
    weight: float
    modules: int
    rank: object = ""
    part: str = ""  # its component of a pipeline


SUM = "Σ weight · scale · b @ a"


def merged_card(
    base: Folder, adapters: Sequence[Merged], library: str = "transformers", delta: str = SUM
) -> str:
    """The card of a merged model; `delta`: the formula of the change added to its weights."""
    ids = [hub_id_or_name(base), *(hub_id_or_name(adapter.folder) for adapter in adapters)]
    ids = list(dict.fromkeys(ids)) if library == "diffusers" else ids
    metadata = [*based_on(ids, "merge"), *_inherited(base), f"library_name: {library}"]
    rows = [
        f"| {plain(hub_id_or_name(a.folder))} {a.part and f'({a.part}) '}| {a.weight:g} "
        f"| {a.modules} | {a.rank} |"
        for a in adapters
    ]
    names = [plain(name) for name in ids]
    body = [
        (
            f"Made by adapterkit {__version__} from the files: W' = round(W + {delta}), each "
            "weight rounded once."
        ),
        f"The changes of each tensor, and the hash of every file, are in `{RECEIPT}`; "
        "`adapterkit verify .` checks it.",
        "",
        f"Base: {names[0]}",
        "",
        "| adapter | weight | modules | r |",
        "|---|---|---|---|",
        *rows,
    ]
    title = f"{names[0]} merged with {', '.join(names[1:])}"
    return card(metadata, ["merge", "lora", "adapterkit"], title, body)


def model_card(
    base: Folder, summary: str, relation: str = "", library: str = "transformers"
) -> str:
    """The card of a model made from one base; `relation`: the Hub's term, if it has one."""
    name = plain(hub_id_or_name(base))
    metadata = [*based_on([name], relation), f"library_name: {library}"]
    body = [f"Made by adapterkit {__version__}."]
    return card(metadata, ["adapterkit"], f"{name}, {summary}", body)


def based_on(names: Sequence[str], relation: str) -> list[str]:
    """The Hub's metadata on the bases that have an id, and on the output's relation to them."""
    ids = [f"- {json.dumps(name)}" for name in names if HUB_ID.fullmatch(name)]
    return ["base_model:"] * bool(ids) + ids + [f"base_model_relation: {relation}"] * bool(relation)


def card(metadata: list[str], tags: list[str], title: str, body: list[str]) -> str:
    lines = ["---", *metadata, "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    made = ["", "The command that made it:", "", "```sh", COMMAND, "```"]
    return "\n".join([*lines, f"# {title}", "", *body, *made, ""])


def hub_id_or_name(folder: Folder) -> str:
    """The Hub id of a folder, else its name."""
    return str(folder.origin.get("repo") or folder.name)


def plain(text: str) -> str:
    """A text without characters that Markdown or HTML would read as markup."""
    return "".join(c if c.isalnum() or c in " ._-/,;" else " " for c in text)


def _inherited(base: Folder) -> list[str]:
    """Licence, language and pipeline of the base's card, as lines of metadata."""
    size = base.files().get("README.md")
    if size is None:
        return []
    text = base.read("README.md", 0, min(size, LONGEST)).decode("utf-8", "replace")
    has_metadata = text.startswith("---") and text.count("---") >= 2
    fields = INHERITED.findall(text.split("---")[1]) if has_metadata else []
    return [f"{key}: {json.dumps(value.strip())}" for key, value in fields]
