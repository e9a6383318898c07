"""The verbs that write, by name: all that a plan file or a pipeline can call."""

from dataclasses import dataclass

from adapterkit.engines.ranks.finish import RankFinish
from adapterkit.engines.ranks.job_identity import Preparation
from adapterkit.engines.ranks.rank import Rank
from adapterkit.errors import Refused, did_you_mean
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


def writing_verb(name: object, problem: str, where: str) -> type[WritingVerb]:
    """The verb of a name from outside; `Refused` where no verb that writes has it."""
    known = writing_verbs()
    verb = known.get(name) if isinstance(name, str) else None
    if verb is None:
        raise Refused(
            problem,
            expected=f"one of {', '.join(known)}",
            where=where,
            hint=(did_you_mean([name], known) if isinstance(name, str) else "")
            or "use one of these",
        )
    return verb
