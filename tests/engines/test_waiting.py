"""An interrupt leaves the main thread's waits whole."""

import _thread
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterkit.core.engine.interruptible import Running, result_of, signals_deferred
from adapterkit.core.system import system


@pytest.fixture(autouse=True)
def interrupts():
    """SIGINT and SIGALRM raise, as in a program of its own."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)
    }
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_for_the_end_of_the_block():
    reached = False
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        reached = True
    assert reached
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_that_another_thread_gets_waits_too():
    """Python's handler runs in the main thread, whatever that one blocks."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt), signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
            reached = True
    finally:
        stop.set()
    assert reached


def test_a_signal_between_the_block_and_what_follows(monkeypatch):
    """It raises while handlers are put back: those that are not yet back work all the same."""
    real, got = signal.signal, []
    before = real(signal.SIGTERM, lambda number, frame: got.append(number))

    def put_back(number, handler):
        real(number, handler)
        if number == signal.SIGINT and ended:
            _thread.interrupt_main(number)  # as one that another thread gets

    ended = False
    monkeypatch.setattr(signal, "signal", put_back)
    monkeypatch.setattr(system, "signals", (signal.SIGINT, signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt), signals_deferred():
            ended = True
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        real(signal.SIGTERM, before)


def test_threads_of_the_block_get_no_signals():
    masks = []
    with signals_deferred():
        thread = threading.Thread(
            target=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        )
        thread.start()
    thread.join()
    assert {signal.SIGINT, signal.SIGTERM} <= masks[0]


def test_an_interrupted_wait_can_be_repeated():
    running = Running(2)
    running.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        running.wait(20)
    assert time.monotonic() - began < 10
    assert not running.wait(0)
    for _ in range(3):
        running.finish()
    assert running.wait(0) and running.wait(0)


def test_the_wait_for_a_result_ends_with_an_interrupt():
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(release.wait, 20)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            result_of(future)
        release.set()
        assert result_of(future) is True


def test_a_result_or_its_error():
    with ThreadPoolExecutor(1) as pool:
        assert result_of(pool.submit(int, "7")) == 7
        with pytest.raises(ValueError):
            result_of(pool.submit(int, "seven"))
