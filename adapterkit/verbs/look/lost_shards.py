"""Factors that were saved without one process's share: most modules have a block of zeros."""

import re
from dataclasses import dataclass, field

from adapterkit.core.adapter.record import Lora
from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.lazy import Tensor

LEAST = 1 / 8  # of an axis: smaller blocks may be heads or neurons that nothing used
# modules with the rows, or columns, of several, of which training may have left out some
FUSED = re.compile(
    r"qkv|gate_up|query_key_value|c_attn|in_proj|W_pack|kv_proj|to_kv|experts|linear[12]$", re.I
)


@dataclass
class LostShards:
    """Collects the modules of an adapter that have such a block, and what is zero there."""

    trained: int = 0
    blocks: dict[str, str] = field(default_factory=dict)

    def record_factors(self, lora: Lora, a: Tensor, b: Tensor) -> None:
        """a (rank, in) and b (out, rank) of a module. Of an embedding most tokens are not seen; of
        b that is zero nothing was trained."""
        if lora.kind == "embedding" or not b.any():
            return
        self.trained += 1
        for what, zero in (("columns of a", (a == 0).all(0)), ("rows of b", (b == 0).all(1))):
            places = zero.nonzero().flatten().tolist()
            is_block = bool(places) and places[-1] - places[0] + 1 == len(places)
            if is_block and len(places) >= LEAST * len(zero):
                self.blocks[lora.module] = f"{places[0]} to {places[-1]} of {len(zero)} {what}"

    def problem(self, where: str) -> Refused | None:
        """Where most of the trained modules have one, and not fused ones alone."""
        count, blocks = len(self.blocks), self.blocks
        if count < max(2, self.trained / 2) or all(map(FUSED.search, blocks)):
            return None
        return Refused(
            f"{count} of {self.trained} trained modules have a block of zeros: "
            f"{listed([f'{shown(module)} {what}' for module, what in blocks.items()])}",
            expected="whole factors: a save that loses the shard of a process leaves such zeros",
            where=where,
            hint="save it again, the shards gathered (FSDP, ZeRO-3, tensor parallelism)",
            code="AK302",
        )
