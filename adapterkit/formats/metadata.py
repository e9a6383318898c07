"""Metadata of a file by the templates of its format, filled in and read again.

A template is a number, or a text with words in braces; `{word}` alone is the value itself.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.formats.parts import rank_of
from adapterkit.formats.record import Module

WORD = re.compile(r"\{(\w+)\}")


def filled(templates: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata; keys whose words have no value are left out."""
    metadata: dict[str, Any] = {}
    for key, template in templates.items():
        words = WORD.findall(template) if isinstance(template, str) else []
        if any(values.get(word) is None for word in words):
            continue
        whole = words and template == f"{{{words[0]}}}"
        if not words or whole:
            metadata[key] = values[words[0]] if whole else template
        else:
            metadata[key] = WORD.sub(lambda match: str(values[match[1]]), template)
    return metadata


def words_of(templates: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The words' values that give this metadata, of those templates that it fits."""
    values: dict[str, Any] = {}
    for key, template in templates.items():
        words = WORD.findall(template) if isinstance(template, str) else []
        if not words or key not in metadata:
            continue
        if template == f"{{{words[0]}}}":
            values[words[0]] = metadata[key]
            continue
        pattern = re.escape(template)
        for word in words:
            pattern = pattern.replace(re.escape(f"{{{word}}}"), f"(?P<{word}>.+)")
        match = re.fullmatch(pattern, str(metadata[key]))
        values |= match.groupdict() if match else {}
    return values


def numbers(modules: Iterable[Module]) -> dict[str, str | None]:
    """The one rank and the one alpha of all modules as texts; None where they differ."""
    own = [m for m in modules if rank_of(m.kind, m.parts) is not None]
    ranks, alphas = {m.rank for m in own}, {m.alpha for m in own}
    return {
        "rank": str(ranks.pop()) if len(ranks) == 1 else None,
        "alpha": str(alphas.pop()) if len(alphas) == 1 else None,
    }


def base_words(base: str | None) -> dict[str, Any]:
    """Words that follow from a base's Hub id: how many there are, and the last part of the name."""
    return {} if base is None else {"bases": 1, "base_name": base.rpartition("/")[2]}
