"""Handle SIGINT and SIGTERM: the first one stops the job and keeps finished shards, the second
exits. Exit statuses of errors.

The first raises `KeyboardInterrupt` in the main thread. In a finalizer, a weak reference's callback
or the end of a generator, Python drops the exception, so it is raised again.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
from typing import NoReturn

from adapterkit.core.commands import line
from adapterkit.core.errors import AdapterkitError, Interrupted
from adapterkit.core.system import system

# Elsewhere an error is 1; of diff, as of diff(1), 1 is an answer
ERROR_STATUS = {"diff": 2}
WRONG_USAGE = 2  # also click's
WAITING = 3  # of run: its files need others that workers have still to make


def error_status(ctx: click.Context | None) -> int:
    """The exit status of an error in the running command."""
    command = ctx.find_root().invoked_subcommand if ctx else None
    return ERROR_STATUS.get(command or "", 1)


def stopped(ctx: click.Context | None, problem: str = "stopped") -> Interrupted:
    """The error of an interrupted command, whether or not its work had started."""
    command = None
    if ctx is not None and isinstance(group := (root := ctx.find_root()).command, click.Group):
        command = group.get_command(root, root.invoked_subcommand or "")
    options = {option.name for option in command.params} if command else set()
    is_plan = any(word.partition("=")[0] == "--plan" for word in sys.argv)  # has no --resume
    how = "with --resume" if "resume" in options and not is_plan else "again"
    return Interrupted(problem, hint=f"run the same command {how}")


def fail(error: AdapterkitError, status: int) -> NoReturn:
    """Print an error, with the command that resumes if there is one, and exit."""
    text = f"Error: {error.text()}"
    if isinstance(error, Interrupted) and "--resume" in error.hint:
        words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
        text += "\n  " + line(["adapterkit", *words, "--resume"])
    click.echo(text, err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread may still wait for the disk; there is nothing left for it to do
    os._exit(status)


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
    """Ignore signals from here on, in a process of its own: a published output stays, a message is
    printed in full, and an exception during Python's shutdown would end in an abort."""
    if own_process:
        for number in system.signals:
            signal.signal(number, signal.SIG_IGN)


def set_handlers(handler: Callable | signal.Handlers) -> None:
    for number in system.ending:
        signal.signal(number, handler)


def _on_first_signal(number: int, *_: object) -> None:
    received.append(number)
    set_handlers(_exit_at_once)
    sys.unraisablehook = _on_dropped
    _interrupt()


def _interrupt(*_: object) -> None:
    """Raise `KeyboardInterrupt`, or exit during an import, because it would abort inside torch."""
    if _importing():
        context = click.get_current_context(silent=True)
        fail(stopped(context, "stopped while libraries were loaded"), error_status(context))
    raise KeyboardInterrupt


def _on_dropped(dropped: "UnraisableHookArgs") -> None:
    """Handle an exception that Python drops: a timer raises an interrupt again once the main thread
    has left the code that cannot raise it."""
    if dropped.exc_type is KeyboardInterrupt:
        system.call_soon(_interrupt, AGAIN)
    else:
        sys.__unraisablehook__(dropped)


def _exit_at_once(*_: object) -> None:
    """Exit without waiting for worker threads."""
    context = click.get_current_context(silent=True)
    os.write(2, f"Error: stopped at once\n  hint: {stopped(context).hint}\n".encode())
    os._exit(error_status(context))


def _importing() -> bool:
    """True during the import of a module."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
