"""The verbs that write, by name: all that a plan file or a pipeline can call."""

import inspect
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from adapterkit import verbs
from adapterkit.engines.execution import WritingVerb
from adapterkit.engines.rank_finish import Finish
from adapterkit.engines.rank_job import Preparation
from adapterkit.engines.ranks import Rank
from adapterkit.statistics.ranks import StatisticsFinish, StatisticsPreparation, StatisticsRank


@dataclass(frozen=True)
class Executors:
    """What carries out a verb by plan file."""

    preparation: type[Preparation]
    rank: type[Rank]
    finish: type[Finish]


def executors_of(verb: str) -> Executors:
    """Those of a verb of this name."""
    if verb == "stats":
        return Executors(StatisticsPreparation, StatisticsRank, StatisticsFinish)
    return Executors(Preparation, Rank, Finish)


def writing_verbs() -> list[str]:
    """Their names."""
    return [name for name in _names() if writing_verb(name)]


def writing_verb(name: object) -> WritingVerb[..., Any] | None:
    """The verb of a name from a file; None where no verb that writes has it."""
    if name not in _names():  # before anything is imported
        return None
    verb = getattr(import_module(f"adapterkit.verbs.{name}"), str(name), None)
    return verb if verb is not None and "dry_run" in inspect.signature(verb).parameters else None


def _names() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(verbs.__path__)]
