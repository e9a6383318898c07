"""Exit statuses of errors, and the way out with one."""

import os
import shlex
import sys
from typing import NoReturn

import click

from adapterkit.errors import AdapterkitError, Interrupted

# Elsewhere an error is 1; of diff, as of diff(1), 1 is an answer
ERROR_STATUS = {"diff": 2}
WAITING = 3  # of run: other ranks have still to make what its files need


def error_status(ctx: click.Context | None) -> int:
    """The exit status of an error in the command that runs."""
    command = ctx.find_root().invoked_subcommand if ctx else None
    return ERROR_STATUS.get(command or "", 1)


def stopped(ctx: click.Context | None, problem: str = "stopped") -> Interrupted:
    """What a command says that was interrupted, whether or not its work had begun."""
    command = None
    if ctx is not None and isinstance(group := (root := ctx.find_root()).command, click.Group):
        command = group.get_command(root, root.invoked_subcommand or "")
    options = {option.name for option in command.params} if command else set()
    is_plan = any(word.partition("=")[0] == "--plan" for word in sys.argv)  # has no --resume
    how = "with --resume" if "resume" in options and not is_plan else "again"
    return Interrupted(problem, hint=f"run the same command {how}")


def fail(error: AdapterkitError, status: int) -> NoReturn:
    """Print an error, with the command that resumes where there is one, and exit."""
    text = f"Error: {error}"
    if isinstance(error, Interrupted) and "--resume" in error.hint:
        words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
        text += f"\n  adapterkit {shlex.join(words)} --resume"
    click.echo(text, err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread may still wait for the disk; there is nothing left for it to do
    os._exit(status)
