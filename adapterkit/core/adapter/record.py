"""The neutral adapter: low-rank factors per module, replaced parameters and trained token rows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from adapterkit.core.adapter.config import BASE_CHANGING_INITS, CHANGED, IMPLICIT, with_heads
from adapterkit.core.adapter.keys import BASE_LAYER_VALUE, CONFIG
from adapterkit.core.adapter.targets import ALL_LINEAR, Patterns, TargetMatcher, has_end
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Refused, shown


@dataclass(frozen=True)
class Lora:
    """Stored factors of one module or parameter: delta = scale * b @ a."""

    module: str  # dotted path in the loaded model
    kind: str  # "module" or "embedding", by the factors' names
    a: TensorSpec
    b: TensorSpec
    magnitude: TensorSpec | None = None  # DoRA
    bias: TensorSpec | None = None  # lora_B.bias
    depth: int = 0  # wrappers of the module's other parameters around this one's


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that replace the base's: row indices and their values, in the same
    order."""

    module: str
    indices: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and tensors; each tensor is a factor, a replaced value or token rows."""

    folder: Folder
    number: int  # its position among the job's inputs
    config: dict
    loras: tuple[Lora, ...]
    replaced: dict[str, TensorSpec]  # by parameter: modules_to_save, biases, resized embeddings
    tokens: tuple[Tokens, ...]
    tensors: dict[str, TensorSpec] = field(repr=False)
    header_sha256: str = ""
    base_fingerprint: str | None = None  # fingerprint of the base that it was made for
    others: tuple = ()  # changes that are no factors, each of a module `target`

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

    @property
    def trained_class(self) -> tuple[str | None, str | None]:
        """The task_type and the name of the model's class; both identify the trained class."""
        mapping = self.config.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return self.config.get("task_type"), name

    @property
    def is_factors_alone(self) -> bool:
        """True if the base needs only weights to which products are added."""
        others = self.replaced, self.tokens, self.saved, self.base_fingerprint
        biases = self.config.get("bias") not in (None, "none")
        return not any(others) and not biases and not any(lora.bias for lora in self.loras)

    def changed_base(self) -> str | None:
        """init_lora_weights if that init changed the base's weights, or would, else None."""
        init = self.config.get("init_lora_weights", True)
        inits = (*BASE_CHANGING_INITS, IMPLICIT)
        return init if isinstance(init, str) and init.lower().startswith(inits) else None

    @property
    def base_change(self) -> str | None:
        """The name of the change to its base (`core/outputs/changed_base.py`), if it has one."""
        return str(self.config.get("revision")).partition(CHANGED)[2] or None

    @property
    def has_old_stacks(self) -> bool | None:
        """True if PEFT up to 0.18 wrote the file, and read stacks of experts as (in, out); None if
        the version is unknown."""
        version = self.config.get("peft_version")
        match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        return None if match is None else (int(match[1]), int(match[2])) < (0, 19)

    @property
    def is_implicit(self) -> bool:
        """True if its base is the original without the initial factors in the folder INITIAL."""
        return (self.changed_base() or "").lower().startswith(IMPLICIT)

    @property
    def saved(self) -> list[str]:
        """Fully trained modules: modules_to_save and the heads that PEFT adds for the task."""
        return with_heads(self.config.get("modules_to_save"), self.config.get("task_type"))

    def saves(self, parameter: str) -> bool:
        """Return whether the parameter belongs to a fully trained module."""
        return any(is_inside(parameter, module) for module in self.saved)

    @cached_property
    def copies(self) -> dict[str, TensorSpec]:
        """The entries of `replaced` that are copies of the base's weights, which PEFT saves with an
        embedding's or head's factors and rows."""
        biases = self.config.get("bias", "none") != "none"
        beneath = {n: s for n, s in self.replaced.items() if BASE_LAYER_VALUE.search(s.key)}
        return {n: s for n, s in beneath.items() if not (biases and n.endswith("bias"))}

    def leaves(self, module: str, own: Sequence[str] | None = None) -> list[str]:
        """Names of the module's parameters that are in target_parameters (PEFT: by the end of the
        full name).

        `own`: all parameters of the module, in the order of its code. Without it, possible ones:
        PEFT adapts either a module or its parameters, so names without a dot count only if
        target_modules does not match the module."""
        targets = self.config.get("target_parameters") or []
        if own is not None:
            return [
                leaf
                for leaf in own
                if any(has_end(f"{module}.{leaf}", target) for target in targets)
            ]
        parts = [target.rpartition(".") for target in targets]
        has_bare = any(not parent for parent, _, _ in parts)
        is_target = has_bare and (
            self._is_target_module(module)
            or any(x.module == module and self.attention(x) for x in self.loras)
        )
        possible = [
            leaf
            for parent, _, leaf in parts
            if (has_end(module, parent) if parent else not is_target)
        ]
        return list(dict.fromkeys(possible))

    def is_stack(self, lora: Lora) -> bool:
        """Return whether factors have more rows than the rank of any parameter that they may belong
        to."""
        ranks = {
            self.rank_and_scale(f"{lora.module}.{leaf}")[0] for leaf in self.leaves(lora.module)
        }
        return bool(ranks) and lora.a.shape[0] not in ranks

    def _is_target_module(self, module: str) -> bool:
        """Return whether target_modules matches a module."""
        targets = self.config.get("target_modules")
        if not isinstance(targets, str | list):
            return False
        return targets == ALL_LINEAR or TargetMatcher(targets, f"{self.where}: target_modules")(
            module
        )

    def attention(self, lora: Lora) -> str | None:
        """The MultiheadAttention whose output projection the factors are for, else None.

        PEFT adapts both projections of such a layer at once; the key of the output projection is
        inside the layer's wrapper.
        """
        parent, _, last = lora.module.rpartition(".")
        # not the whole path, because modules around the attention may be wrapped too
        end_of_key = f"{parent.rpartition('.')[2]}.base_layer.out_proj.lora_A."
        if last != "out_proj" or end_of_key not in lora.a.key or self.leaves(parent):
            return None
        return parent if any(other.module == parent for other in self.loras) else None

    def pattern_name(self, lora: Lora, leaf: str | None = None) -> str:
        """The name that PEFT matches with rank_pattern and alpha_pattern: for parameter `leaf` its
        full name, for a MultiheadAttention's output projection the attention's, else the
        module's."""
        return f"{lora.module}.{leaf}" if leaf is not None else self.attention(lora) or lora.module

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank and scale of a module or parameter; rank_pattern and alpha_pattern are matched
        separately."""
        config = self.config
        rank, alpha = self.rank_and_alpha(name, config.get("r", 8), config.get("lora_alpha", 8))
        return rank, self.scale(rank, alpha)

    def rank_and_alpha(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the first patterns that match a module or parameter, else `rank` and
        `alpha`."""
        ranks, alphas = self._patterns
        return ranks.value(name, rank), alphas.value(name, alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @cached_property
    def _patterns(self) -> tuple[Patterns[int], Patterns[float]]:
        """The patterns of ranks and of alphas."""
        keys = ("rank_pattern", "alpha_pattern")
        ranks, alphas = (Patterns(self.config.get(k) or {}, f"{self.where}: {k}") for k in keys)
        return ranks, alphas


def rank_mismatch(adapter: Adapter, lora: Lora, stored: int, rank: int) -> Refused:
    """The refusal of a file whose factors have another rank than its config."""
    return Refused(
        f"rank {stored} in the file for {shown(lora.module)}",
        expected=f"rank {rank}, as r and rank_pattern say",
        where=adapter.where,
        hint="restore the config that was saved with the file (a wrong rank means a wrong scale)",
        code="AK303",
    )


def is_inside(parameter: str, module: str) -> bool:
    """Return whether an entry `module` of modules_to_save matches the parameter's module (PEFT: by
    the end of the name, also within a component)."""
    return f"{module}." in parameter


# PEFT saves embeddings that were resized or adapted (save_embedding_layers="auto")
EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:(?=\w*embed)\w++|wte|\w*lm_head|shared|output|output_layer|decoder|proj_out|"
    r"vocab_projector|lm_loss)\.(?:weight|bias)$"
)
