"""Programs that run models with adapters: the formats each one loads, and the adapter's card."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from adapterkit import __version__
from adapterkit.adapters.formats.tables import read_files
from adapterkit.core import records
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.hub_ids import portable_name
from adapterkit.core.commands import command, filled
from adapterkit.core.errors import Damaged
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.outputs.cards import HUB_ID, based_on, card, hub_id_or_name, plain
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from adapterkit.adapters.formats.schema import Format


@dataclass(frozen=True)
class RankLimit:
    """The largest rank that a server accepts."""

    most: int = 0  # by default; 0: not limited by a number
    flag: str = ""  # which raises it
    values: tuple[int, ...] = ()  # that the flag takes; none: any

    @property
    def name(self) -> str:
        """The flag as a setting."""
        return self.flag.removeprefix("--")

    def at_least(self, rank: int) -> int | None:
        """The smallest value of the flag for a rank; None if none is large enough."""
        return min(
            (one for one in self.values if one >= rank), default=None if self.values else rank
        )


@dataclass(frozen=True)
class ModuleRule:
    """A client's treatment of some modules."""

    verdict: Literal["drops", "refuses", "renames"]  # the last: factors of LoRA, no finding
    modules: re.Pattern[str]
    why: str
    do: str
    of: tuple[str, ...] = ()  # architectures, or model types of bases; none: all
    unless: str = ""  # the server's setting that lifts the rule


@dataclass(frozen=True)
class ServingRules:
    """A server's settings for adapters."""

    targets: str = ""  # the setting that names the modules on which adapters act
    all: str = ""  # its word for all modules
    verdict: Literal["drops", "refuses"] = "drops"  # on the other modules
    fused: tuple[tuple[str, ...], ...] = ()  # modules that the server joins; one stands for all
    experts: str = ""  # its word for all modules of experts; none: their own names
    others: tuple[str, ...] = ()  # settings that change nothing of what is loaded


@dataclass(frozen=True)
class Client:
    """A program that loads adapters."""

    name: str
    title: str
    models: Literal["language", "image"]
    format: str  # written for it
    load: str  # the code that loads {file} onto {base}
    version: str  # verified in the sources of this version
    sources: tuple[str, ...]
    inside: str = ""  # the name of that file in a converted folder; none: the folder
    rank: RankLimit = RankLimit()
    rules: tuple[ModuleRule, ...] = ()
    serving: ServingRules = ServingRules()
    one_scale: bool = False  # of PEFT's settings it reads r and lora_alpha, and no others
    like: str = ""  # another client whose rules also apply

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of all its settings for adapters."""
        own = {self.rank.name, self.serving.targets, *(rule.unless for rule in self.rules)}
        return tuple(sorted({*own, *self.serving.others} - {""}))

    def reads(self, format: "Format") -> bool:
        """True if it reads files of a format unchanged."""
        return format.name == self.format or self.title in format.clients

    def loading(self, format: str, file: str, base: str, rank: object = "RANK") -> str:
        """The command or call that loads an adapter onto a base, perhaps after a conversion."""
        if format == self.format:
            return filled(self.load, file=file, base=base, rank=rank)
        folder = f"for-{self.name}"
        convert = command("adapterkit convert", file, to=self.format, out=folder)
        made = f"{folder}/{self.inside}" if self.inside else folder
        return f"{convert}\n{filled(self.load, file=made, base=base, rank=rank)}"


@cache
def engines() -> Mapping[str, Client]:
    """All clients by name."""
    known = read_files(_client, "engines")
    more = {name: known[one.like].rules for name, one in known.items() if one.like}
    return {
        name: replace(one, rules=(*one.rules, *more.get(name, ()))) for name, one in known.items()
    }


def _client(name: str, table: Json) -> Client:
    words, where = {"name": name, **table}, f"engines/{name}.toml"
    return records.read(Client, words, where, hint="fix the file", kind=Damaged)


def adapter_card(
    base: str | None, adapters: Sequence[Adapter], summary: str, receipt: str = RECEIPT
) -> str:
    """The card of an adapter for the base with that id, made from these adapters. `receipt` is its
    path, or ""."""
    id = portable_name(base or "")
    metadata = [*based_on([id], "adapter"), "library_name: peft"]
    how = " from the files" if receipt else ""
    body = [f"Made by adapterkit {__version__}{how}: {plain(summary)}.", ""]
    body += ["From:", ""] if adapters else []
    body += [f"- {plain(hub_id_or_name(adapter.folder))}" for adapter in adapters]
    line = f"The changes of each module, and the hash of every file, are in `{receipt}`."
    body += ["", line, ""] if receipt else []
    body += ["To load it, replace `ADAPTER` with its folder or id:", ""]
    id = id if HUB_ID.fullmatch(id) else "BASE"
    for client in (one for one in engines().values() if one.models == "language"):
        body += [f"{client.title}:", "```", client.loading("peft", "ADAPTER", id), "```"]
    return card(metadata, ["lora", "adapterkit"], "Adapter", body)
