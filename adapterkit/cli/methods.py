"""Methods and formats, as the help lists them and the shell completes them: none is imported for it."""

from collections.abc import Callable
from typing import Any

import click

from adapterkit.cli.completion import Name
from adapterkit.registry import Declaration, declarations

Rows = list[tuple[str, str]]


class ListingCommand(click.Command):
    """A command whose help ends with `lists()`: title -> rows of a name and a text."""

    def __init__(self, *args: Any, lists: Callable[[], dict[str, Rows]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lists = lists

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in self.lists().items():
            with formatter.section(title):
                formatter.write_dl(rows)


def initializations() -> dict[str, Rows]:
    return {"Methods": [(name, one.summary) for name, one in declarations("inits").items()]}


def formats() -> dict[str, Rows]:
    """The formats that a quantization can write, codec by codec."""
    codecs = declarations("weights.codecs").values()
    rows = [(", ".join(written(codec)), codec.summary) for codec in codecs if written(codec)]
    return {"Formats": rows}


def written(codec: Declaration) -> tuple[str, ...]:
    return codec.constants.get("targets", ())


combine_names = Name(lambda: declarations("combinations"))
init_names = Name(lambda: declarations("inits"))
format_names = Name(
    lambda: dict.fromkeys(
        name for codec in declarations("weights.codecs").values() for name in written(codec)
    )
)
