"""report: compute the numbers of its document."""

import json
import math
import ntpath
import os
import re
from collections.abc import Sequence
from statistics import fmean, median

from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.inputs.sources import if_given, open_model, open_source
from adapterkit.core.inputs.weights_file import Weight, WeightsFile, weighted_sources
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import StrPath, unweighted, weighted
from adapterkit.core.receipt import find_receipt, read_receipt
from adapterkit.core.records import Json
from adapterkit.kernels.lowrank import algebra
from adapterkit.verbs.look.adapter import inspect_adapter
from adapterkit.verbs.look.factors import finite
from adapterkit.verbs.look.heatmaps import NUMBER, grid_of, heatmaps_of, module_label, place_of
from adapterkit.verbs.look.overview.advice import advise, loading
from adapterkit.verbs.look.overview.scores import read_scores
from adapterkit.verbs.look.overview.spaces import adapter_of, compare_adapters, distinct
from adapterkit.verbs.look.records.report import Report

VERSION = 1
QUANTILES = (0.1, 0.5, 0.9)
WORST = 20  # tensors that are listed
METRICS = ("delta", "survived", "rounding", "requantization", "changed", "error", "energy")
WORST_HIGH = ("error", "rounding")  # of which the largest value is the worst
WORST_BY = ("survived", "energy", *WORST_HIGH)  # the first that there is
FIT = ("files", "losses", "steps", "written", "seconds")  # keys of a fit's document


def document_of(report: Report) -> Json:
    """The numbers of a report."""
    base = if_given(open_model, report.base)
    sources, weights = _sources(report)
    folders = [adapter_of(source, base) for source in sources]
    spectra: list[dict[str, Tensor]] = [{} for _ in folders]
    inspected = [
        inspect_adapter(folder, base, True, report.progress, its)
        for folder, its in zip(folders, spectra, strict=True)
    ]
    names = distinct([one["name"] for one in inspected])
    parts = list(zip(names, inspected, spectra, strict=True))
    document: Json = {
        "report": VERSION,
        "base": None if base is None else base.name,
        "adapters": [_adapter(*part) for part in parts],
        "heatmaps": heatmaps_of({name: one for name, one, _ in parts}),
        "spectra": [one for part in parts for one in _spectra(*part)],
        "ranks": [{"adapter": name, "rows": _ranks(one, its)} for name, one, its in parts],
        "pairs": compare_adapters(folders, report.stats) if len(folders) > 1 else None,
        "weights": None if weights is None else weights_document(weights, names),
        "outcome": _outcome(report.result) if report.result is not None else None,
        "scores": read_scores(report.scores) if report.scores is not None else None,
    }
    return document | _commands(document, sources, report.base or "BASE")


def _commands(document: Json, sources: Sequence[StrPath], base: StrPath) -> Json:
    return {"advice": advise(document, sources, base), "loading": loading(document, sources[0])}


def for_others(document: Json, report: Report) -> Json:
    """The document without absolute paths, because these reveal the machine."""
    given = [os.fspath(one) for one in (*_sources(report)[0], report.base or "BASE")]
    text = json.dumps(document)
    for one in (*given, *map(os.path.normpath, given)):  # problems have either
        label, name = (json.dumps(shown(each))[1:-1] for each in (one, _name(one)))
        text = text.replace(label, name)
    *sources, base = map(_name, given)
    document = json.loads(text)
    document |= _commands(document, sources, base)
    for one in document["adapters"]:
        one["base"] = one["base"] and _name(str(one["base"]))
    if scores := document["scores"]:
        plain = lambda text: " + ".join(map(_name, text.split(" + ")))
        scores["against"] = scores["against"] and plain(scores["against"])
        scores["rows"] = [row | {"model": plain(row["model"])} for row in scores["rows"]]
    return document


def _name(path: str) -> str:
    """The path, or the last component of an absolute one, of any operating system."""
    return ntpath.basename(ntpath.normpath(path)) if re.match(r"[\\/]|\w:", path) else path


def _sources(report: Report) -> tuple[list[StrPath], WeightsFile | None]:
    """The adapters, and the file of weights if there is one, which then names them; `Refused` for
    others."""
    if report.weights is None:
        return unweighted(report.adapters), None
    sources, weights = weighted_sources(report.adapters, report.weights)
    return [source for source, _ in weighted(sources)], weights


def _adapter(name: str, one: Json, spectra: dict[str, Tensor]) -> Json:
    modules = one["modules"]
    norms = [module["norm"] for module in modules if module["norm"] is not None]
    relative = [module["relative"] for module in modules if module["relative"] is not None]
    used = [s for s in spectra.values() if bool(s.any())]
    only = lambda key: values.pop() if len(values := {m[key] for m in modules}) == 1 else None
    known = ("format", "peft_type", "base", "bytes", "flags")
    return {
        "name": name,
        **{key: one[key] for key in known},
        "problems": one["problems"] + _idle(modules),
        **{key: only(key) for key in ("rank", "alpha", "scale")},
        "modules": len(modules),
        "norm": finite(math.hypot(*norms)) if norms else None,
        "relative": median(relative) if relative else None,
        "stable_rank": median(float((s / s.max()).square().sum()) for s in used) if used else None,
        **{
            f"rank_{share}": max(algebra.rank_for_energy(s, share / 100) for s in used)
            if used
            else None
            for share in (90, 99)
        },
    }


