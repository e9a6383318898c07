"""The group of all commands, which turns errors into messages and exit statuses, and the help of
commands that write."""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from textwrap import wrap
from typing import Any

import click

from adapterkit.cli import signals
from adapterkit.cli.signals import WRONG_USAGE, error_status, fail, stopped
from adapterkit.core.errors import AdapterkitError

Rows = list[tuple[str, str]]  # a name and a text


COMMON = "Common options"  # the section of what all commands that write have
ALL = "adapterkit.help_all"  # in a context: the help has the common options too


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


help_all_option = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show the common options too, and exit.",
)


class VerbCommand(click.Command):
    """The command of a verb. Its help has the `tier`, the options without a section, those of
    `sections` (parameter -> title), and `lists()`: title -> rows. If it `writes`, the common
    options are rows of --help-all, and one line at the end of --help names them."""

    def __init__(
        self,
        *args: Any,
        tier: str,
        sections: Mapping[str, str],
        lists: Callable[[], dict[str, Rows]],
        writes: bool,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.tier, self.sections, self.lists, self.writes = tier, sections, lists, writes

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help = super().get_params(ctx)
        return [*own, help, help_all_option] if self.writes else [*own, help]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """click names the first missing parameter; name all of them at once."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter:
            missing = self._missing(ctx, given)
            if len(missing) < 2:
                raise
            message = f"Missing parameters: {', '.join(missing)}."
            raise click.UsageError(message, ctx) from None

    def _missing(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The required parameters that these words lack, as the help spells them."""
        values, _, _ = self.make_parser(ctx).parse_args(args)
        return [
            max(one.opts, key=len) if isinstance(one, click.Option) else one.make_metavar(ctx)
            for one in self.params
            if one.required and values.get(str(one.name)) in (None, (), [])
        ]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(self.tier)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, Rows] = {title: [] for title in ("Options", *self.sections.values())}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx) if isinstance(one, click.Option) else None
            if record is not None:
                groups[self.sections.get(str(one.name), "Options")] += [record]
        if self.writes and ALL not in ctx.meta:
            del groups[COMMON]
        for title, rows in ((title, rows) for title, rows in groups.items() if rows):
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in ((title, rows) for title, rows in self.lists().items() if rows):
            with formatter.section(title):
                formatter.write_dl(rows)
        if self.writes and ALL not in ctx.meta:
            options = [one for one in self.params if self.sections.get(str(one.name)) == COMMON]
            names = ", ".join(max(one.opts, key=len) for one in options)
            text = f"{COMMON} (described by {ctx.command_path} --help-all): {names}."
            formatter.write_paragraph()
            for line in wrap(text, formatter.width, break_on_hyphens=False):
                formatter.write(f"{line}\n")


class Group(click.Group):
    """Commands in `sections` of the help: title -> names. `make` makes one on demand, because each
    costs start-up time."""

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[str]],
        make: Callable[[str], click.Command],
        summary: Callable[[str], str],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        del self.commands  # click's, which hides the one below
        self.sections, self.make, self.summary = sections, cache(make), summary
        self.names = [name for names in sections.values() for name in names]

    # click has a plain attribute
    @cached_property
    def commands(self) -> dict[str, click.Command]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All commands by name."""
        return {name: self.make(name) for name in self.names}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self.names

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.make(cmd_name) if cmd_name in self.names else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.names))
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.summary(name)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        """Turn an `AdapterkitError` into a message and `error_status`, or 2 if only the options are
        wrong, as for click's errors. Any other exception is a bug and keeps its traceback."""
        try:
            signals.install()
            result = super().invoke(ctx)
            signals.ignore_after_work()
            return result
        except AdapterkitError as error:
            signals.ignore_after_work()
            fail(error, WRONG_USAGE if error.is_usage else error_status(ctx))
        except KeyboardInterrupt:
            fail(stopped(ctx), error_status(ctx))
        except BrokenPipeError:
            os._exit(error_status(ctx))
        except click.NoSuchOption as error:
            signals.ignore_after_work()
            raise _nearest(error) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            signals.ignore_after_work()
            raise
        except Exception:  # a bug: its traceback is printed, with the status of an error
            # a library that was being imported swallowed the interrupt: it cannot be imported again
            if signals.received:
                fail(stopped(ctx), error_status(ctx))
            if error_status(ctx) == 1:  # Python's own status of a traceback
                raise
            traceback.print_exc()
            ctx.exit(error_status(ctx))


# former names that have few letters in common with the present ones
RENAMED = {
    "--balance": "--loss-over",
    "--base-copies": "--embedding-copies",
    "--base-model": "--base-id",
    "--base16": "--original",
    "--per": "--granularity",
    "--prefix-only": "--component",
    "--touched-as": "--changed-type",
}


def _nearest(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error with the present name of a former option. For others, keep only those of click's
    guesses that the name begins with, if there are any: for example --out for --output, although
    --compat has more letters in common."""
    old, new = error.option_name, RENAMED.get(error.option_name)
    params = error.ctx.command.params if error.ctx else []
    if any(new in param.opts for param in params):  # click drops names that are not alike
        message = f"No such option {old!r}. Did you mean {new!r}?"
        return click.NoSuchOption(old, message, ctx=error.ctx)
    near = [name for name in error.possibilities or () if old.startswith(name)]
    if not near:
        return error
    return click.NoSuchOption(old, possibilities=near, ctx=error.ctx)
