"""Argument types that the shell completes, and the command that prints the shell's script.

They check nothing, because a verb refuses a wrong value itself, from Python and the shell alike.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
)

from adapterkit.core.errors import AdapterkitError


class SourceType(click.ParamType):
    """A folder, a file, or a Hub id: paths complete."""

    name = "source"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Word(click.Choice):
    """One of these words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


class Number(click.ParamType):
    """A number, as the help names it: `integer` or `float`."""

    def __init__(self, name: str):
        self.name = name


class Name(click.ParamType):
    """One of `names()`, which only the help and completion call."""

    name = "name"

    def __init__(self, names: Callable[[], Iterable[str]]):
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names())}]"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


class Targets(click.ParamType):
    """Comma-separated suffixes of module names, read from the headers of a BASE on this machine."""

    name = "targets"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # click stops at the option that still lacks its value, before it assigns the arguments
        base = ctx.params.get("base") or next(iter(ctx.args), "")
        names = module_suffixes(base) if base and Path(base).exists() else []
        before, comma, last = incomplete.rpartition(",")
        names = names if comma or param.name != "targets" else ["all-linear", *names]
        used = before.split(",")
        return [
            CompletionItem(before + comma + name)
            for name in names
            if name.startswith(last) and name not in used
        ]


def module_suffixes(path: str) -> list[str]:
    """Last name components of modules with a matrix as weight, in a local checkpoint."""
    from adapterkit.core.checkpoint.folder import LocalFolder
    from adapterkit.core.checkpoint.spec import scan_checkpoint

    try:
        tensors = scan_checkpoint(LocalFolder(path)).tensors
    except (AdapterkitError, OSError):  # nothing to read: the verb will say why
        return []
    matrices = (k for k, t in tensors.items() if k.endswith(".weight") and len(t.shape) > 1)
    # the shell runs text in its line on the next Enter
    names = {key.split(".")[-2] for key in matrices}
    return sorted(name for name in names if re.fullmatch(r"[\w-]+", name, re.ASCII))


SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    It completes commands, options, paths, and the values of --method, --to and of options that take
    names of modules, for example --targets.

    \b
    Example:
      adapterkit completion bash > ~/.local/share/bash-completion/completions/adapterkit
      adapterkit completion zsh > ~/.zfunc/_adapterkit
      adapterkit completion fish > ~/.config/fish/completions/adapterkit.fish
    """
    command = click.get_current_context().find_root().command
    complete = SHELLS[shell](command, {}, "adapterkit", "_ADAPTERKIT_COMPLETE")
    # not its own `source`, which first asks the installed bash for its version
    click.echo(ShellComplete.source(complete))