def _idle(modules: Sequence[Json]) -> list[Json]:
    """The problem of modules without effect while others have one, which `inspect` accepts as
    saved."""
    idle = [module_label(module) for module in modules if module["norm"] == 0]
    if not idle or len(idle) == len(modules):
        return []
    found = f"the deltas of {len(idle)} of {len(modules)} modules are zero: {listed(idle)}"
    hint = "check that training reached these modules"
    return [Refused(found, expected="deltas that change the model", hint=hint, code="AK202").row()]


def _spectra(name: str, one: Json, spectra: dict[str, Tensor]) -> list[Json]:
    """The singular values of each kind of module, from small to large over its modules."""
    kinds: dict[str, list[Tensor]] = {}
    for label, values in spectra.items():
        kind = NUMBER.sub("", f".{place_of(label)[1]}").lstrip(".")
        kinds.setdefault(kind, []).append(values)
    found = []
    for kind, lines in kinds.items():
        width = min(map(len, lines))
        table = torch.stack([line[:width] for line in lines])
        low, middle, high = (table.quantile(share, dim=0).tolist() for share in QUANTILES)
        found.append(
            {"adapter": name, "modules": kind, "count": len(lines), "median": middle}
            | {"low": low, "high": high}
        )
    return found


def _ranks(one: Json, spectra: dict[str, Tensor]) -> list[Json]:
    """The kept energy at ranks of 1, 2, 4, ... and the size of the file: the bytes of factors by
    their rank."""
    largest = max(map(len, spectra.values()), default=0)
    size = math.hypot(*(float(s.norm()) for s in spectra.values()))
    if not size:
        return []
    counts = {module_label(m): (m["rank"] or 0, m["experts"] or 1) for m in one["modules"]}
    stored = sum(rank * experts for rank, experts in counts.values())
    ranks = [2**n for n in range(largest.bit_length()) if 2**n < largest] + [largest]
    rows = []
    for rank in ranks:
        kept = sum(float((s[:rank] / size).square().sum()) for s in spectra.values())
        left = sum(min(rank, own) * experts for own, experts in counts.values())
        rows.append(
            {"rank": rank, "energy": min(kept, 1.0), "bytes": one["bytes"] * left // stored}
        )
    return rows


def _outcome(source: StrPath) -> Json:
    folder = open_source(source)
    if find_receipt(folder) is None:
        raise Refused(
            "no receipt",
            expected="an output of adapterkit",
            where=folder.label,
            hint="give the output of a command, or omit --result",
            code="AK608",
        )
    return outcome_of(read_receipt(folder))


def outcome_of(receipt: Json) -> Json:
    """A receipt's verb, inputs and totals, metrics by layer and module, and the tensors that lost
    most."""
    tensors = receipt["parameters"]
    used = [name for name in METRICS if any(name in metrics for metrics in tensors.values())]
    worst_by = next((name for name in WORST_BY if name in used), None)
    ranked = sorted(
        ((name, metrics) for name, metrics in tensors.items() if worst_by in metrics),
        key=lambda pair: pair[1][worst_by],
        reverse=worst_by in WORST_HIGH,
    )
    by_label = {name.removesuffix(".weight"): metrics for name, metrics in tensors.items()}
    places, rows, columns = grid_of(by_label)
    at = {place: by_label[label] for label, place in places.items()}
    return {
        "verb": receipt["recipe"]["verb"],
        "options": receipt["recipe"]["options"],
        "inputs": receipt["recipe"]["inputs"],
        "fingerprint": receipt["fingerprint"],
        "totals": receipt["totals"],
        "seconds": receipt["timings"]["seconds"],
        "warnings": receipt.get("warnings", []),
        "notes": receipt["notes"],
        "choices": receipt.get("choices"),
        "rows": rows,
        "columns": columns,
        "metrics": {
            name: [[at.get((r, c), {}).get(name) for c in columns] for r in rows] for name in used
        },
        "worst": [{"name": name} | {m: metrics.get(m) for m in used} for name, metrics in ranked][
            :WORST
        ],
    }


def weights_document(weights: WeightsFile, names: Sequence[str]) -> Json:
    """Weights by layer and module, for directions their mean; and losses, if a fit wrote them."""
    places, rows, columns = grid_of(weights.modules)
    at = {place: weights.modules[name] for name, place in places.items()}
    cell = lambda place, number: _mean(at[place][number]) if place in at else None
    tables = [
        {"adapter": name, "values": [[cell((r, c), number) for c in columns] for r in rows]}
        for number, name in enumerate(names)
    ]
    known = {key: value for key, value in (weights.fit or {}).items() if key in FIT}
    return {
        "per": weights.per,
        "default": list(weights.default),
        "rows": rows,
        "columns": columns,
        "tables": tables,
        "fit": known or None,
    }


def _mean(weight: Weight) -> float:
    return fmean(weight or (0.0,)) if isinstance(weight, tuple) else weight
