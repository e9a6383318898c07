"""fit: run the steps, write the file of weights, and describe them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.execution import as_it_runs, execute
from adapterkit.core.errors import shown
from adapterkit.core.inputs.sources import weight_of
from adapterkit.core.inputs.weights_file import Weight, WeightsBase, WeightsFile
from adapterkit.core.options import Progress, weighted
from adapterkit.core.plan import Plan, TaskResult
from adapterkit.core.receipt import Receipt
from adapterkit.core.records import Json
from adapterkit.core.shared_options import RunOptions
from adapterkit.verbs.combine.records.combine import Combine
from adapterkit.verbs.fit.coarse_to_fine import CoarseToFineFit
from adapterkit.verbs.fit.collection import TASK, Evaluations, FittedWeights, WeightsCollection
from adapterkit.verbs.fit.objective import Objective, TeacherObjective
from adapterkit.verbs.fit.plan import FitCollection, dtype_of, plan_fit
from adapterkit.verbs.fit.runs import Runs, Step
from adapterkit.verbs.fit.score import plan_search
from adapterkit.verbs.fit.verb import LEVELS, WeightFit
from adapterkit.verbs.fit.weighted_adapters import WeightedModel
from adapterkit.verbs.stats.model.layers import OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel

VERSION = 1
# the fields of `RunOptions` that a fit has
OF_RUNNING = ("out", "dry_run", "device", "memory", "resume", "overwrite", "progress")
DIGITS = 6  # of a weight


def fit_weights(options: WeightFit) -> Json:
    """Fit weights and write them; return the fit's document."""
    how = RunOptions(**{name: getattr(options, name) for name in OF_RUNNING})
    plan = as_it_runs((plan_fit if options.score is None else plan_search)(options), how)
    plan = replace(plan, call=None)  # `rerun` does not call this verb
    return _document(plan, execute(plan, how), str(options.out))


def _document(plan: Plan, done: Receipt | Plan, out: str) -> Json:
    """The plan's numbers, and after a run the losses and weights."""
    (file,), document = plan.shards, {"fit": VERSION, "out": out}
    assert isinstance(file.collection, WeightsCollection)
    document |= file.collection.about | {"totals": file.collection.totals(plan.budget)}
    if not isinstance(done, Receipt):
        return document | {"notes": [*done.warnings, *done.notes]}
    notes = {"notes": [*done.data["notes"], *done.data["warnings"]]}
    return document | notes | done.data["parameters"][TASK]["fit"] | notes


def fitted(
    fit: FitCollection, plan: Plan, work: Path, device: torch.device, progress: Progress
) -> TaskResult:
    """The file of weights from a fit."""
    began = time.monotonic()
    with finished_fit(fit, plan, work, device, lambda: progress(1)) as search:
        document = outcome(search, fit.options.granularity)
        document["notes"] = _alone(search, document["written"]["per"])
        document["seconds"] = round(time.monotonic() - began, 1)
        return FittedWeights.result(weights_file(search, document), document)


@contextmanager
def finished_fit(
    fit: FitCollection, plan: Plan, work: Path, device: torch.device, step: Step
) -> Iterator[CoarseToFineFit]:
    """Yield the fit after all its steps, with the evaluations in that folder."""
    make = TeacherObjective if fit.options.target == "teacher" else Objective
    with Sources(plan.folders, plan.identities) as sources:
        stored = StoredModel(fit.base, sources, device, dtype=dtype_of(fit.options, device))
        weighted_model, units = (
            WeightedModel(stored.model, plan.folders[1:]),
            OffloadedLayers.of(stored),
        )
        whole = fit.options.whole_model or not units.has_layers
        runs = Runs(
            stored, weighted_model, units, make(stored.model), whole, work, plan.budget, step
        )
        search = CoarseToFineFit(fit, runs, Evaluations(work))
        with runs.ready():
            search.run_steps()
        yield search


def combine_fitted(options: Combine) -> Receipt | Plan:
    """Fit the weights of a combination, write them next to its output, and combine with them."""
    out, same = Path(options.out), ("device", "memory", "resume", "overwrite", "progress")
    weights = out.with_name(f"{out.name}.weights.json")
    assert options.base is not None
    how = {name: getattr(options, name) for name in same}
    data = list(options.fit)
    fit_weights(WeightFit(options.base, options.adapters, data=data, out=weights, **how))
    adapters = [weight_of(one)[0] if w is None else one for one, w in weighted(options.adapters)]
    return replace(options, fit=(), adapters=adapters, weights=weights).run()


def outcome(search: CoarseToFineFit, per: str) -> Json:
    """The table of losses, the steps up to a level, the spread of the weights of the last level
    kept, and the level that is written, with the reason."""
    fit, held, kept = search.fit, search.held, search.kept(per)
    c, steps = search.levels[kept], search.steps[: LEVELS.index(per) + 1]
    rows = [
        {"row": name, "files": held.by_file(losses).tolist(), "value": held.value(losses)}
        for name, losses in search.rows.items()
    ]
    spread = []
    owners = torch.tensor([owner[0] for owner in search.runs.weighted_model.owners])
    for number, label in enumerate(fit.labels):
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
        "files": fit.names,
        "passes": steps[-1]["passes"],
        "losses": rows,
        "steps": steps,
        "spread": spread,
        "written": {"per": kept, "reason": reason},
    }


def _alone(search: CoarseToFineFit, kept: str) -> list[str]:
    """A note if the base, or one adapter, is as good on held-out samples."""
    held, rows = search.held, search.rows
    names = ["base", *search.fit.labels]
    name = min(names, key=lambda one: held.value(rows[one]))
    value, other = held.value(rows[kept]), held.value(rows[name])
    if other - value > held.error(rows[name], rows[kept]):
        return []
    use = "none of these adapters helps here" if name == "base" else "it needs no other adapter"
    return [
        f"{shown(name)} alone is as good on held-out samples, {other:.4g} to {value:.4g}: {use}"
    ]


def weights_file(search: CoarseToFineFit, document: Json) -> WeightsFile:
    """The file of the level that `outcome` names, with rounded weights."""
    fit, kept = search.fit, document["written"]["per"]
    c, weighted_model, count = search.levels[kept], search.runs.weighted_model, len(fit.adapters)
    numbers = [float(f"{value:.{DIGITS}g}") for value in c.tolist()]
    owners = torch.tensor([owner[0] for owner in weighted_model.owners])
    means = [float(c[owners == number].mean()) for number in range(count)]
    default = tuple(float(f"{value:.{DIGITS}g}") for value in means)
    modules = {}
    per: Any = kept
    if kept == "start":
        per = min(fit.options.granularity, "module", key=LEVELS.index)
        per = per if fit.options.start == "stats" else "adapter"
    for place in weighted_model.places if per != "adapter" else ():
        at = place.first
        own: list[Weight] = list(default)
        for number, size in zip(
            place.members, place.counts(weighted_model.directions), strict=True
        ):
            values = numbers[at : at + size]
            own[number] = tuple(values) if kept == "direction" else values[0]
            at += size
        modules[place.name] = tuple(own)
    provenance = {key: document[key] for key in ("losses", "steps", "written", "seconds")}
    provenance |= {"options": fit.options.recipe(), "data": fit.data}
    base = WeightsBase(fit.base.folder.name, fit.fingerprint)
    return WeightsFile(tuple(fit.adapters), default, modules, per, base, provenance)
