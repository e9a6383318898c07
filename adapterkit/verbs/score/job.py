"""score: plan the models and samples, measure each model, and describe the results."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

import torch

from adapterkit.core import dtypes
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.checkpoint.disk import replace_file, storage_errors
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.commands import command
from adapterkit.core.engine.device import pick_device
from adapterkit.core.errors import Failed, Problems, Refused, shown
from adapterkit.core.inputs.earlier_merges import merged_adapters, same_merges
from adapterkit.core.inputs.input_identity import header_hashes, identities
from adapterkit.core.inputs.sources import open_adapter, open_model, open_weighted
from adapterkit.core.options import (
    Progress,
    StrPath,
    expect,
    files,
    no_progress,
    parse_size,
    unweighted,
)
from adapterkit.core.records import Json
from adapterkit.core.system import quarter_of_memory
from adapterkit.verbs.score.checks import check_model, check_samples, without_weights
from adapterkit.verbs.score.options import SampleOptions
from adapterkit.verbs.score.results import SampleSums, score_row
from adapterkit.verbs.score.run import run
from adapterkit.verbs.score.variants import Variant, stored, with_adapters
from adapterkit.verbs.score.verb import Score
from adapterkit.verbs.stats.data.records import IGNORED, draw_records
from adapterkit.verbs.stats.data.samples import Samples
from adapterkit.verbs.stats.model.layers import OffloadedLayers
from adapterkit.verbs.stats.model.predictions import Predictions
from adapterkit.verbs.stats.plan import LENGTH, positions_of, samples_of

VERSION = 1
KEPT = 128  # samples after which results are kept, if they are


def score_models(options: Score) -> Json:
    """The document of a score, which is also written to `out`."""
    out = None if options.out is None else Path(options.out)
    with storage_errors(out or Path()):
        _check_out(out, options.overwrite)
    with work_folder(out, options.resume) as (work, kept):
        variants, reference = _variants(options)
        texts = measured_texts(variants[0], files(options.data), options, work)
        texts.notes.extend(check_samples(variants, reference, texts.samples))
        every = [reference, *variants] if reference is not None else variants
        sums = measured(
            every, texts, options, work, options.progress, compared=reference is not None, kept=kept
        )
        document = score_document(every, sums, texts, reference is not None)
        if out is not None:
            data = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            replace_file(out, data.encode(), out.with_name(f".{out.name}.part"))
    return document


def score_document(
    every: Sequence[Variant], sums: Sequence[SampleSums], texts: "Texts", compared: bool
) -> Json:
    """The document of measured models; if `compared`, the first one is the reference."""
    rows = list(zip(every, sums, strict=True))[compared:]
    return {
        "score": VERSION,
        "data": texts.about,
        "against": every[0].name if compared else None,
        "rows": score_rows(rows, compared),
        "notes": [*dict.fromkeys([*texts.notes, *(n for one in every for n in one.notes)])],
    }


def score_rows(
    measured: Sequence[tuple[Variant, SampleSums]], compared: bool = False
) -> list[Json]:
    """The rows of a table, the least loss first."""
    order = sorted(measured, key=lambda one: float(one[1].losses.sum()))
    best = order[0][1]
    return [
        {"model": variant.name, "adapters": list(variant.adapters)}
        | score_row(sums, best, compared)
        for variant, sums in order
    ]


@dataclass(frozen=True)
class Texts:
    """The samples, and what is said of them."""

    samples: Samples
    about: Json
    notes: list[str]


def measured_texts(
    first: Variant, data: Sequence[StrPath], options: SampleOptions, work: Path
) -> Texts:
    """The samples of these files, in the tokens of the first model."""
    drawn = draw_records(data, options.samples, options.seed)
    with without_weights(first) as opened:
        model = opened.model
    where = first.tokenizer(work)
    (samples,) = samples_of(where, model, [drawn.records], options.length, "--data")
    shift = 1 if Predictions(model).is_causal else 0
    kept = [s for s in samples.samples if any(x != IGNORED for x in s.labels[shift:])]
    if not kept:
        raise Refused(
            "no sample has a token that counts after its first one",
            expected="samples of two tokens or more",
            where="--data",
            hint="give longer texts",
            code="AK901",
        )
    left_out = len(samples.samples) - len(kept)
    note = f"{left_out} samples left out: no token after their first one counts"
    samples = replace(samples, samples=kept)
    tokens = sum(x != IGNORED for s in kept for x in s.labels[shift:])
    about = {"files": drawn.files, "sha256": samples.digest}
    about |= {"samples": len(kept), "tokens": tokens}
    about["length"] = min(options.length or LENGTH, positions_of(model))
    return Texts(samples, about, [*drawn.notes, *samples.notes, *[note] * bool(left_out)])


def measured(
    variants: Sequence[Variant],
    texts: Texts,
    options: SampleOptions,
    work: Path,
    progress: Progress = no_progress,
    *,
    compared: bool = False,
    kept: Path | None = None,
) -> list[SampleSums]:
    """The sums of each model, in their order. `compared`: with the first one too. `kept`: a folder
    for finished sums, which are read if they are there. `Failed` if they are not finite."""
    count, dtype = len(texts.samples.samples), options.dtype
    sums = [SampleSums(count) for _ in variants]
    path = None if kept is None else kept / f"{_digest(variants, texts, options, compared)}.pt"
    done = _read(path, sums)
    expect(progress, sum(map(_steps, variants)) * (count - done))

    def keep(now: int) -> None:
        if path is not None:
            part = path.with_suffix(".part")
            torch.save((now, [one.table for one in sums]), part)
            part.replace(path)

    if done < count:
        run(
            variants,
            texts.samples,
            sums,
            device=pick_device(options.device),
            dtype=dtypes.torch_dtype(dtypes.parse(dtype)) if dtype else torch.float32,
            work=work,
            memory=parse_size(options.memory) if options.memory else quarter_of_memory(),
            step=lambda: progress(1),
            compared=compared,
            group=count if path is None else KEPT,
            first=done,
            finished=keep,
        )
    for variant, own in zip(variants, sums, strict=True):
        _check(variant, texts, own)
    return sums


def _read(path: Path | None, sums: Sequence[SampleSums]) -> int:
    """Fill the sums with kept ones; return how many samples are done."""
    if path is None or not path.exists():
        return 0
    done, tables = torch.load(path, weights_only=True)
    for one, table in zip(sums, tables, strict=True):
        one.table = table
    return done


def _steps(variant: Variant) -> int:
    """How often `run` calls its `step` for each sample."""
    with without_weights(variant) as opened:
        units = OffloadedLayers.of(opened)
    return len(units.outer) if units.has_layers else 1


def _check(variant: Variant, texts: Texts, sums: SampleSums) -> None:
    wrong = (~sums.table.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise Failed(
            f"the predictions of {variant.name} are not finite, for {len(wrong)} of {sums.count} "
            "samples",
            expected="finite numbers",
            where=shown(texts.samples.samples[wrong[0]].where),
            hint="give --dtype fp32, or check the model\n"
            + command("adapterkit diagnose", variant.folders[0].label),
            code="AK903",
        )


def _digest(
    variants: Sequence[Variant], texts: Texts, options: SampleOptions, compared: bool
) -> str:
    """A name for the results of these models on these texts."""
    about = [
        [
            header_hashes([one.base], (0,)),
            _identity(one),
            one.adapters,
            sorted(one.base.tensors.items()),
        ]
        for one in variants
    ]
    about += [texts.about["sha256"], options.dtype, compared]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _identity(variant: Variant) -> object:
    names = {(spec.folder, spec.file) for spec in variant.base.tensors.values()}
    every = [(n, name) for n, folder in enumerate(variant.folders) for name in folder.files()]
    return sorted(identities(variant.folders, {*names, *every}).items())


def _variants(options: Score) -> tuple[list[Variant], Variant | None]:
    """The models to measure, and the reference; `Refused` with all problems."""
    variants: list[Variant] = []
    reference, errors = None, Problems()
    models = unweighted(options.models)
    if not models:
        errors.add(
            "no model", "one or more", "give a folder or a file", where="MODEL", code="AK102"
        )
    for source in models:
        with errors.collected():
            folder = open_model(source)
            variants.append(check_model(replace(stored(folder), name=str(source))))
            live, notes = _with(folder, str(source), options)
            variants[-1] = replace(variants[-1], notes=(*variants[-1].notes, *notes))
            variants += [live] if live is not None else []
    if options.against is not None:
        with errors.collected():
            folder, name = open_model(options.against), str(options.against)
            live, _ = _with(folder, name, options)
            reference = check_model(live or replace(stored(folder), name=name))
    errors.raise_all()
    return variants, reference


def _with(folder: Folder, name: str, options: Score) -> tuple[Variant | None, list[str]]:
    """The model with the adapters on it that it does not contain with their weight, None if there
    are none of them; notes on the others."""
    sources = open_weighted(
        options.adapters, lambda text: open_adapter(text, folder, for_merge=True)
    )
    merged, rest, notes = merged_adapters(folder), list[tuple[Folder, float]](), list[str]()
    for number, (one, weight) in enumerate(sources, 1):
        adapter = scan_adapter(one, number)[0] if merged else None
        present = sum(e.weight for e in same_merges(merged, adapter)) if adapter else 0
        if adapter is not None and present and isclose(present, weight):
            notes.append(f"{adapter.name} is in {folder.name} already, as its receipt says")
        else:
            rest.append((one, weight))
    if not rest:
        return None, notes
    variant = with_adapters(folder, rest)
    return replace(variant, name=" + ".join([name, *variant.adapters])), notes


def _check_out(out: Path | None, overwrite: bool) -> None:
    is_folder = out is not None and out.is_dir()
    if out is not None and out.exists() and (is_folder or not overwrite):
        raise Refused(
            f"{shown(str(out))} {'is a folder' if is_folder else 'exists'}",
            expected="a new file",
            where="--out",
            hint="give another --out" if is_folder else "give --overwrite, or another --out",
            code="AK601",
        )


@contextmanager
def work_folder(out: Path | None, resume: bool) -> Iterator[tuple[Path, Path | None]]:
    """A folder for temporary files, and one for finished results, which is removed at the end."""
    kept = None if out is None else out.with_name(f".{out.name}.rows")
    if kept is not None:
        if not resume:
            shutil.rmtree(kept, ignore_errors=True)
        with storage_errors(kept):
            kept.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="adapterkit-", dir=kept) as work:
            yield Path(work), kept
    except BaseException:
        if kept is not None and not any(kept.iterdir()):
            kept.rmdir()  # of a run that was refused
        raise
    if kept is not None:
        shutil.rmtree(kept)
