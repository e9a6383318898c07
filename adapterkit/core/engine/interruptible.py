"""Waits of the main thread that Ctrl-C ends at once and leaves whole.

A signal's handler raises KeyboardInterrupt wherever the main thread is. Inside the Python code of
`threading` and `concurrent.futures` that leaves a lock held for ever, or ends in RuntimeError. So
signals wait while that code runs, and the main thread itself waits in a call that is written in C.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from adapterkit.core.system import system

POLL_INTERVAL = 0.1  # seconds between looks at the stop sign
T = TypeVar("T")


@contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block; threads started in it never get them."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main one
        yield
        return
    # a mask is not enough: another thread may get the signal, and the handler runs here then
    pending: list[int] = []
    is_over = False
    handlers = {int(n): h for n in system.signals if callable(h := signal.getsignal(n))}

    def defer(number: int, frame: FrameType | None) -> None:
        if is_over:  # what a handler raised has ended the loop below
            handlers[number](number, frame)
        else:
            pending.append(number)

    try:
        for number in handlers:
            signal.signal(number, defer)
        with system.blocked():
            yield
    finally:
        is_over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in pending:
            handlers[number](number, None)


class Running:
    """How many threads and tasks still run; the main thread waits for none.

    All are counted before the first one starts, or by one that runs: the count reaches zero once.
    """

    def __init__(self, count: int):
        self._lock, self._none, self._count = threading.Lock(), threading.Lock(), count
        self._none.acquire()  # released by the last one

    def start(self) -> None:
        with self._lock:
            self._count += 1

    def finish(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._none.release()

    def wait(self, seconds: float) -> bool:
        """Whether nothing runs any more, after that many seconds at most."""
        if self._count and self._none.acquire(timeout=seconds):
            self._none.release()
        return not self._count


def result_of(future: "Future[T]") -> T:
    """The future's result; the wait ends with an interrupt."""
    done = threading.Lock()
    done.acquire()
    with signals_deferred():
        future.add_done_callback(lambda _: done.release())
    while not done.acquire(timeout=POLL_INTERVAL):
        pass
    with signals_deferred():
        return future.result()


def start_thread(target: Callable[[], None]) -> "Future[None]":
    """Run in a thread that no exit of the process waits for; what came of it."""
    future = Future[None]()

    def run() -> None:
        try:
            target()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    with signals_deferred():
        threading.Thread(target=run, daemon=True).start()
    return future


def run_stoppable(target: Callable[[Callable[[], bool]], None]) -> None:
    """Run in a thread, which learns from its argument whether who waits for it has given up: an
    interrupt does not wait for the network."""
    stop = threading.Event()
    try:
        result_of(start_thread(lambda: target(stop.is_set)))
    finally:
        stop.set()
