"""The help of commands that write: their own options, what all of them have, lists of methods."""

from collections.abc import Callable
from typing import Any

import click

# the parameters that say how a job runs, and not what it computes
RUNNING = (
    "dry_run plan as_json device memory engine ray_address disk_limit resume overwrite quiet hash"
).split()

Rows = list[tuple[str, str]]


class WritingCommand(click.Command):
    """A command whose help has its own options first, and those of running in a section behind."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        records = {one.name: record for one in options if (record := one.get_help_record(ctx))}
        running = [records.pop(name) for name in RUNNING if name in records]
        for title, rows in {"Options": [*records.values()], "Common options": running}.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class ListingCommand(WritingCommand):
    """A command whose help ends with `lists()`: title -> rows of a name and a text."""

    def __init__(self, *args: Any, lists: Callable[[], dict[str, Rows]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lists = lists

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in ((title, rows) for title, rows in self.lists().items() if rows):
            with formatter.section(title):
                formatter.write_dl(rows)
