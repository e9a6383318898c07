"""Sums of adapters of one changed base (`core/merge/initial_factors.py`), as an adapter."""

import math
from collections.abc import Collection, Mapping, Sequence

from adapterkit.core.adapter.config import CHANGED
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.commands import WITHOUT_INITIAL
from adapterkit.core.errors import Problems, listed
from adapterkit.core.merge.initial_factors import by_change, wrong_sums
from adapterkit.core.merge.sites import JoinedSite
from adapterkit.core.records import Json
from adapterkit.verbs.combine.methods.common import WeightedSum
from adapterkit.verbs.combine.tasks.combine import CombinedFactors


def check_sum(
    adapters: Sequence[Adapter],
    joined: Mapping[str, JoinedSite],
    tasks: Mapping[str, CombinedFactors],
    other: str,
    errors: Problems,
) -> Json:
    """Return the setting that marks the sum of these adapters; refuse a sum without the initial
    factors, or with several times these. `tasks`: by the names of their sites; `other`: how the
    adapters are combined, if not by a sum of their deltas."""
    groups = by_change(adapters)
    change, members = next(iter(groups.items()))
    where, numbers = members[0].where, {one.number for one in members}
    refusals = Problems(where=where, hint=WITHOUT_INITIAL, code="AK304")
    if len(groups) > 1:
        refusals.add(
            f"adapters of {len(groups)} changed bases: {listed(list(groups))}", "adapters of one"
        )
    elif other:
        refusals.add(
            f"{other} with initial factors of {change} in {members[0].name}",
            "a sum in --space delta: nothing else restores these factors",
        )
    else:
        marked = (name for name, site in joined.items() if not numbers.isdisjoint(site.members))
        sums = {name: _share(tasks[name], numbers) for name in marked if name in tasks}
        refusals += wrong_sums(change, sums, where, WITHOUT_INITIAL)
    errors += refusals
    return {"revision": CHANGED + change}


def _share(task: CombinedFactors, numbers: Collection[int]) -> float:
    """The sum of the factors of these adapters' deltas."""
    assert isinstance(task.method, WeightedSum)
    shares = task.method.shares([one.weight for one in task.operands])
    own = [
        (one, share)
        for one, share in zip(task.operands, shares, strict=True)
        if one.number in numbers
    ]
    if any(one.factors.directions for one, _ in own):
        return math.nan  # each direction has its own
    return math.fsum(share for _, share in own)
