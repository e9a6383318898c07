"""The neutral adapter: low-rank factors per module, replaced parameters and trained token rows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from adapterkit.adapters.config import CHANGED_BASE, TASK_HEADS
from adapterkit.adapters.keys import BENEATH, CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.patterns import matcher


@dataclass(frozen=True)
class Lora:
    """One adapted module or parameter: delta = scale * b @ a, as the file stores it."""

    module: str  # dotted path in the loaded model
    kind: str  # "module" or "embedding", by the factors' names
    a: TensorSpec
    b: TensorSpec
    magnitude: TensorSpec | None = None  # DoRA
    bias: TensorSpec | None = None  # lora_B.bias
    depth: int = 0  # how many wrappers of the module's other parameters lie around this one's


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that replace the base's: row indices and their values, in the same order."""

    module: str
    indices: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and tensors, every tensor accounted for."""

    folder: Folder
    number: int  # its place among the job's inputs
    config: dict
    loras: tuple[Lora, ...]
    replaced: dict[
        str, TensorSpec
    ]  # parameter -> trained value: modules_to_save, biases, resized embeddings
    tokens: tuple[Tokens, ...]
    tensors: dict[str, TensorSpec] = field(repr=False)
    header_sha256: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """Its folder's label, for messages."""
        return self.folder.label

    @property
    def where(self) -> str:
        return f"{self.label}/{CONFIG}"

    def changed_base(self) -> str | None:
        """The init method's name if it changed the base's weights, else None."""
        init = self.config.get("init_lora_weights", True)
        return init if isinstance(init, str) and init.lower().startswith(CHANGED_BASE) else None

    @property
    def saved(self) -> list[str]:
        """Modules that are trained whole: modules_to_save, and the heads that PEFT adds to it for the task."""
        return saved_modules(self.config)

    def saves(self, parameter: str) -> bool:
        """Whether a module that is trained whole holds the parameter."""
        return any(inside(parameter, module) for module in self.saved)

    def pattern_of(self, whole: Sequence[str]) -> str:
        """A regular expression, as short as may be, that is found in these values that were trained whole and in no adapted
        module."""
        rest = [name for name in whole if not self.saves(name)]
        found = {
            re.escape(module)
            for module in self.saved
            if any(inside(name, module) for name in whole)
        }
        found |= {"bias$" if name.endswith("bias") else re.escape(name) for name in rest}
        pattern = "|".join(sorted(found))
        if any(re.search(pattern, lora.module) for lora in self.loras):
            pattern = "|".join(f"^{re.escape(name)}$" for name in sorted(whole))
        return pattern

    @cached_property
    def copies(self) -> dict[str, TensorSpec]:
        """Of `replaced`, the copies of the base's weights that PEFT saves beside an embedding's or head's factors and rows."""
        biases = self.config.get("bias", "none") != "none"
        beneath = {n: s for n, s in self.replaced.items() if BENEATH.search(s.key)}
        return {n: s for n, s in beneath.items() if not (biases and n.endswith("bias"))}

    def leaves(self, module: str, own: Sequence[str] | None = None) -> list[str]:
        """The module's own parameters that target_parameters names: PEFT compares the end of the full name.

        `own` are all of them in the order of its code. Without it those that the module may have: a name without a dot counts
        where target_modules does not name the module, of which PEFT takes one or the other.
        """
        targets = self.config.get("target_parameters") or []
        if own is not None:
            return [
                leaf
                for leaf in own
                if any(f".{module}.{leaf}".endswith(f".{target}") for target in targets)
            ]
        split = [target.rpartition(".") for target in targets]
        bare = any(not home for home, _, _ in split)
        named = bare and (
            self._names(module) or any(x.module == module and self.attention(x) for x in self.loras)
        )
        there = [
            leaf
            for home, _, leaf in split
            if (f".{module}".endswith(f".{home}") if home else not named)
        ]
        return list(dict.fromkeys(there))

    def _names(self, module: str) -> bool:
        """Whether target_modules names a module."""
        targets = self.config.get("target_modules")
        if isinstance(targets, str):
            whole = r"\A(?:{})\Z"
            return targets == "all-linear" or matcher(
                targets, f"{self.where}: target_modules", whole
            )(module)
        return isinstance(targets, list) and any(
            f".{module}".endswith(f".{target}") for target in targets
        )

    def attention(self, lora: Lora) -> str | None:
        """The MultiheadAttention that a factor pair belongs to as its output projection, else None.

        PEFT adapts both projections of such a layer at once; the key of the output's lies inside the layer's wrapper.
        """
        parent, _, last = lora.module.rpartition(".")
        inside = f"{parent.rpartition('.')[2]}.base_layer.out_proj.lora_A."  # what is around the attention may be wrapped too
        if last != "out_proj" or inside not in lora.a.key or self.leaves(parent):
            return None
        return parent if any(other.module == parent for other in self.loras) else None

    def pattern_name(self, lora: Lora, leaf: str | None = None) -> str:
        """The name that PEFT holds rank_pattern and alpha_pattern against: a parameter's full name (`leaf` its own), the
        attention's for a MultiheadAttention's output projection, else the module's."""
        return f"{lora.module}.{leaf}" if leaf is not None else self.attention(lora) or lora.module

    def resolved(self, name: str) -> tuple[int, float]:
        """Rank and scale of a module or parameter.

        The first pattern of rank_pattern, and of alpha_pattern, that matches counts, each on its own
        (PEFT's `get_pattern_key`: `(.*\\.)?(pattern)$` from the start of the name, a dot matching any character).
        """
        rank, alpha = self.patterned(
            name, self.config.get("r", 8), self.config.get("lora_alpha", 8)
        )
        return rank, self.scale(rank, alpha)

    def patterned(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of a module: those of the first patterns that match, else the ones given."""
        return self._first(self._rank_patterns, name, rank), self._first(
            self._alpha_patterns, name, alpha
        )

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @cached_property
    def _rank_patterns(self) -> list:
        return self._patterns("rank_pattern")

    @cached_property
    def _alpha_patterns(self) -> list:
        return self._patterns("alpha_pattern")

    def _patterns(self, key: str) -> list:
        table = self.config.get(key) or {}
        where = f"{self.where}: {key}"
        return [
            (matcher(str(pattern), where, r"\A(?:.*\.)?(?:{})\Z"), value)
            for pattern, value in table.items()
        ]

    @staticmethod
    def _first(patterns: list, name: str, default):
        return next((value for matches, value in patterns if matches(name)), default)


def rank_mismatch(adapter: Adapter, lora: Lora, stored: int, rank: int) -> Refused:
    """The refusal of a file whose factors have another rank than its config says."""
    return Refused(
        f"rank {stored} in the file for {shown(lora.module)}",
        expected=f"rank {rank}, as r and rank_pattern say",
        where=adapter.where,
        hint="restore the config that was saved with the file (a wrong rank means a wrong scale)",
    )


def saved_modules(config: dict) -> list[str]:
    """modules_to_save, and the heads that PEFT adds to it, in memory, by task_type."""
    return list(
        dict.fromkeys(
            [
                *(config.get("modules_to_save") or []),
                *TASK_HEADS.get(config.get("task_type") or "", ()),
            ]
        )
    )


def inside(parameter: str, module: str) -> bool:
    """Whether modules_to_save of that name wraps the parameter's module; PEFT goes by the end of a name, without its dot."""
    return f"{module}." in parameter


# What PEFT saves unasked: the embeddings, when their size changed or they were adapted (save_embedding_layers="auto")
EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|wte|\w*lm_head|shared|output|output_layer|decoder|proj_out|vocab_projector|lm_loss)\.(?:weight|bias)$"
)
