"""fit: the plan, the steps, the file of weights and what is said of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterkit.adapters.weights_file import Weight, WeightsFile, write_weights
from adapterkit.checkpoint.system import quarter_of_memory
from adapterkit.errors import shown
from adapterkit.fitting.journal import Journal
from adapterkit.fitting.objective import Objective, TeacherObjective
from adapterkit.fitting.plan import FitPlan, planned
from adapterkit.fitting.runs import Runs
from adapterkit.fitting.score import search_weights
from adapterkit.fitting.staircase import Staircase
from adapterkit.options import weighted
from adapterkit.planning.inputs.sources import weight_of
from adapterkit.records import Json
from adapterkit.verbs.combine import Combine
from adapterkit.verbs.fit import LEVELS, WeightFit

if TYPE_CHECKING:
    from adapterkit.plan import Plan
    from adapterkit.receipt import Receipt

VERSION = 1
DIGITS = 6  # of a weight


def fit_weights(options: WeightFit) -> Json:
    """Fit weights and write them; what is said of them."""
    if options.score is not None:
        return search_weights(options)
    began, out = time.monotonic(), Path(options.out)
    with planned(options) as plan:
        document: Json = {"fit": VERSION, "out": str(out), "totals": plan.totals}
        document["notes"] = list(dict.fromkeys(plan.notes))
        if options.dry_run:
            return document
        with climbed(plan) as stairs:
            document |= outcome(stairs, options.per)
            document["notes"] += _alone(stairs, document["written"]["per"])
            document["seconds"] = round(time.monotonic() - began, 1)
            write_weights(weights_file(stairs, document), out)
    return document


@contextmanager
def climbed(plan: FitPlan) -> Iterator[Staircase]:
    """The steps of a fit, taken; its journal is kept where what follows fails."""
    options = plan.options
    journal = Journal.beside(Path(options.out), _job(plan), options.resume)
    make = TeacherObjective if options.target == "teacher" else Objective
    memory = int(options.memory or quarter_of_memory())
    step = lambda: options.progress(1)
    runs = Runs(
        plan.stored, plan.mixture, plan.units, make(plan.stored.model), plan.whole,
        journal.folder, memory, step,
    )  # fmt: skip
    stairs = Staircase(plan, runs, journal)
    with runs.ready():
        stairs.climb()
    yield stairs
    journal.close()


def combine_fitted(options: Combine) -> "Receipt | Plan":
    """Fit the weights of a combination beside its output, and combine with them."""
    out, same = Path(options.out), ("device", "memory", "resume", "overwrite", "progress")
    weights = out.with_name(f"{out.name}.weights.json")
    assert options.base is not None
    how = {name: getattr(options, name) for name in same}
    data = list(options.fit)
    fit_weights(WeightFit(options.base, options.adapters, data=data, out=weights, **how))
    adapters = [weight_of(one)[0] if w is None else one for one, w in weighted(options.adapters)]
    return replace(options, fit=(), adapters=adapters, weights=weights).run()


def _job(plan: FitPlan) -> Json:
    """What tells a fit from another."""
    given = plan.options.recipe()
    adapters = [dict(one.files) for one in plan.adapters]
    base = plan.base.fingerprint
    return {"options": given, "adapters": adapters, "base": base, "data": plan.data}


def outcome(stairs: Staircase, per: str) -> Json:
    """The table of losses, the steps up to a level, the spread of the weights of the last one that
    is kept, what is written and why."""
    plan, held, kept = stairs.plan, stairs.held, stairs.kept(per)
    c, steps = stairs.levels[kept], stairs.steps[: LEVELS.index(per) + 1]
    rows = [
        {"row": name, "files": held.by_file(losses).tolist(), "value": held.value(losses)}
        for name, losses in stairs.rows.items()
    ]
    spread = []
    owners = torch.tensor([owner[0] for owner in plan.mixture.owners])
    for number, label in enumerate(plan.labels):
        own = c[owners == number]
        low, high = own.aminmax()
        values = {"mean": own.mean(), "std": own.std(correction=0), "low": low, "high": high}
        spread.append({"adapter": label} | {k: float(v) for k, v in values.items()})
    last = next((step for step in reversed(steps) if step["kept"]), None)
    reason = "no step lowers the loss held out by more than its standard error"
    if last is not None:
        reason = (
            f"one weight for each {kept} lowers the loss held out by {last['gain']:.3g}, more than "
            f"its standard error of {last['error']:.3g}"
        )
    return {
        "files": plan.names,
        "passes": steps[-1]["passes"],
        "losses": rows,
        "steps": steps,
        "spread": spread,
        "written": {"per": kept, "reason": reason},
    }


def _alone(stairs: Staircase, kept: str) -> list[str]:
    """A note where the base, or one adapter, is as good on what is held out."""
    held, rows = stairs.held, stairs.rows
    names = ["base", *stairs.plan.labels]
    name = min(names, key=lambda one: held.value(rows[one]))
    value, other = held.value(rows[kept]), held.value(rows[name])
    if other - value > held.error(rows[name], rows[kept]):
        return []
    use = "none of these adapters helps here" if name == "base" else "it needs no other adapter"
    return [
        f"{shown(name)} alone is as good on what is held out, {other:.4g} to {value:.4g}: {use}"
    ]


def weights_file(stairs: Staircase, document: Json) -> WeightsFile:
    """The file of what `outcome` says is written, of rounded weights."""
    plan, kept = stairs.plan, document["written"]["per"]
    c, mixture, count = stairs.levels[kept], plan.mixture, len(plan.adapters)
    numbers = [float(f"{value:.{DIGITS}g}") for value in c.tolist()]
    owners = torch.tensor([owner[0] for owner in mixture.owners])
    means = [float(c[owners == number].mean()) for number in range(count)]
    default = tuple(float(f"{value:.{DIGITS}g}") for value in means)
    modules = {}
    per: Any = kept
    if kept == "start":
        per = min(plan.options.per, "module", key=LEVELS.index)
        per = per if plan.options.start == "stats" else "adapter"
    for place in mixture.places if per != "adapter" else ():
        at = place.first
        own: list[Weight] = list(default)
        for number, size in zip(place.members, place.counts(mixture.directions), strict=True):
            values = numbers[at : at + size]
            own[number] = tuple(values) if kept == "direction" else values[0]
            at += size
        modules[place.name] = tuple(own)
    provenance = {key: document[key] for key in ("losses", "steps", "written", "seconds")}
    provenance |= {"options": plan.options.recipe(), "data": plan.data}
    return WeightsFile(tuple(plan.adapters), default, modules, per, plan.base, provenance)
