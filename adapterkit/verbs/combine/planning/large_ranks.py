"""Note a rank that modules cannot have."""

from collections.abc import Sequence

from adapterkit.core.tasks.common import FactorsTask


def note_large_rank(rank: int, tasks: Sequence[FactorsTask], why: str) -> list[str]:
    """A note if some modules get a smaller rank than was asked for, with the reason."""
    smaller = [task.max_rank for task in tasks if task.max_rank < rank]
    if not smaller:
        return []
    some = f"all {len(tasks)}" if len(smaller) == len(tasks) else f"{len(smaller)} of {len(tasks)}"
    return [
        f"--rank {rank} is too large for {some} modules: {max(smaller)} at most is written, {why}"
    ]
