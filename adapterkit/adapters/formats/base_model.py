"""Facts about the base of an adapter: its config and the names of its parameters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from adapterkit.adapters.formats.library import architectures
from adapterkit.adapters.formats.modules.experts import Stack, stacks_of
from adapterkit.adapters.formats.modules.row_permutations import LINEAR, Heads, LinearHeads
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Settings
from adapterkit.core.weights.loading import looks_whole
from adapterkit.core.weights.names import Names

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
HEAD = "lm_head"


@dataclass(frozen=True)
class BaseFacts:
    """Facts that a base's config and keys give, or its config alone."""

    model_type: str = ""
    text_type: str = ""  # of the language model inside a multimodal one
    heads: Heads | None = None
    experts: int | None = None
    tied: bool | None = None  # whether the head is the embeddings; None without a base
    family: str | None = None  # the architecture of an image or video model

    @classmethod
    def of(
        cls, config: Settings, keys: Collection[str] | None = None, family: str | None = None
    ) -> "BaseFacts":
        """The facts of the base with this config.json and these keys (without a tied head). `keys`
        is None for a config in an adapter's folder."""
        text = config.get("text_config")
        tables = [config, *([text] if isinstance(text, Mapping) else [])]
        names = (one.get("model_type") for one in tables)
        types = [*(name if isinstance(name, str) else "" for name in names), ""]
        counts = [one[key] for one in tables for key in EXPERTS if type(one.get(key)) is int]
        ties = any(one.get("tie_word_embeddings") is True for one in tables)
        if keys and not any(HEAD in key.split(".") for key in keys):
            ties = True
        return cls(
            types[0],
            types[1],
            model_heads(config),
            counts[0] if counts else None,
            None if keys is None else ties,
            family,
        )


@dataclass(frozen=True)
class NamedBase:
    """A base with its weights: its parameters by their names in the model, and its stacks of
    experts. Both build the model on first use."""

    checkpoint: Checkpoint
    task: str | None  # the task that the adapter was trained for

    @cached_property
    def names(self) -> Names:
        base = self.checkpoint
        # PEFT numbers the stacks of a module in the order of the model's code
        has_stacks = any(len(spec.shape) == 3 for spec in base.tensors.values())
        is_whole = not has_stacks and looks_whole(base)
        return Names(base, task=self.task, build_model=True, whole=is_whole)

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        return stacks_of(self.names)

    @property
    def experts(self) -> int | None:
        """The number of matrices in each of its stacks; None if they differ."""
        counts = {stack.shape[0] for stack in self.stacks.values()}
        return counts.pop() if len(counts) == 1 else None

    @cached_property
    def by_key(self) -> dict[str, str]:
        """The parameter of each stored tensor that holds a whole one."""
        parameters = [self.names.parameter(name) for name in self.names.all()]
        return {
            one.slots[0].key: one.name
            for one in parameters
            if one is not None and one.is_full_tensor
        }


def model_heads(config: Settings) -> Heads | None:
    """The heads in a model's config (transformers' or litgpt's names); None if it has none."""
    for table in (config, config.get("text_config")):
        if not isinstance(table, Mapping):
            continue
        query = table.get("num_attention_heads", table.get("n_head"))
        key = table.get("num_key_value_heads", table.get("n_query_groups")) or query
        if all(type(n) is int and n > 0 for n in (query, key)) and query % key == 0:
            own = [n for word in LINEAR if type(n := table.get(word)) is int and n > 0]
            is_linear = len(own) == len(LINEAR) and own[1] % own[0] == 0
            return Heads(query, key, LinearHeads(*own) if is_linear else None)
    return None


def architecture_of(
    base: BaseFacts | None,
    among: Collection[str],  # names of architectures
    what: str,  # the format, for messages
) -> str:
    """The architecture of a base, for module names that fit several. `Refused` without a base, or
    if the base is none of these."""
    known = {
        model_type: name for name in among for model_type in architectures()[name].detect.models
    }
    if base is None:
        raise Refused(
            f"{what} is written for one architecture, which the adapter does not determine",
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
