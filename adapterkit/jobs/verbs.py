"""The verbs that write, by name: all that a plan file or a pipeline can call."""

from dataclasses import dataclass

from adapterkit.engines.ranks.finish import RankFinish
from adapterkit.engines.ranks.job_identity import Preparation
from adapterkit.engines.ranks.rank import Rank
from adapterkit.records import Check, unfit
from adapterkit.registry import members
from adapterkit.statistics.ranks import StatisticsFinish, StatisticsPreparation, StatisticsRank
from adapterkit.verb import WritingVerb


@dataclass(frozen=True)
class Executors:
    """What carries out a verb by plan file."""

    preparation: type[Preparation]
    rank: type[Rank]
    finish: type[RankFinish]


def executors_of(verb: WritingVerb) -> Executors:
    """Those of a verb."""
    if verb.name == "stats":
        return Executors(StatisticsPreparation, StatisticsRank, StatisticsFinish)
    return Executors(Preparation, Rank, RankFinish)


def writing_verbs() -> dict[str, type[WritingVerb]]:
    """Their records by name."""
    return {name: verb for name, verb in members("verbs").items() if issubclass(verb, WritingVerb)}


def _verb(name: object) -> type[WritingVerb]:
    known = writing_verbs()
    if not isinstance(name, str) or name not in known:
        expected = f"a verb that writes: {', '.join(known)}"
        raise unfit(name, expected, "use one of these", list(known))
    return known[name]


VERB = Check("a verb that writes", _verb)
