"""SIGINT and SIGTERM: the first one stops the job and keeps finished shards, the second exits."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from adapterkit.cli.exits import error_status, fail
from adapterkit.errors import Interrupted

received: list[int] = []  # signal numbers, in order
own_process = False  # set by `cli.process`; elsewhere the handlers after the work are the caller's


def install() -> None:
    """Handle signals from here on."""
    set_handlers(_on_first_signal)


def ignore_after_work() -> None:
    """Ignore signals from here on, in a process of our own: a published output stays, and an
    exception raised while Python shuts down would end in an abort."""
    if own_process:
        set_handlers(signal.SIG_IGN)


def set_handlers(handler: Callable | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _on_first_signal(number: int, *_: Any) -> None:
    """Raise `KeyboardInterrupt`; during an import, where it would abort inside torch, exit."""
    received.append(number)
    set_handlers(_exit_immediately)
    if _importing():
        fail(
            Interrupted(
                "stopped while libraries were loaded", hint="run the same command with --resume"
            ),
            error_status(click.get_current_context(silent=True)),
        )
    raise KeyboardInterrupt


def _exit_immediately(*_: Any) -> None:
    """Second SIGINT or SIGTERM: exit without waiting for worker threads."""
    os.write(2, b"Error: stopped at once\n  hint: run the same command with --resume\n")
    os._exit(error_status(click.get_current_context(silent=True)))


def _importing() -> bool:
    """Whether a module is being imported."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
