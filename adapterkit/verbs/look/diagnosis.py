"""diagnose: check a model's files, values and tokenizer, and measure how much of each adapter it
contains."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import command
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import AdapterkitError, advice, listed, shown
from adapterkit.core.hints import with_paths
from adapterkit.core.inputs.base_door import kind_of, read_checkpoint
from adapterkit.core.inputs.earlier_merges import merged_adapters
from adapterkit.core.inputs.sources import open_adapter, open_model
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.options import Progress, expect, files, unweighted
from adapterkit.core.plan import Plan, Step
from adapterkit.core.records import Json
from adapterkit.core.tasks.rows import EditedTensor
from adapterkit.core.verify.row_checks import SampledRows
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels.sums import all_finite
from adapterkit.verbs.look.adapter import inspect_adapter
from adapterkit.verbs.look.checkpoint import inspect_base
from adapterkit.verbs.look.records.diagnose import Diagnose

VERSION = 1
MOST_TENSORS = 48  # with compared rows: of touched tensors, and of untouched ones
ROWS = 32  # of each
NEAR = 0.15  # relative error of a coefficient from rounding and noise
UNTOUCHED = 1e-2  # relative difference of weights above which they are not the base's, rounded
UNEXPLAINED = 0.3  # share of a change above which something else changed the model
SAMPLED = "least squares over sampled rows of the weights that they touch"
OTHERS = "another base, other adapters, training, or rounding to few bits changed them too"
AGAIN = (
    "merge it again, with a rounding that keeps small changes\n"
    "adapterkit merge BASE ADAPTER --rounding stochastic --out merged-again --verify"
)
Tensors = Mapping[str, TensorSpec]  # of a model, as its weights decode
ONE_FAULT = ("wrong_base", "other_changes")  # of which a model has one, with several signs
MERGED = "{} was merged {} times"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass
class _Findings:
    """The findings so far, in the order of the checks."""

    options: Diagnose
    rows: list[Json] = field(default_factory=list)

    def add(self, kind: str, problem: str, evidence: str, do: str, adapter: str = "") -> None:
        known = [row for row in self.rows if row["kind"] == kind and kind in ONE_FAULT]
        if known:  # another sign of the same fault
            known[0]["problem"] += f"; {problem}"
            known[0]["evidence"] += f"; {evidence}"
            return
        own = with_paths(do, self.options, adapter)
        self.rows.append({"kind": kind, "problem": problem, "evidence": evidence} | advice(own))

    def include(self, kind: str, problems: Sequence[Json]) -> None:
        """Add the problems that `inspect` finds."""
        for one in problems:
            hint = "\n".join(filter(None, (one["hint"], one["command"])))
            self.add(kind, one["problem"], one["where"], hint, one["where"])


@torch.inference_mode()
def diagnose_model(diagnose: Diagnose) -> Json:
    """The document of `diagnose` on a model."""
    folder, found = open_model(diagnose.model), _Findings(diagnose)
    base = None if diagnose.base is None else open_model(diagnose.base)
    found.include("headers", inspect_base(folder, headers=False)["problems"])
    model = read_checkpoint(folder)
    _values(model, found, diagnose.progress)
    _tokenizer(folder, base, found)
    _history(folder, found)
    document: Json = {"diagnose": VERSION, "coefficients": [], "unexplained": None}
    ours = _decoded(model, found)
    if ours is not None and base is not None:
        theirs = decoded_view(read_checkpoint(base, 1)).tensors
        adapters = [open_adapter(source, base) for source in unweighted(diagnose.adapters)]
        for adapter in adapters:
            found.include("adapter", inspect_adapter(adapter, None, True)["problems"])
        # of a quantized base into floats, which are compared
        options = MergeOptions(dequantize=bool(quantized_weights(theirs)))
        plans = [plan_merge(kind_of(base), [(one, 1.0)], options) for one in adapters]
        _untouched((model.folder, base), ours, theirs, plans, found)
        if plans:
            coefficients, unexplained = _projection(model.folder, ours, plans)
            document |= {"coefficients": coefficients, "unexplained": unexplained}
            _coefficients(coefficients, adapters, found)
            if unexplained > UNEXPLAINED and not quantized_weights(ours):
                problem = f"{unexplained:.0%} of the change is no multiple of the adapters' deltas"
                is_wrong = any(row["kind"] == "wrong_base" for row in found.rows)
                found.add("wrong_base" if is_wrong else "other_changes", problem, SAMPLED, OTHERS)
            if diagnose.data:
                _predictions(folder, base, adapters, found)
    return document | {"findings": found.rows}


def _predictions(model: Folder, base: Folder, adapters: Sequence[Folder], found: _Findings) -> None:
    """Report a loss that is not that of the base with the adapters."""
    from adapterkit.verbs.score.diagnosing import other_predictions

    options = found.options
    texts = files(options.data), options.samples, options.progress
    if finding := other_predictions(model, base, adapters, *texts):
        found.add("predictions", *finding, AGAIN)


def _values(model: Checkpoint, found: _Findings, progress: Progress) -> None:
    """Report values that are not finite."""
    floats = [spec for spec in model.tensors.values() if spec.dtype in dtypes.FLOATS]
    expect(progress, sum(spec.nbytes for spec in floats))
    bad = []
    with Sources((model.folder,), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=False)
        for spec in floats:
            blocks = reader.blocks(spec, (math.prod(spec.shape), 1))
            bad += [spec.key] * (not all(all_finite(block) for _, block in blocks))
            progress(spec.nbytes)
    if bad:
        do = "training diverged, or a merge overflowed its dtype: start from an earlier checkpoint"
        found.add("not_finite", f"NaN or infinity in {len(bad)} tensors", listed(bad), do)


def _decoded(model: Checkpoint, found: _Findings) -> Tensors | None:
    """The model's decoded weights; None if they contradict its config: floats under a config of
    quantization, or packed values without one."""
    try:
        return decoded_view(model).tensors
    except AdapterkitError as error:
        do = "restore the config of the weights: a loader quantizes, or reads, them twice or never"
        for one in getattr(error, "errors", (error,)):
            found.add("quantization", one.problem, one.where, do)
        return None


def _tokenizer(folder: Folder, base: Folder | None, found: _Findings) -> None:
    """Report a tokenizer of another model, or one whose tokens have no rows."""
    files, config = folder.files(), read_json(folder, "config.json")
    rows = _number(config, "vocab_size")
    if "tokenizer.json" in files and rows is not None:
        try:
            ids = _ids(read_json(folder, "tokenizer.json"))
        except AdapterkitError:
            ids = []
        beyond = [token for token, number in ids if number >= rows]
        if beyond:
            do = "resize the embeddings, or take the tokenizer of the model"
            evidence = f"vocab_size {rows}: {listed(beyond)}"
            found.add("tokenizer", f"{len(beyond)} tokens without a row", evidence, do)
    if base is None:
        return
    others = base.files()
    for name in TOKENIZER:
        if name in files and name in others:
            read = lambda one, name=name: one.read(name, 0, one.files()[name])
            if files[name] != others[name] or read(folder) != read(base):
                do = "use the base's tokenizer, unless the adapter was trained with this one"
                found.add("tokenizer", f"another {name} than the base's", folder.label, do)


def _number(config: Json, key: str) -> int | None:
    values = [config.get(key), *(v.get(key) for v in config.values() if isinstance(v, dict))]
    return next((value for value in values if type(value) is int), None)


def _ids(tokenizer: Json) -> list[tuple[str, int]]:
    """(token, its id) pairs of a tokenizer.json."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs = [*vocabulary.items()] if isinstance(vocabulary, dict) else []
    added = added if isinstance(added, list) else []
    pairs += [(t.get("content"), t.get("id")) for t in added if isinstance(t, dict)]
    return [(str(token), number) for token, number in pairs if type(number) is int]


