"""score: plan the models and samples, measure each model, and describe the results."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapterkit.core import dtypes
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.device import pick_device
from adapterkit.core.errors import Failed, Problems, Refused, shown
from adapterkit.core.inputs.earlier_merges import merged_adapters, same_merges
from adapterkit.core.inputs.input_identity import header_hashes, identities
from adapterkit.core.inputs.sources import open_adapter, open_model, open_weighted
from adapterkit.core.options import Progress, StrPath, expect, files, parse_size, unweighted
from adapterkit.core.records import Json
from adapterkit.core.system import quarter_of_memory
from adapterkit.verbs.score.results import SampleSums, score_row
from adapterkit.verbs.score.run import Reference, run
from adapterkit.verbs.score.variants import Variant, stored, with_adapters
from adapterkit.verbs.score.verb import SampleOptions, Score
from adapterkit.verbs.stats.data.records import draw_records
from adapterkit.verbs.stats.data.samples import Samples
from adapterkit.verbs.stats.model.layers import OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.plan import samples_of

VERSION = 1
Weighted = Sequence[tuple[Folder, float]]


def score_models(options: Score) -> Json:
    """The document of a score, which is also written to `out`."""
    out = None if options.out is None else Path(options.out)
    _check_out(out, options.overwrite)
    with _work(out, options.resume) as (work, kept):
        variants, reference = _variants(options)
        texts = measured_texts(variants[0], files(options.data), options, work)
        measured = [reference, *variants] if reference is not None else variants
        runs = [Run(one, texts, options, work, kept) for one in measured]
        expect(options.progress, sum(one.steps for one in runs))
        document = _document(runs, texts, reference is not None, options.progress)
        if out is not None:
            data = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            replace_file(out, data.encode(), out.with_name(f".{out.name}.part"))
    return document


def _document(runs: Sequence["Run"], texts: "Texts", compared: bool, progress: Progress) -> Json:
    against = Reference(runs[0].variant) if compared else None
    if against is not None:
        runs[0].sums(progress, records=against)
    rows = [(one, one.sums(progress, against=against)) for one in runs[compared:]]
    notes = [note for one in runs for note in one.variant.notes]
    return {
        "score": VERSION,
        "data": texts.about,
        "against": runs[0].variant.name if compared else None,
        "rows": score_rows([(one.variant, sums) for one, sums in rows], compared),
        "notes": list(dict.fromkeys([*texts.notes, *notes])),
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
    with Sources(first.folders, {}) as sources:
        cpu = torch.device("cpu")
        model = StoredModel(first.base, sources, cpu, buffers=False).model
    where = first.tokenizer(work)
    (samples,) = samples_of(where, model, [drawn.records], options.length, "--data")
    shift = 0 if samples.has_decoder else 1
    kept = [s for s in samples.samples if any(x != -100 for x in s.labels[shift:])]
    if not kept:
        raise Refused(
            "no sample has a token that counts after its first one",
            expected="samples of two tokens or more",
            where="--data",
            hint="give longer texts",
            code="AK901",
        )
    samples = replace(samples, samples=kept)
    tokens = sum(x != -100 for s in kept for x in s.labels[shift:])
    about = {"files": drawn.files, "sha256": samples.digest}
    about |= {"samples": len(kept), "tokens": tokens}
    return Texts(samples, about, [*drawn.notes, *samples.notes])


@dataclass(frozen=True)
class Run:
    """One model on the samples; `kept`: the folder of finished results, if there is one."""

    variant: Variant
    texts: Texts
    options: SampleOptions
    work: Path
    kept: Path | None = None

    @property
    def steps(self) -> int:
        """How often `run` calls its `step`."""
        with Sources(self.variant.folders, {}) as sources:
            cpu = torch.device("cpu")
            units = OffloadedLayers.of(StoredModel(self.variant.base, sources, cpu, buffers=False))
        return len(self.texts.samples.samples) * (len(units.outer) if units.has_layers else 1)

    def sums(
        self,
        progress: Progress,
        *,
        records: Reference | None = None,
        against: Reference | None = None,
    ) -> SampleSums:
        """The sums of each sample, measured now or read. `Failed` if they are not finite."""
        sums = SampleSums(len(self.texts.samples.samples))
        path = None if self.kept is None or records else self.kept / f"{self._digest(against)}.pt"
        if path is not None and path.exists():
            sums.table = torch.load(path, weights_only=True)
            progress(self.steps)
            return sums
        options, dtype = self.options, self.options.dtype
        memory = parse_size(options.memory) if options.memory else quarter_of_memory()
        run(
            self.variant,
            self.texts.samples,
            sums,
            device=pick_device(options.device),
            dtype=dtypes.torch_dtype(dtypes.parse(dtype)) if dtype else torch.float32,
            work=self.work,
            memory=memory,
            step=lambda: progress(1),
            records=records,
            against=against,
        )
        self._check(sums)
        if path is not None:
            torch.save(sums.table, path)
        return sums

    def _check(self, sums: SampleSums) -> None:
        wrong = (~sums.table.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise Failed(
                f"the predictions of {self.variant.name} are not finite, for {len(wrong)} of "
                f"{sums.count} samples",
                expected="finite numbers",
                where=shown(self.texts.samples.samples[wrong[0]].where),
                hint="give --dtype fp32, or check the model\nadapterkit diagnose MODEL",
                code="AK903",
            )

    def _digest(self, against: Reference | None) -> str:
        others = [against.variant] if against is not None else []
        about = [
            [
                header_hashes([one.base], (0,)),
                _identity(one),
                one.adapters,
                sorted(one.base.tensors),
            ]
            for one in (self.variant, *others)
        ]
        about += [self.texts.about["sha256"], self.options.dtype]
        return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _identity(variant: Variant) -> object:
    names = {(spec.folder, spec.file) for spec in variant.base.tensors.values()}
    every = [(n, name) for n, folder in enumerate(variant.folders) for name in folder.files()]
    return sorted(identities(variant.folders, {*names, *every}).items())


def _variants(options: Score) -> tuple[list[Variant], Variant | None]:
    """The models to measure, and the reference; `Refused` with all problems."""
    variants: list[Variant] = []
    reference, errors = None, Problems()
    for source in unweighted(options.models):
        with errors.collected():
            folder = open_model(source)
            variants.append(replace(stored(folder), name=str(source)))
            live = _with(folder, str(source), options)
            variants += [live] if live is not None else []
    if options.against is not None:
        with errors.collected():
            folder, name = open_model(options.against), str(options.against)
            reference = _with(folder, name, options) or replace(stored(folder), name=name)
    errors.raise_all()
    return variants, reference


def _with(folder: Folder, name: str, options: Score) -> Variant | None:
    """The model with the adapters on it; None without adapters, or if it contains them."""
    sources = open_weighted(
        options.adapters, lambda text: open_adapter(text, folder, for_merge=True)
    )
    if not sources:
        return None
    merged = merged_adapters(folder)
    own = [scan_adapter(one, number)[0] for number, (one, _) in enumerate(sources, 1)]
    if merged and all(same_merges(merged, one) for one in own):
        return None
    variant = with_adapters(folder, sources)
    return replace(variant, name=" + ".join([name, *variant.adapters]))


def _check_out(out: Path | None, overwrite: bool) -> None:
    if out is not None and out.exists() and not overwrite:
        raise Refused(
            f"{shown(str(out))} exists",
            expected="a new file",
            where="--out",
            hint="give --overwrite, or another --out",
            code="AK601",
        )


@contextmanager
def _work(out: Path | None, resume: bool) -> Iterator[tuple[Path, Path | None]]:
    """A folder for temporary files, and one for finished results, which is removed at the end."""
    kept = None if out is None else out.with_name(f".{out.name}.rows")
    if kept is not None:
        if not resume:
            shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="adapterkit-", dir=kept) as work:
        yield Path(work), kept
    if kept is not None:
        shutil.rmtree(kept)
