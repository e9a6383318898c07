"""Threads that compute, with their results in order; and two more: one creates files before they
are needed, one finishes those that are written."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from adapterkit.core.budget import AHEAD
from adapterkit.core.engine.interruptible import POLL_INTERVAL, Running, result_of, signals_deferred
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import Workspace
from adapterkit.core.output.writer import ShardFile

SHUTDOWN_TIMEOUT = 1.0  # seconds that an interrupted job gives its threads
BEHIND = 2  # computed files that may be unfinished: a killed job makes them again
T = TypeVar("T")
R = TypeVar("R")


class FileThreads:
    """The open files of a run, and the threads that create and finish them. All threads of the run
    are counted here: an error in one stops the others."""

    def __init__(self, stage: Workspace, finished: Callable[[ShardResult], None]):
        self.stage, self.finished = stage, finished
        self.stop = threading.Event()
        self.problem: BaseException | None = None
        self.running = Running(1)  # the caller, its threads, and the work in progress here
        self.open: list[ShardFile] = []
        self.ends: dict[str, Future[None]] = {}  # by file, in their order
        self.opener, self.finisher = (ThreadPoolExecutor(1, name) for name in ("open", "finish"))

    def fail(self, error: BaseException) -> None:
        self.problem = self.problem or error
        self.stop.set()

    def start(self, target: Callable[[], None]) -> None:
        """Run the target in a thread of its own."""
        counted = self._counted(target)

        def run() -> None:
            with suppress(BaseException):  # it is recorded
                counted()

        self._begin(lambda: threading.Thread(target=run, daemon=True).start())

    def ahead(self, make: Callable[[], T]) -> "Future[T]":
        """Make something slow before it is needed, such as the blocks of a file."""
        counted = self._counted(make)
        return self._begin(lambda: self.opener.submit(counted))

    def create(self, name: str, size: int) -> ShardFile:
        """Create a file of this size, open until it is finished."""
        file = ShardFile(self.stage.path, name, size, self.stage.attempt)
        self.open.append(file)
        return file

    def finish(self, name: str, file: ShardFile, end: Callable[[], ShardResult]) -> "Future[None]":
        """Finish a file in another thread: `end` does the rest, except fsync and the name."""
        counted = self._counted(lambda: self._finish(file, end))
        self.ends[name] = self._begin(lambda: self.finisher.submit(counted))
        return self.ends[name]

    def _finish(self, file: ShardFile, end: Callable[[], ShardResult]) -> None:
        if self.stop.is_set():
            return
        result = end()
        if self.stop.is_set():
            return
        file.sync()
        if self.stop.is_set():
            return  # a later run may be at work on that name already
        file.publish()
        self.open.remove(file)
        self.finished(result)

    def await_ends(self, names: Collection[str]) -> None:
        """Wait until these files are finished, and all files except the last few."""
        for number, (name, end) in enumerate(reversed(list(self.ends.items()))):
            if number >= BEHIND or name in names:
                result_of(end)

    def end(self) -> None:
        """Wait for all threads, and raise the first error. An interrupt does not wait long for the
        disk, because a later run makes the unfinished files again anyway."""
        with signals_deferred():
            self.running.finish()
        try:
            while not self.running.wait(POLL_INTERVAL) and not self.stop.is_set():
                pass
        except BaseException as error:
            self.fail(error)
        interrupted = isinstance(self.problem, KeyboardInterrupt)
        ended = self.running.wait(SHUTDOWN_TIMEOUT)
        while not ended and not interrupted:
            ended = self.running.wait(POLL_INTERVAL)
        with signals_deferred():
            self.opener.shutdown(wait=False)
            self.finisher.shutdown(wait=False)
        for file in self.open if ended else ():
            file.abandon()
        if self.problem is not None:
            raise self.problem

    def _counted(self, target: Callable[[], T]) -> Callable[[], T]:
        def run() -> T:
            try:
                return target()
            except BaseException as error:
                self.fail(error)
                raise
            finally:
                # this thread keeps no tensor: the process may end now, and a thread that frees one
                # then would crash
                self.running.finish()

        return run

    def _begin(self, start: Callable[[], T]) -> T:
        """Start something that is counted."""
        with signals_deferred():
            self.running.start()
            try:
                return start()
            except RuntimeError:  # the system allows no more threads
                self.running.finish()
                raise


@contextmanager
def file_threads(
    stage: Workspace, finished: Callable[[ShardResult], None]
) -> Iterator[FileThreads]:
    """Yield threads for the files of a run, and end them with the block; `finished` gets each
    result."""
    files = FileThreads(stage, finished)
    try:
        yield files
    except BaseException as error:
        files.fail(error)
    files.end()


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    budget: int = 0,
    cost: Callable[[T], int] = lambda item: 0,
    pool: ThreadPoolExecutor | None = None,
) -> Iterator[R]:
    """Yield function(item) for each item, in order, computed by `workers` threads. Items are
    computed ahead as long as the sum of their costs stays within the budget, the last result
    included until the next is requested. `pool`: existing threads to use."""
    source, waiting = iter(items), deque()
    ahead, in_use = next(source, None), 0
    threads = pool or ThreadPoolExecutor(workers, "compute")

    def submit() -> None:
        nonlocal ahead, in_use
        while (
            ahead is not None
            and len(waiting) < AHEAD * workers
            and (not in_use or in_use + cost(ahead) <= budget)
        ):
            with signals_deferred():
                waiting.append((threads.submit(function, ahead), cost(ahead)))
            in_use += cost(ahead)
            ahead = next(source, None)

    try:
        submit()
        while waiting:
            future, cost_of_result = waiting.popleft()
            result = result_of(future)
            del future
            submit()
            yield result
            del result  # before others start
            in_use -= cost_of_result
            submit()
    finally:
        with signals_deferred():
            for future, _ in waiting:
                future.cancel()
            if pool is None:
                threads.shutdown(wait=False)