def _history(folder: Folder, found: _Findings) -> None:
    given = unweighted(found.options.adapters)
    counts = Counter((one.name, one.sha256) for one in merged_adapters(folder) if one.weight > 0)
    for (name, _), count in counts.items():
        if count > 1:
            path = next((path for path in given if Path(path).name == name), name)
            do = f"unmerge it\n{command('adapterkit merge', 'MODEL', f'{path}=-1', out='unmerged')}"
            evidence = "the receipts of the model and its base"
            problem = MERGED.format(shown(name), count)
            found.add("history", problem, evidence, do)


def _edited(plan: Plan) -> dict[str, Step]:
    steps = [step for shard in plan.shards for step in shard.steps]
    tasks = (task for shard in plan.shards for task in shard.tasks)
    steps += [task.step for task in tasks if isinstance(task, EditedTensor)]
    return {step.key: step for step in steps if step.edits}


def _untouched(
    folders: tuple[Folder, Folder],
    ours: Tensors,
    theirs: Tensors,
    plans: Sequence[Plan],
    found: _Findings,
) -> None:
    """Report weights that no adapter touches and that differ from the base's by more than
    rounding."""
    touched = {key for plan in plans for key in _edited(plan)}
    shared = [key for key in theirs if key in ours and key not in touched]
    missing = [key for key in theirs if key not in ours and not key.endswith("lm_head.weight")]
    shapes = [key for key in shared if ours[key].shape != theirs[key].shape]
    do = "give the base that it was made of"
    if missing or shapes:
        problem = f"{len(missing)} weights of the base are missing, {len(shapes)} have other shapes"
        found.add("wrong_base", problem, listed(missing + shapes), do)
    if not plans:  # all may have been changed
        return
    is_matrix = lambda spec: spec.dtype in dtypes.FLOATS and len(spec.shape) > 0
    floats = [key for key in shared if key not in shapes and is_matrix(ours[key])]
    step = max(1, len(floats) // MOST_TENSORS)
    differing: dict[str, float] = {}
    with Sources(folders, {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), torch.float64, finite=False)
        for key in floats[::step]:
            one, other = (_rows(reader, specs[key]) for specs in (ours, theirs))
            size = float(other.norm())
            error = float((one - other).norm()) / size if size else float(one.norm())
            if error > UNTOUCHED:
                differing[key] = error
    if not differing:
        return
    is_wrong = len(differing) > len(floats[::step]) / 2
    worst = max(differing, key=lambda key: differing[key])
    found.add(
        "wrong_base" if is_wrong else "other_changes",
        f"{len(differing)} of {len(floats[::step])} weights that no adapter touches differ",
        f"{shown(worst)} by {differing[worst]:.1%}",
        do if is_wrong else "other adapters, or training, changed them",
    )


def _rows(reader: LocalReader, spec: TensorSpec, first: int = 0) -> Tensor:
    """Some rows of a stored or quantized matrix."""
    height = spec.shape[0]
    grid, last = (height, math.prod(spec.shape[1:])), min(first + ROWS, height)
    if isinstance(spec, QuantizedWeight):
        return reader.tensor(spec).reshape(grid)[first:last].double()
    return reader.rows(spec, grid, first, last)


def _projection(model: Folder, stored: Tensors, plans: Sequence[Plan]) -> tuple[list[float], float]:
    """Coefficients of MODEL - BASE ≈ Σ coefficient · delta, by least squares over sampled rows, and
    the unexplained share of ‖MODEL - BASE‖²."""
    count = len(plans)
    sizes = (count, count), (count,), ()
    gram, inner, total = (torch.zeros(size, dtype=torch.float64) for size in sizes)
    unit = 1.0  # in which the sums are: squares of large values overflow
    for change, deltas in _samples(model, stored, plans):
        old, unit = unit, max(unit, *(float(x.abs().max()) for x in (change, *deltas.values())))
        for sums in (gram, inner, total):
            sums *= (old / unit) ** 2
        change, deltas = change / unit, {i: one / unit for i, one in deltas.items()}
        total += change.square().sum()
        for i, one in deltas.items():
            inner[i] += float((one * change).sum())
            for j, other in deltas.items():
                gram[i, j] += float((one * other).sum())
    solution = torch.linalg.lstsq(gram, inner[:, None], driver="gelsd").solution[:, 0]
    left = float(total - 2 * solution @ inner + solution @ gram @ solution)
    return solution.tolist(), max(left, 0.0) / float(total) if total else 0.0


def _samples(
    model: Folder, stored: Tensors, plans: Sequence[Plan]
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Yield (rows of MODEL - BASE, the same rows of each adapter's delta) for some touched
    weights."""
    edited = [_edited(plan) for plan in plans]
    keys = [key for key in dict.fromkeys(k for e in edited for k in e) if key in stored]
    for key in keys[:: max(1, len(keys) // MOST_TENSORS)]:
        deltas, before = {}, None
        for number, (plan, steps) in enumerate(zip(plans, edited, strict=True)):
            if key not in steps:
                continue
            with Sources(plan.folders, dict(plan.identities)) as sources:
                reader = LocalReader(sources, torch.device("cpu"), torch.float64)
                rows = SampledRows(steps[key], reader)
                last = min(ROWS, rows.height)
                before = rows.rows(0, last).double()
                deltas[number] = rows.edited(0, last).double() - before
        with Sources((model,), {}) as sources:
            reader = LocalReader(sources, torch.device("cpu"), torch.float64, finite=False)
            after = _rows(reader, stored[key])
        if before is not None and after.numel() == before.numel():
            yield (after.reshape(before.shape) - before).nan_to_num(0, 0, 0), deltas


def _coefficients(values: Sequence[float], adapters: Sequence[Folder], found: _Findings) -> None:
    for value, adapter in zip(values, adapters, strict=True):
        name = adapter.name
        kind, problem, do = _meaning(value, name, read_json(adapter, CONFIG))
        if kind:
            evidence = f"the factor of its delta in the model is {value:.3g}"
            known = [one for one in found.rows if one["problem"] == MERGED.format(shown(name), 2)]
            if kind == "merged_twice" and known:  # the receipts know the same fault
                found.rows = [row for row in found.rows if row not in known]
                evidence += f"; {known[0]['evidence']} have it 2 times"
            found.add(kind, problem, evidence, do, adapter.label)


def _meaning(value: float, name: str, config: Json) -> tuple[str, str, str]:
    """The finding for a coefficient of a delta: kind, problem, advice; "" for 1."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    near = lambda other: abs(value - other) <= NEAR * abs(other)
    again = "merge it again\nadapterkit merge BASE ADAPTER --out merged-again --verify"
    if near(1):
        return "", "", ""
    if abs(value) <= NEAR:
        return "not_merged", f"{name} is not in the model", again
    if near(2):
        do = "unmerge it\nadapterkit merge MODEL ADAPTER=-1 --out unmerged"
        return "merged_twice", f"{name} is in the model twice", do
    if near(-1):
        return "subtracted", f"{name} was subtracted", again
    if isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 and alpha:
        scale, root = alpha / rank, math.sqrt(rank)
        for factor, text in (
            (1 / scale, f"without its scale alpha / rank = {scale:g}"),
            (scale, f"with its scale {scale:g} twice"),
            (root, "with alpha / √rank instead of alpha / rank"),
            (1 / root, "with alpha / rank instead of alpha / √rank"),
        ):
            if near(factor):
                return "scale", f"{name} is in the model {text}", again
    return (
        "strength",
        f"{name} is in the model with weight {value:.3g}",
        f"if this is unintended, {again}",
    )
