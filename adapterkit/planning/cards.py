"""Model cards: the README.md of an output, with the Hub's metadata."""

import json
import re
from collections.abc import Sequence

from adapterkit import __version__
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.stage import RECEIPT


def merged_card(base: Checkpoint, adapters: list[Adapter], weights: list[float]) -> str:
    """A README.md with the Hub's metadata for a merged model; nothing from the inputs is interpreted, names are quoted as JSON."""
    ids = [hub_or_name(base.folder)] + [hub_or_name(a.folder) for a in adapters]
    header = [
        "---",
        "base_model:",
        *(f"- {json.dumps(i)}" for i in ids),
        "base_model_relation: merge",
    ]
    header += [
        *_kept(base),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- lora",
        "- adapterkit",
        "---",
    ]
    rows = [
        f"| {cell(hub_or_name(a.folder))} | {w:g} | {len(a.loras)} | {a.config.get('r', '')} |"
        for a, w in zip(adapters, weights, strict=True)
    ]
    body = [
        "",
        f"# {cell(ids[0])} merged with {', '.join(cell(i) for i in ids[1:])}",
        "",
        f"Made by adapterkit {__version__} from the files: W' = round(W + Σ weight · scale · b @ a), each weight rounded once.",
        f"What was done to each tensor, and the hash of every file, stands in `{RECEIPT}`; `adapterkit verify .` checks it.",
        "",
        f"Base: {cell(ids[0])}",
        "",
        "| adapter | weight | modules | r |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(header + body)


def hub_or_name(folder: Folder) -> str:
    return str(folder.origin.get("repo") or folder.name)


def cell(text: str) -> str:
    return "".join(c if c.isalnum() or c in " ._-/" else " " for c in text)


def _kept(base: Checkpoint) -> list[str]:
    """The licence, language and pipeline of the base's card: they hold for the merged model too."""
    if "README.md" not in base.files:
        return []
    text = base.folder.read("README.md", 0, min(base.files["README.md"], 65536)).decode(
        "utf-8", "replace"
    )
    front = text.split("---")[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = re.findall(
        r"^(license|license_name|license_link|pipeline_tag|language): *([\w .:/\-]+)$",
        front,
        re.MULTILINE,
    )
    return [f"{key}: {json.dumps(value.strip())}" for key, value in found]


def base_card(base: Checkpoint, summary: str) -> str:
    """A README.md for a model made from this one alone."""
    name = cell(hub_or_name(base.folder))
    header = [
        "---",
        *([f"base_model: {name}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else []),
        "library_name: transformers",
    ]
    return "\n".join(
        [
            *header,
            "tags:",
            "- adapterkit",
            "---",
            "",
            f"# {name}, {summary}",
            "",
            f"Made by adapterkit {__version__}.",
            "",
        ]
    )


def adapter_card(base: str | None, adapters: Sequence[Adapter], summary: str) -> str:
    """A README.md with the Hub's metadata for an adapter; names of inputs are quoted, nothing of them is interpreted."""
    header = ["---", *([f"base_model: {json.dumps(base)}"] if base else [])]
    header += ["library_name: peft", "tags:", "- lora", "- adapterkit", "---", ""]
    body = [
        "# Adapter",
        "",
        f"Made by adapterkit {__version__} from the files: {cell(summary)}.",
        "",
    ]
    body += ["From:", ""] if adapters else []
    body += [f"- {cell(hub_or_name(a.folder))}" for a in adapters]
    body += [
        "",
        f"What was done to each module, and the hash of every file, stands in `{RECEIPT}`.",
        "",
    ]
    return "\n".join(header + body)
