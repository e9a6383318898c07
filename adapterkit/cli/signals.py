"""SIGINT and SIGTERM: the first one stops the job and keeps finished shards, the second exits.

The first raises `KeyboardInterrupt` in whatever the main thread does. Where that is a finalizer, a
weak reference's callback or the end of a generator, Python drops the exception: it is raised again.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.exits import error_status, fail, stopped

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN = 0.001  # seconds until a dropped interrupt is raised again

received: list[int] = []  # signal numbers, in order
own_process = False  # set by `cli.process`; elsewhere the handlers after the work are the caller's


def exit_at_once() -> None:
    """Exit on signals from here on, until `install`."""
    set_handlers(_exit_at_once)


def install() -> None:
    """Handle signals from here on."""
    set_handlers(_on_first_signal)


def ignore_after_work() -> None:
    """Ignore signals from here on, in a process of our own: a published output stays, a message is
    printed whole, and an exception raised while Python shuts down would end in an abort."""
    if own_process:
        set_handlers(signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def set_handlers(handler: Callable | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _on_first_signal(number: int, *_: Any) -> None:
    received.append(number)
    set_handlers(_exit_at_once)
    sys.unraisablehook = _on_dropped
    _interrupt()


def _interrupt(*_: Any) -> None:
    """Raise `KeyboardInterrupt`; during an import, where it would abort inside torch, exit."""
    if _importing():
        context = click.get_current_context(silent=True)
        fail(stopped(context, "stopped while libraries were loaded"), error_status(context))
    raise KeyboardInterrupt


def _on_dropped(dropped: "UnraisableHookArgs") -> None:
    """An exception that Python drops: an interrupt is raised again by a timer, when the main thread
    is out of the code that it cannot leave."""
    if dropped.exc_type is KeyboardInterrupt:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    else:
        sys.__unraisablehook__(dropped)


def _exit_at_once(*_: Any) -> None:
    """Exit without waiting for worker threads."""
    context = click.get_current_context(silent=True)
    os.write(2, f"Error: stopped at once\n  hint: {stopped(context).hint}\n".encode())
    os._exit(error_status(context))


def _importing() -> bool:
    """Whether a module is being imported."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
