"""What is noted of an output file when it is written: in a journal, a marker, the receipt."""

from dataclasses import dataclass, field

from adapterkit.core import records
from adapterkit.core.output.journal import Entry
from adapterkit.core.records import COUNT, TABLE, TEXT, optional


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


def read_result(entry: Entry) -> ShardResult | None:
    """The result that an entry notes, still to be held against the plan; None where it notes
    something else."""
    return ShardResult(**entry["shard"]) if RESULT.fits(entry.get("shard")) else None


PLACE = records.test("a place", lambda v: [*map(type, v)] == [str, list, int])
WORDS = {
    "file": TEXT, "size": COUNT, "sha256": optional(TEXT), "marks": optional(TABLE),
    "metrics": records.table_of(TEXT, TABLE), "grown": records.INTEGER,
    "tensors": optional(COUNT), "handoffs": records.table_of(TEXT, PLACE),
}  # fmt: skip
RESULT = records.also(records.entries(WORDS), "a result", lambda v: v.keys() == WORDS.keys())
