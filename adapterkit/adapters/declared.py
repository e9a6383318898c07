"""Scales that PEFT's settings declare, for files that carry them elsewhere than in a config."""

from collections.abc import Mapping
from typing import Any

from adapterkit.adapters.adapter_config import plain_settings, rank_settings
from adapterkit.adapters.config import check_config
from adapterkit.adapters.targets import Patterns
from adapterkit.errors import Problems


class DeclaredScales:
    """alpha of each module by r, lora_alpha, their patterns, use_rslora: delta = alpha / r · b @ a.

    `Refused` where the settings have values that PEFT would not take."""

    def __init__(self, settings: Mapping[str, Any], where: str):
        config = {"peft_type": "LORA", **settings}
        Problems(check_config(config, where)).raise_all()
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.rslora = bool(config.get("use_rslora"))
        self.ranks = Patterns(config.get("rank_pattern") or {}, f"{where}: rank_pattern")
        self.alphas = Patterns(config.get("alpha_pattern") or {}, f"{where}: alpha_pattern")

    def alpha_of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module; with use_rslora alpha · √r, which gives the same scale."""
        rank, alpha = self.ranks.value(module, self.rank), self.alphas.value(module, self.alpha)
        return rank, float(alpha * rank**0.5 if self.rslora else alpha)


def declared_settings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], **settings: Any
) -> dict[str, Any]:
    """The settings of a LoRA with these ranks and alphas by module."""
    numbers = {name: whole(alpha) for name, alpha in alphas.items()}
    targets = {"target_modules": sorted(ranks)}
    return plain_settings() | targets | settings | rank_settings(ranks, numbers)


def whole(value: float) -> float | int:
    """A whole number as an int, as configs have them; beyond 2^53 a float has no unit."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value
