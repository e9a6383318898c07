"""A verb and its arguments, as data: what another process does again, or does a part of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.plan import Plan
from adapterkit.receipt import Receipt


@dataclass(frozen=True)
class Call:
    """A verb that writes, and its arguments by name, as its checks leave them."""

    verb: Callable[..., Any]
    arguments: Mapping[str, Any]

    def plan(self) -> Plan:
        """What the call would do; `Refused` where it would be refused."""
        return self.verb(**dict(self.arguments) | {"dry_run": True})

    def run(self, **others: Any) -> Receipt | Plan:
        """Carry it out, with other arguments in place of some."""
        return self.verb(**dict(self.arguments) | others)
