"""The help of commands that write: their own options, what all of them have, lists of methods."""

from collections.abc import Callable
from typing import Any

import click

from adapterkit.cli.methods import Rows
from adapterkit.cli.parameters import RUNNING


class WritingCommand(click.Command):
    """A command whose help has its own options first, those of running in a section behind, and at
    its end `lists()`: title -> rows of a name and a text."""

    def __init__(
        self, *args: Any, lists: Callable[[], dict[str, Rows]] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.lists = lists or dict

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        records = {one.name: record for one in options if (record := one.get_help_record(ctx))}
        running = [records.pop(name) for name in [*records] if name in RUNNING]
        for title, rows in {"Options": [*records.values()], "Common options": running}.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in ((title, rows) for title, rows in self.lists().items() if rows):
            with formatter.section(title):
                formatter.write_dl(rows)
