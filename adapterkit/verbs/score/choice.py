"""merge --choose: plan a merge in several ways, measure each on texts, and publish the best."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from adapterkit.core.calls import own_hints
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.sources import open_model
from adapterkit.core.merge.verb import WRITTEN_TYPES, Merge
from adapterkit.core.options import bytes_text, choice, files, texts
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt
from adapterkit.core.records import Json
from adapterkit.verbs.stats.data.records import SUFFIXES

ROUNDINGS, BASE16, TYPE = ("nearest", "stochastic", "compensated"), "base16", "touched-as="
WORDS = (*ROUNDINGS, BASE16, *(TYPE + name for name in WRITTEN_TYPES))
# sources of a merge that a single entry reads
READ_BY = {"stats": "compensated", "original": BASE16}


def entries(value: object) -> tuple[str, ...]:
    """The entries of --choose: a list of them, or one text with commas between."""
    words = [word for text in texts(value) for word in text.replace(" ", "").split(",")]
    errors = Problems()
    for word in words:
        with errors.collected():
            choice(WORDS).read(word)
    if len({*words}) < 2 and not errors:
        errors.add("one entry", "two or more, separated by commas", code="AK101")
    errors.raise_all()
    return tuple(dict.fromkeys(words))


@dataclass(frozen=True)
class Candidate:
    """One entry of --choose: the merge that it stands for, and its plan."""

    name: str
    call: Merge
    plan: Plan


@dataclass(frozen=True, kw_only=True, repr=False)
class Choice(Plan):
    """The plans of all candidates; as a plan, it is the first one's."""

    candidates: tuple[Candidate, ...] = ()


def plan_choice(merge: Merge) -> Choice:
    """The plans of a merge with each entry of --choose; `Refused` with the problems of all."""
    kind, errors = kind_of(open_model(merge.base)), Problems(where="options", code="AK102")
    if kind.noun == "pipeline" or kind.images is not None:
        errors.add("--choose with this base", "a model of texts, which is measured", "remove it")
        errors.raise_all()
    for source, entry in READ_BY.items():
        is_given = getattr(merge, source) is not None
        if is_given and entry not in merge.choose:
            problem = f"--{source} is given, and --choose has no {entry}"
            errors.add(problem, f"{entry} among its entries", f"remove --{source}, or add {entry}")
    if BASE16 in merge.choose and merge.original is None:
        problem, hint = f"--choose {BASE16} needs --original", "give the model that was quantized"
        errors.add(problem, "--original ORIGINAL", hint)
    for path in files(merge.data):
        if not Path(path).exists():
            errors.add("no such file", SUFFIXES, "check the path", where=shown(path), code="AK901")
    found, candidates = {entry: Problems() for entry in merge.choose}, []
    for entry, its in found.items():
        with its.collected():
            call = _call(merge, entry)
            candidates.append(Candidate(entry, call, call.plan()))
    of_all = set.intersection(*(set(map(str, its)) for its in found.values()))
    for entry, its in found.items():
        for error in its:
            if str(error) not in of_all:
                place = error.where.replace("options", "")
                error.where = "; ".join(filter(None, (f"--choose {entry}", place)))
            errors.append(error)
    errors.raise_all()
    first = candidates[0].plan
    written = (f"{one.name} ({bytes_text(_size(one.plan))})" for one in candidates)
    note = f"the figures are those of {candidates[0].name}; the run measures {', '.join(written)}"
    own = {field.name: getattr(first, field.name) for field in fields(Plan)}
    own["notes"] = (*first.notes, f"{note}, and writes the best")
    return Choice(**own, candidates=tuple(candidates))


def _call(merge: Merge, entry: str) -> Merge:
    """The merge that an entry stands for."""
    own = {name: getattr(merge, name) for name, of in READ_BY.items() if of == entry}
    return replace(
        merge,
        choose=(),
        data=(),
        rounding=entry if entry in ROUNDINGS else "nearest",
        changed_type=entry.removeprefix(TYPE) if entry.startswith(TYPE) else None,
        seed=merge.seed if entry == "stochastic" or merge.method else 0,
        **dict.fromkeys(READ_BY) | own,
    )


def _size(plan: Plan) -> int:
    return plan.totals()["bytes_written"]


def carry_out_best(merge: Merge, plan: Plan, push: bool) -> Receipt | Plan:
    """Measure the candidates of a plan, and carry out the one of least loss. Its receipt has
    `choices`: the document of `score` with the name of the one that was `written`."""
    from adapterkit.verbs.score.job import work_folder

    assert isinstance(plan, Choice)
    candidates = plan.candidates
    _check_output(candidates, push)
    out = None if is_on_hub(merge.out) else Path(merge.out)
    with own_hints(merge), work_folder(out, merge.resume) as (work, kept):
        document, note = _measured(merge, candidates, work, kept)
        best = next(one for one in candidates if one.name == document["written"])
        decisions = best.plan.decisions | {"choices": document}
        chosen = replace(best.plan, decisions=decisions, notes=(*best.plan.notes, note))
        return best.call.carry_out(chosen, push=push)


def _check_output(candidates: Sequence[Candidate], push: bool) -> None:
    """Refuse an output that is in the way before minutes of measuring: with --resume, if it is of
    none of the candidates."""
    errors = []
    for one in candidates:
        try:
            replace(one.call, dry_run=True).carry_out(one.plan, push=push)
            return
        except Refused as error:
            errors.append(error)
    raise errors[0]


def _measured(
    merge: Merge, candidates: Sequence[Candidate], work: Path, kept: Path | None
) -> tuple[Json, str]:
    """The losses of the candidates, and a note of the choice."""
    from adapterkit.verbs.score import job
    from adapterkit.verbs.score.options import SampleOptions
    from adapterkit.verbs.score.variants import planned

    began = time.monotonic()
    variants = [planned(one.plan.folders[0], one.plan, one.name) for one in candidates]
    options = SampleOptions(seed=merge.seed, device=merge.device, memory=merge.memory)
    samples = job.measured_texts(variants[0], files(merge.data), options, work)
    sums = job.measured(variants, samples, options, work, merge.progress, kept=kept)
    document = job.score_document(variants, sums, samples, False)
    rows = document["rows"]
    best = rows[0]["model"]
    noise = [row["model"] for row in rows[1:] if row["more"]["within_noise"]]
    note = f"{best}: the least loss of {len(rows)}, on {samples.about['tokens']:,} tokens"
    note += f"; {' and '.join(noise)} within noise" if noise else ""
    seconds = time.monotonic() - began
    document |= {"written": best, "seconds": round(seconds, 3)}
    # merge has no option of that name
    document["notes"] = [text.replace("--samples ", "") for text in samples.notes]
    return document, f"{note}; measured in {seconds:.1f} s"
