"""Which modules of a live model a config targets."""

import math
from dataclasses import dataclass

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.runtime.layers import kind_of


@dataclass(frozen=True)
class Target:
    path: str
    kind: str
    rank: int
    scale: float


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    ends = config.targets or ()
    scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    return [
        Target(path, kind, config.rank, scale)
        for path, module in model.named_modules()
        if (kind := kind_of(module))
        and (ends == "all-linear" or any(f".{path}".endswith(f".{end}") for end in ends))
    ]
