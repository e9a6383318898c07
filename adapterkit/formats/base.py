"""What a base says of itself: its architecture, heads, experts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import Refused, shown
from adapterkit.formats.library import architectures
from adapterkit.formats.rows import Heads, model_heads

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
HEAD = "lm_head"


@dataclass(frozen=True)
class Base:
    """A base, by its config and keys."""

    model_type: str
    heads: Heads | None = None
    experts: int | None = None
    tied: bool = False  # the head is the embeddings


def base_of(config: Mapping[str, Any], keys: Collection[str]) -> Base:
    """The base with this config.json and these tensors, which tell a tied head where there are
    any."""
    text = config.get("text_config")
    tables = [config, *([text] if isinstance(text, Mapping) else [])]
    counts = [table[key] for table in tables for key in EXPERTS if type(table.get(key)) is int]
    ties = any(table.get("tie_word_embeddings") is True for table in tables)
    if keys:
        ties = not any(HEAD in key.split(".") for key in keys)
    experts = counts[0] if counts else None
    return Base(str(config.get("model_type", "")), model_heads(config), experts, ties)


def architecture_of(
    model: Base | None,
    among: Collection[str],  # names of architectures
    what: str,  # the format, for messages
) -> str:
    """The architecture of a base, where module names alone do not tell it. `Refused` without a
    base, or for one that is none of these."""
    known = {
        model_type: name for name in among for model_type in architectures()[name].detect.models
    }
    if model is None:
        raise Refused(
            f"{what} is written for one architecture, which the adapter does not tell",
            expected="the model that it was trained on",
            where="options",
            hint="give --base MODEL",
        )
    if model.model_type not in known:
        raise Refused(
            f"a base of model_type {shown(repr(model.model_type))}",
            expected=", ".join(sorted(known)),
            where="--base",
            hint="choose another format",
        )
    return known[model.model_type]
