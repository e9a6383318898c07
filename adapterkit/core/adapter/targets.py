"""Match names by PEFT's rules: the modules of a target, the first pattern that counts, usual
targets."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from adapterkit.core.errors import Problems, Refused
from adapterkit.core.patterns import matcher

T = TypeVar("T")
ALL_LINEAR = "all-linear"
NAMES = re.compile(r"[\w.-]+( *, *[\w.-]+)*")  # no regex: a dot belongs to a name
WHOLE = r"\A(?:{})\Z"  # a regular expression for whole names
ENDING = r"\A(?:.*\.)?(?:{})\Z"  # one for the end of a name, or all of it
CLASSIFIERS = ("score", "classifier")  # names of the heads of classifiers
_QV = ("q_proj", "v_proj")
_BERT = ("query", "value")
# model type -> PEFT 0.21's default targets: ends of names, or a regular expression
USUAL_TARGETS: dict[str, tuple[str, ...] | str] = {
    "bart": _QV, "bert": _BERT, "blip-2": ("q", "v", *_QV), "bloom": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"), "chatglm": ("query_key_value",), "codegen": ("qkv_proj",),
    "deberta": ("in_proj",), "deberta-v2": ("query_proj", "value_proj"), "electra": _BERT,
    "falcon": ("query_key_value",), "gemma": _QV, "gemma2": _QV, "gemma3_text": _QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",), "gpt_neo": _QV, "gpt_neox": ("query_key_value",), "gptj": _QV,
    "layoutlm": _BERT, "llama": _QV, "llama4": _QV, "mistral": _QV, "mixtral": _QV,
    "mpt": ("Wqkv",), "mt5": ("q", "v"), "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _QV, "phi": (*_QV, "fc1", "fc2"), "qwen2": _QV, "qwen3": _QV,
    "RefinedWeb": ("query_key_value",), "RefinedWebModel": ("query_key_value",),
    "roberta": _BERT, "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), "stablelm": _QV,
    "t5": ("q", "v"), "xlm-roberta": _BERT,
}  # fmt: skip


def has_end(name: str, end: str) -> bool:
    """Return whether a dotted name is `end`, or ends with it after a dot."""
    return f".{name}".endswith(f".{end}")


def is_within(name: str, entry: str) -> bool:
    """Return whether a dotted name, or that of a module around it, ends with an entry."""
    return f".{entry}." in f".{name}."


class TargetMatcher:
    """A matcher of names by targets or exclude. A string is a regular expression for the whole
    name; a list has whole names or their ends after a dot."""

    def __init__(self, entries: str | Sequence[str], where: str):
        self.entries, self.where, ends = entries, where, set(entries)
        is_text = isinstance(entries, str)
        by_end = lambda name: not ends.isdisjoint(_ends(name))
        self._matches = matcher(entries, where, WHOLE) if is_text else by_end

    def __call__(self, name: str) -> bool:
        return self._matches(name)

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The entries that match none of the names."""
        if isinstance(self.entries, str):
            return [] if any(map(self._matches, names)) else [self.entries]
        ends: set[str] = set().union(*map(_ends, names))
        return [entry for entry in self.entries if entry not in ends]

    def refusals(
        self, names: Collection[str], expected: str = "a layer of the model"
    ) -> list[Refused]:
        """The refusals of entries that mean none of the names."""
        missing = self.unmatched(names)
        if not missing:
            return []
        from adapterkit.core.adapter.unmatched import unmatched

        return [unmatched(self.where, one, names, expected) for one in missing]


def entries_in(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """The entries in the text of an option that names modules: ends of names, separated by commas,
    or one regular expression for whole names."""
    text = value if isinstance(value, str) else ",".join(value)
    return tuple(text.replace(" ", "").split(",")) if NAMES.fullmatch(text) else text


def selecting(option: str, value: str | Sequence[str], names: Collection[str]) -> TargetMatcher:
    """The matcher of an option that names modules; `Refused` with all entries that match none of
    these names."""
    matches = TargetMatcher(entries_in(value), option)
    Problems(matches.refusals(names)).raise_all()
    return matches


def _ends(name: str) -> set[str]:
    """A dotted name and all its ends."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


class Patterns(Generic[T]):
    """The patterns of rank_pattern or alpha_pattern; the first one that matches a name counts.

    PEFT's `get_pattern_key`: `(.*\\.)?(pattern)$` from the start of the name; a dot is any
    character."""

    def __init__(self, table: Mapping[str, T], where: str):
        self.rows = [
            (pattern, matcher(str(pattern), where, ENDING), value)
            for pattern, value in table.items()
        ]

    @property
    def values(self) -> list[T]:
        return [value for _, _, value in self.rows]

    def value(self, name: str, default: T) -> T:
        return next((value for _, matches, value in self.rows if matches(name)), default)

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The patterns that match none of the names."""
        return [pattern for pattern, matches, _ in self.rows if not any(map(matches, names))]


def output_head(model: Any, is_classifier: bool) -> str | None:
    """The name of a model's output layer, which all-linear leaves out; for a classifier without
    one, that of its head."""
    ask = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    if head is None and is_classifier and ask is not None:
        heads: Iterable[Any] = (getattr(model, name, None) for name in CLASSIFIERS)
        head = next((module for module in heads if module is not None), None)
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)
