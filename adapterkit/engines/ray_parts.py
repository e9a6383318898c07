"""Large files on a Ray cluster: parts that come in any order, joined by the driver as they come."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from adapterkit.checkpoint.shard_result import ShardResult
from adapterkit.engines.joined_file import JoinedFile
from adapterkit.engines.pieces import Part
from adapterkit.engines.rank_parts import file_of, metrics_of_parts
from adapterkit.engines.waiting import result_of, signals_deferred
from adapterkit.plan import Computed, Shard


def longest_first(units: Iterable[Shard | Computed]) -> list[Shard | Computed]:
    """Files and parts by their size, the parts of one file behind each other."""
    units = list(units)
    parts = Counter(file_of(unit) for unit in units)

    def key(unit: Shard | Computed) -> tuple[float, str, int]:
        start = unit.start if isinstance(unit, Part) else 0
        return -unit.layout.size / parts[file_of(unit)], file_of(unit), start

    return sorted(units, key=key)


class Joiner:
    """Joins files by one thread, beside the work on other parts. `finished` is called by `look`,
    with the result of each file that is whole."""

    def __init__(
        self,
        folder: Path,
        units: Iterable[Shard | Computed],
        attempt: str,
        *,
        hashed: bool,
        finished: Callable[[ShardResult], None],
    ):
        self.files: dict[str, _File] = {}
        for unit in units:
            if isinstance(unit, Part):
                if unit.layout.file not in self.files:
                    self.files[unit.layout.file] = _File(folder, unit, attempt, hashed=hashed)
                self.files[unit.layout.file].todo.append(unit)
        self.finished = finished
        self.pool = ThreadPoolExecutor(1, "join")
        self.running = deque[Future[ShardResult | None]]()

    def add(self, part: Part, result: ShardResult) -> None:
        """A part is there: it is copied once those before it are."""
        file = self.files[part.layout.file]
        file.results[part.start] = result
        while file.todo and file.todo[0].start in file.results:
            with signals_deferred():
                self.running.append(self.pool.submit(file.take, file.todo.popleft()))

    def look(self, *, wait: bool = False) -> None:
        """Hand on what is whole, with `wait` all. Raises the errors of the join."""
        while self.running and (wait or self.running[0].done()):
            result = result_of(self.running.popleft())
            if result is not None:
                self.finished(result)

    def close(self) -> None:
        """Join no more; the part that is being copied goes on, in an attempt of its own."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class _File:
    """One file; `todo`: parts that are not joined, in order; `results` by where a part starts."""

    def __init__(self, folder: Path, part: Part, attempt: str, *, hashed: bool):
        self.shard = Shard(part.layout, part.steps)
        self.whole = JoinedFile(folder, self.shard, attempt, hashed=hashed)
        self.todo = deque[Part]()
        self.results: dict[int, ShardResult] = {}

    def take(self, part: Part) -> ShardResult | None:
        """Append a part; the result of the file with the last one."""
        if part.start == 0:
            self.whole.begin(part.file)
            self.whole.read(part.stop)
        else:
            self.whole.append(part.file, part.start, part.stop)
            self.whole.drop(part.file)
        if part.stop < self.shard.size:
            return None
        tables = [self.results[start].metrics for start in sorted(self.results)]
        metrics = metrics_of_parts(self.shard, tables)
        self.whole.publish()
        return ShardResult(self.shard.file, self.shard.size, *self.whole.sums(), metrics)
