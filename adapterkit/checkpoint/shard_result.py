"""What is noted of an output file when it is written: in a journal, a marker, the receipt."""

import re
from dataclasses import dataclass, field
from typing import Any

SHA256 = re.compile(r"[0-9a-f]{64}")
MARK = re.compile(r"[0-9a-f]{16}")
LARGEST = 1e300  # no number that is measured or counted is larger

# What is measured of a changed tensor or module, by its name (docs/receipts.md), and what it is:
# one such value, or of some names a list of them.
NUMBER = (int, float)
METRICS: dict[str, tuple[type, ...]] = {
    "accepted": (bool,), "adapters": (str,), "alpha": NUMBER, "angle": NUMBER, "changed": NUMBER,
    "conflict": NUMBER, "cosines": NUMBER, "damping": NUMBER, "delta": NUMBER, "distance": NUMBER,
    "dropped": (bool,), "energy": NUMBER, "error": NUMBER, "error_after": NUMBER,
    "error_plain": NUMBER, "explained": NUMBER, "gap": NUMBER, "iterations": (int,),
    "kept_energy": NUMBER, "norm": NUMBER, "output_error": NUMBER, "rank": (int,),
    "requantisation": NUMBER, "rounding": NUMBER, "steps": NUMBER, "strength": NUMBER,
    "survived": NUMBER, "taken": (bool, *NUMBER), "unchanged": (bool,), "unweighted_error": NUMBER,
    "unweighted_output_error": NUMBER,
}  # fmt: skip
LISTS = ("adapters", "cosines", "gap")


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
        marks = {} if self.marks is None else self.marks
        tables = (marks, self.metrics, self.handoffs)
        return (
            all(isinstance(table, dict) for table in tables)
            and isinstance(self.file, str)
            and is_count(self.size)
            and is_count(abs(self.grown) if type(self.grown) is int else None)
            and (self.tensors is None or is_count(self.tensors))
            and (self.sha256 is None or is_sha256(self.sha256))
            and all(isinstance(mark, str) and MARK.fullmatch(mark) for mark in marks.values())
            and all(isinstance(metric, dict) for metric in self.metrics.values())
            and all(_is_handoff(place) for place in self.handoffs.values())
        )


def read_result(data: Any) -> ShardResult | None:
    """The result that was noted as `data`; None where it is none. What it says of a file is still
    to be held against the plan: `Shard.accepts`, `Computed.accepts`."""
    try:
        result = ShardResult(**data)
    except TypeError:
        return None
    return result if result._is_sound() else None


def are_metrics(table: dict[str, dict]) -> bool:
    """Whether these are metrics by name, each of its kind, numbers finite."""
    return all(_is_metric(*item) for metric in table.values() for item in metric.items())


def _is_metric(name: str, value: Any) -> bool:
    if name in LISTS:
        return isinstance(value, list) and all(_is_of(METRICS[name], item) for item in value)
    return name in METRICS and _is_of(METRICS[name], value)


def _is_of(kinds: tuple[type, ...], value: Any) -> bool:
    return type(value) in kinds and (isinstance(value, str | bool) or is_number(value))


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no absurd one."""
    return type(value) in NUMBER and -LARGEST < value < LARGEST


def is_count(value: Any) -> bool:
    """Whether it is an integer that can count bytes."""
    return type(value) is int and 0 <= value < 1 << 63


def is_sha256(value: Any) -> bool:
    """Whether it is a sha256 in hexadecimal digits."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _is_handoff(place: Any) -> bool:
    if not isinstance(place, list) or len(place) != 3:
        return False
    dtype, shape, position = place
    is_shape = isinstance(shape, list) and all(map(is_count, shape))
    return isinstance(dtype, str) and is_shape and is_count(position)
