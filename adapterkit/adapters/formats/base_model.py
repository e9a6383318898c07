"""The base of an adapter: what its config tells, and the names of its parameters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from adapterkit.adapters.formats.library import architectures
from adapterkit.adapters.formats.modules.experts import Stack
from adapterkit.adapters.formats.modules.row_permutations import Heads, model_heads
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Settings
from adapterkit.core.weights.names import Names

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
HEAD = "lm_head"


@dataclass(frozen=True)
class BaseFacts:
    """What a base's config and keys tell, its config alone too."""

    model_type: str
    heads: Heads | None = None
    experts: int | None = None
    tied: bool = False  # the head is the embeddings
    family: str | None = None  # the architecture of an image or video model
    text_type: str = ""  # of the language model inside a multimodal one


@dataclass(frozen=True)
class NamedBase:
    """A base whose weights are there: its parameters by their names in the model, its stacks of
    experts."""

    checkpoint: Checkpoint
    names: Names
    stacks: Mapping[str, Stack]

    @cached_property
    def by_key(self) -> dict[str, str]:
        """The parameter that each stored tensor is, where it is a whole one."""
        parameters = [self.names.parameter(name) for name in self.names.all()]
        return {
            one.slots[0].key: one.name for one in parameters if one is not None and one.is_whole
        }


def facts_of(config: Settings, keys: Collection[str], family: str | None = None) -> BaseFacts:
    """The facts of the base with this config.json and these tensors, of which a tied head is
    none."""
    text = config.get("text_config")
    tables = [config, *([text] if isinstance(text, Mapping) else [])]
    counts = [table[key] for table in tables for key in EXPERTS if type(table.get(key)) is int]
    ties = any(table.get("tie_word_embeddings") is True for table in tables)
    if keys and not any(HEAD in key.split(".") for key in keys):
        ties = True
    experts = counts[0] if counts else None
    types = [*(str(table.get("model_type", "")) for table in tables), ""]
    return BaseFacts(types[0], model_heads(config), experts, ties, family, types[1])


def architecture_of(
    base: BaseFacts | None,
    among: Collection[str],  # names of architectures
    what: str,  # the format, for messages
) -> str:
    """The architecture of a base, where module names alone do not tell it. `Refused` without a
    base, or for one that is none of these."""
    known = {
        model_type: name for name in among for model_type in architectures()[name].detect.models
    }
    if base is None:
        raise Refused(
            f"{what} is written for one architecture, which the adapter does not tell",
            expected="the model that it was trained on",
            where="options",
            hint="give --base MODEL",
            code="AK402",
        )
    found = known.get(base.model_type) or known.get(base.text_type)
    if found is None:
        raise Refused(
            f"the base is of model_type {shown(repr(base.model_type))}",
            expected=", ".join(sorted(known)),
            where="--base",
            hint="choose another format",
            code="AK402",
        )
    return found
