"""Waits of the main thread that Ctrl-C ends at once and safely.

A signal's handler raises KeyboardInterrupt wherever the main thread is. Inside the Python code of
`threading` and `concurrent.futures` that leaves a lock locked for ever, or ends in RuntimeError. So
signals are deferred while that code runs, and the main thread itself waits in a call that is
written in C."""

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
    """Defer SIGINT and SIGTERM until the end of the block; threads started in it never get them."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main one
        yield
        return
    # a mask is not enough: if another thread gets the signal, the handler still runs here
    pending: list[int] = []
    is_over = False
    handlers = {int(n): h for n in system.signals if callable(h := signal.getsignal(n))}

    def defer(number: int, frame: FrameType | None) -> None:
        if is_over:  # a handler's exception has ended the loop below
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
    """The number of running threads and tasks; the main thread can wait until there are none. All
    are counted before the first one starts, or by a running one, so the count reaches zero once."""

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
        """Wait for at most `seconds`, and return whether nothing runs any longer."""
        if self._count and self._none.acquire(timeout=seconds):
            self._none.release()
        return not self._count


def result_of(future: "Future[T]") -> T:
    """Return the future's result; an interrupt ends the wait."""
    done = threading.Lock()
    done.acquire()
    with signals_deferred():
        future.add_done_callback(lambda _: done.release())
    while not done.acquire(timeout=POLL_INTERVAL):
        pass
    with signals_deferred():
        return future.result()


def start_thread(target: Callable[[], None]) -> "Future[None]":
    """Run the target in a thread that does not delay the end of the process; return its future."""
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
    """Run the target in a thread. Its argument returns whether the waiting caller has given up, so
    that an interrupt does not wait for the network."""
    stop = threading.Event()
    try:
        result_of(start_thread(lambda: target(stop.is_set)))
    finally:
        stop.set()
