"""Suggest one command to try next, with its reason in numbers, and show how programs load an
adapter."""

import os
import re
from collections.abc import Sequence

from adapterkit.adapters.formats.engines import engines
from adapterkit.adapters.formats.language import models_of
from adapterkit.core.commands import command
from adapterkit.core.options import StrPath, bytes_text
from adapterkit.core.records import Json

RUNS_OF_ONE_TASK = 0.8  # cosines above which deltas are taken for the same task's
SAFE = re.compile(r"[\w.-]+(/[\w.-]+)*")  # names that need no quotes in a shell or in Python
# docs/figures.md#what-statistics-gain-in-lossy-steps
TIES = "for example, for three languages at rank 8, ties lost 0.02 nats less than a sum"
LITTLE = 0.9  # kept shares of a delta; below them, the others cancel it


def advise(document: Json, sources: Sequence[StrPath], base: StrPath) -> Json:
    """{command, reason}, based only on the numbers in a report's document."""
    adapters = document["adapters"]
    broken = next((one for one in adapters if one["problems"]), None)
    if broken is not None:
        problem = broken["problems"][0]
        reason = f"{broken['name']}: {problem['problem']}; {problem['hint']}"
        return {"command": problem["command"], "reason": reason}
    if document["pairs"] is None:
        return _of_one(adapters[0], sources[0], base)
    return _of_several(document["pairs"], [one["name"] for one in adapters], sources)


def _of_one(adapter: Json, source: StrPath, base: StrPath) -> Json:
    needed, rank = adapter["rank_99"], adapter["rank"]
    if needed is not None and rank is not None and needed <= rank // 2:
        size = adapter["bytes"] * needed // rank
        reason = (
            f"rank {needed} of {rank} keeps 99 % of the squared norm of every module: about "
            f"{bytes_text(size)} instead of {bytes_text(adapter['bytes'])}"
        )
        text = command("adapterkit resize", source, energy=0.99, out="smaller")
    else:
        reason = "no problems were found, and the ranks are not larger than needed"
        text = command("adapterkit merge", base, source, out="merged", verify=True)
    return {"command": text, "reason": reason}


def _of_several(pairs: Json, names: Sequence[str], sources: Sequence[StrPath]) -> Json:
    """The advice for the adapters' cosines, and for the shares that a plain sum keeps."""
    table = pairs["cosines"]
    cosines = {(i, j): c for i, row in enumerate(table) for j, c in enumerate(row[:i]) if c}
    kept = [share for share in pairs["sum"]["retention"] if share is not None]
    if not cosines or not kept:
        reason = "the adapters change different modules, so a sum keeps each as it is"
        return _combine(sources, "linear", reason)
    nearest = max(cosines, key=lambda pair: cosines[pair])
    opposed = [pairs["opposed"][i][j] for i, j in cosines]
    if cosines[nearest] >= RUNS_OF_ONE_TASK:
        one, other = sorted(nearest)
        reason = (
            f"{names[one]} and {names[other]} make nearly the same change (cosine "
            f"{cosines[nearest]:.2f}), so a sum would count it twice; their mean counts it once"
        )
        return _combine([sources[one], sources[other]], "mean", reason)
    ends = dict.fromkeys(
        f"{round(c, 2) + 0.0:.2f}" for c in (min(cosines.values()), cosines[nearest])
    )
    signs = dict.fromkeys(f"{share:.0%}" for share in (min(opposed), max(opposed)))
    measured = (
        f"cosines of {' to '.join(ends)}, opposed signs in {' to '.join(signs)} of the elements, "
        f"and a plain sum keeps at least {min(kept):.0%} of each"
    )
    if min(kept) < LITTLE:
        reason = f"a sum weakens them, because they oppose each other: {measured}; {TIES}"
        return _combine(sources, "ties", reason, density=0.3)
    return _combine(sources, "linear", f"a sum keeps them: {measured}")


def _combine(sources: Sequence[StrPath], method: str, reason: str, **options: float) -> Json:
    text = command("adapterkit combine", *sources, method=method, **options, out="combined")
    return {"command": text, "reason": reason}


def loading(document: Json, source: StrPath) -> list[Json]:
    """Commands that load the first adapter in each program for such a model, after a conversion if
    the program reads another format."""
    adapter = document["adapters"][0]
    models = models_of(adapter["format"])
    base = adapter["base"] if SAFE.fullmatch(str(adapter["base"])) else "BASE"
    file, rank = os.fspath(source), adapter["rank"] or "RANK"
    return [
        {"engine": one.title, "command": one.loading(adapter["format"], file, base, rank)}
        for one in engines().values()
        if one.models == models
    ]
