"""Initializations of an adapter: a method is a file with a frozen record, see `protocol.py`."""

from typing import TYPE_CHECKING, cast

from adapterkit.core.registry import create

if TYPE_CHECKING:
    from adapterkit.verbs.init.methods.protocol import Initialization


def created_init(name: str, settings: dict[str, object]) -> "Initialization":
    """The init of that name with these options; `Refused` for options that it does not have."""
    return cast("Initialization", create("inits", name, settings))
