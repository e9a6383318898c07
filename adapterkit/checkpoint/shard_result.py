"""What is noted of an output file when it is written: in a journal, a marker, the receipt."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ShardResult:
    """One written shard: its hash, the hash of its bytes up to each tensor's end, and metrics."""

    file: str
    size: int
    sha256: str | None
    # key -> first 16 hex digits of the sha256 of the file up to that tensor's end; None of a file
    # whose bytes never came here
    marks: dict[str, str] | None
    metrics: dict[str, dict]
    grown: int = 0  # bytes by which tensors are larger than planned, all together
    tensors: int | None = None  # their number, where the plan knows an upper bound only
    # key -> dtype, shape, position in the handoff's file
    handoffs: dict[str, list] = field(default_factory=dict)

    def _is_sound(self) -> bool:
        """Whether all has its type: it may have been read."""
        tables = [self.metrics, self.handoffs] + [self.marks] * (self.marks is not None)
        counts = [self.size, self.grown] + [self.tensors] * (self.tensors is not None)
        return (
            isinstance(self.file, str)
            and isinstance(self.sha256, str | None)
            and all(isinstance(table, dict) for table in tables)
            and all(isinstance(metric, dict) for metric in self.metrics.values())
            and all(type(count) is int for count in counts)
        )


def read_result(data: Any) -> ShardResult | None:
    """The result that was noted as `data`; None where it is none."""
    try:
        result = ShardResult(**data)
    except TypeError:
        return None
    return result if result._is_sound() else None
