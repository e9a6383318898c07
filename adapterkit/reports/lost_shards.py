"""Factors that were saved without one process's share: the same share is zero in most modules."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from adapterkit.adapters.record import Lora
from adapterkit.errors import Refused, listed, shown

PROCESSES = 64  # of one run that are tried
LEAST = 1 / 8  # of an axis: smaller blocks may be heads or neurons that nothing used
# modules with the rows, or columns, of several, of which training may have left out some
FUSED = re.compile(
    r"qkv|gate_up|query_key_value|c_attn|in_proj|W_pack|kv_proj|to_kv|experts|linear[12]$", re.I
)


@dataclass
class LostShards:
    """Collects the zero shares of an adapter's modules: all that each one's zeros may be."""

    trained: int = 0
    # from which to which of so many processes -> module -> what is zero
    shares: dict[tuple[int, int, int], dict[str, str]] = field(default_factory=dict)

    def see(self, lora: Lora, a: Tensor, b: Tensor) -> None:
        """a (rank, in) and b (out, rank) of a module. Of an embedding most tokens are not seen; of
        b that is zero nothing was trained."""
        if lora.kind == "embedding" or not b.any():
            return
        self.trained += 1
        zeros = {"columns of a": (a == 0).all(0), "rows of b": (b == 0).all(1)}
        for what, zero in zeros.items():
            for share in _shares(zero):
                self.shares.setdefault(share, {})[lora.module] = what

    def problem(self, where: str) -> Refused | None:
        """The share that most of the trained modules lack, one of which is not fused."""
        order = lambda share: (len(self.shares[share]), -share[-1])
        first, last, of = most = max(self.shares, key=order, default=(0, 0, 0))
        modules = self.shares.get(most, {})
        if len(modules) < max(2, self.trained / 2) or all(map(FUSED.search, modules)):
            return None
        what = " and ".join(sorted({*modules.values()}))
        return Refused(
            f"{what} are zero from {first}/{of} to {last}/{of} in {len(modules)} of {self.trained} "
            f"trained modules: {listed([shown(module) for module in modules])}",
            expected="whole factors: a save that loses the shard of a process leaves such zeros",
            where=where,
            hint="save it again, the shards gathered (FSDP, ZeRO-3, tensor parallelism)",
        )


def _shares(zero: Tensor) -> Iterator[tuple[int, int, int]]:
    """The shares of processes that a block of zeros may be: each has as many, the last the rest."""
    places, size = zero.nonzero().flatten().tolist(), len(zero)
    if not places or places[-1] - places[0] + 1 != len(places) or len(places) < LEAST * size:
        return
    start, stop = places[0], places[-1] + 1
    for of in range(1, min(PROCESSES, size) + 1):
        each = math.ceil(size / of)
        if start % each == 0 and (stop % each == 0 or stop == size):
            yield start // each, of if stop == size else stop // each, of
