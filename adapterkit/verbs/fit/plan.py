"""Plan a fit completely before the model runs: samples and their splits, adapters, numbers of
weights, and every refusal."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.fingerprint import difference, fingerprint
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, listed, shown
from adapterkit.core.inputs.sources import open_adapter, open_model, weight_of
from adapterkit.core.inputs.weights_file import NamedAdapter, named_adapter
from adapterkit.core.options import Progress, files, no_progress, weighted
from adapterkit.core.plan import Effort, Plan, TaskResult
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.runtime.load.reading import StoredAdapter
from adapterkit.verbs.fit.collection import WeightsCollection
from adapterkit.verbs.fit.objective import Objective
from adapterkit.verbs.fit.runs import FitBatch
from adapterkit.verbs.fit.verb import LEVELS, WeightFit
from adapterkit.verbs.fit.weighted_adapters import WeightedModel
from adapterkit.verbs.shared.joined_values import delta_problems
from adapterkit.verbs.stats.data.masks import IGNORED
from adapterkit.verbs.stats.data.records import draw_records
from adapterkit.verbs.stats.data.samples import Sample, Samples
from adapterkit.verbs.stats.model.layers import OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.plan import samples_of

ROWS, TOKENS = 8, 2048  # of a batch, at most
EVALUATIONS = 100  # a guess, of all levels
NUMBER, TEXT = 32, 1 << 16  # bytes of a weight in the file, and of the rest: guesses


@dataclass(frozen=True)
class SampleSplit:
    """Samples of one split, in the order in which they run."""

    name: str
    batches: list[FitBatch]
    files: Tensor  # (samples,): numbers of their files
    tokens: Tensor  # (samples,): how many of each count
    weights: Tensor  # (samples,): their shares of these of their files
    where: list[str]

    @classmethod
    def of(
        cls, name: str, parts: Sequence[tuple[Samples, list[Sample]]], shift: int, first: int
    ) -> "SampleSplit":
        """The split of these samples of each file, numbered from `first`."""
        order = lambda s: (-len(s.tokens), -len(s.labels))
        every = [
            (n, sample) for n, (_, its) in enumerate(parts) for sample in sorted(its, key=order)
        ]
        tokens = torch.tensor([sum(x != IGNORED for x in s.labels[shift:]) for _, s in every])
        files = torch.tensor([number for number, _ in every])
        weights = tokens.double() / files.bincount(tokens)[files]
        batches, at = [], 0
        while at < len(every):
            number, longest = every[at]
            rows = max(1, min(ROWS, TOKENS // len(longest.tokens)))
            own = [sample for n, sample in every[at : at + rows] if n == number]
            places = range(at, at + len(own))
            inputs = parts[number][0].batch(own)
            numbers = tuple(first + place for place in places)
            batches.append(FitBatch(inputs, weights[at : at + len(own)], numbers, number))
            at += len(own)
        return cls(name, batches, files, tokens, weights, [s.where for _, s in every])


@dataclass(frozen=True, kw_only=True)
class FitCollection(WeightsCollection):
    """A model, its adapters, and samples for training and holding out."""

    base: Checkpoint
    options: WeightFit
    device_memory: int
    effort: Effort
    adapters: list[NamedAdapter]
    fingerprint: str  # of the base
    start: list[float]
    names: list[str]  # of the files
    shares: Tensor  # of the files
    train: SampleSplit
    held: SampleSplit
    data: Json
    weights: dict[str, int]  # how many each level has
    modules: int

    @property
    def labels(self) -> list[str]:
        """The adapters' names, with numbers if several have the same name."""
        names = [one.name for one in self.adapters]
        is_shared = lambda name: names.count(name) > 1
        return [f"{n} ({i})" if is_shared(n) else n for i, n in enumerate(names, 1)]

    def totals(self, budget: int) -> Json:
        return {
            "samples": len(self.train.where),
            "samples_held_out": len(self.held.where),
            "tokens_counted": int(self.train.tokens.sum()),
            "batches": len(self.train.batches),
            "modules": self.modules,
            **{f"weights_per_{level}": count for level, count in self.weights.items()},
        }

    def made(self, plan: Plan, work: Path, device: torch.device, progress: Progress) -> TaskResult:
        return load("verbs.fit.fit:fitted")(self, plan, work, device, progress)


def plan_fit(options: WeightFit) -> Plan:
    """The plan of a fit; `Refused` with all problems."""
    errors, folder = Problems(), open_model(options.base)
    base = open_checkpoint(folder)
    folders, names, given = adapters_of(options, folder, errors)
    drawn, shares, data_names = _drawn(options, errors)
    cpu = torch.device("cpu")
    with Sources((folder,), {}) as sources:
        stored = StoredModel(base, sources, cpu, buffers=False, dtype=dtype_of(options, cpu))
    samples: list[Samples] = []
    with errors.collected():
        records = [one.records for one in drawn]
        samples = samples_of(folder, stored.model, records, options.length, "--data")
    with errors.collected():
        weighted_model = WeightedModel(stored.model, tuple(folders))
        print_of = fingerprint(base)
        for one in weighted_model.adapters:
            errors += _problems(one, print_of, folder.name)
    shift = int(Objective(stored.model).is_causal)
    split = [
        _split(its, Path(name), shift, options, errors)
        for its, name in zip(samples, data_names, strict=bool(samples))
    ]
    _check_split(split, samples, options, len(folders), errors)
    errors.raise_all()
    own = [[(s, its[i]) for s, its in zip(samples, split, strict=True)] for i in (0, 1)]
    train = SampleSplit.of("train", own[0], shift, 0)
    held = SampleSplit.of("held", own[1], shift, len(train.where))
    tokens = sum(one.tokens for one in samples)
    parameters = sum(math.prod(spec.shape) for spec in base.tensors.values())
    together = [
        unit.parameters for unit in OffloadedLayers.of(stored).outer if not options.whole_model
    ]
    levels = LEVELS[: LEVELS.index(options.granularity) + 1]
    fit = FitCollection(
        base=base,
        device_memory=max(map(stored.nbytes, together or [stored.parameters()])),
        effort=Effort(flops=EVALUATIONS * tokens * 6 * parameters),
        options=replace(options, progress=no_progress),
        adapters=[named_adapter(n, f) for n, f in zip(names, folders, strict=True)],
        fingerprint=print_of,
        start=given,
        names=[Path(name).name for name in data_names],
        shares=torch.tensor(shares, dtype=torch.float64) / sum(shares),
        train=train,
        held=held,
        data={"files": [one.files for one in drawn], "sha256": [s.digest for s in samples]},
        weights={level: weighted_model.count(level) for level in levels},
        modules=len(weighted_model.places),
    )
    recipe = options.recipe() | {"weights": given, "data": fit.data}
    size = NUMBER * (fit.weights[options.granularity] + len(folders) * len(weighted_model.places))
    size += (
        sum(len(place.name) for place in weighted_model.places) + len(json.dumps(fit.data)) + TEXT
    )
    inputs = [one.adapter for one in weighted_model.adapters]
    notes = [n for one in (*drawn, *samples) for n in one.notes] + stored.notes
    return fit.plan(options, recipe, base, inputs, size, notes)


def dtype_of(options: WeightFit, device: torch.device) -> torch.dtype | None:
    """The model's dtype; None for its checkpoint's."""
    if options.dtype:
        return dtypes.torch_dtype(dtypes.parse(options.dtype))
    return torch.float32 if device.type == "cpu" else None


def adapters_of(
    options: WeightFit, base: Folder, errors: Problems
) -> tuple[list[Folder], list[str], list[float]]:
    """The adapters' folders, names, and initial weights."""
    folders, names, weights = [], [], []
    for source, weight in weighted(options.adapters):
        with errors.collected():
            path, own = weight_of(source) if weight is None else (source, weight)
            folders.append(open_adapter(path, base))
            names.append(str(path))
            weights.append(None if weight is None and str(path) == str(source) else own)
    given = [weight for weight in weights if weight is not None]
    if is_on_hub(options.out):
        errors.add(
            "a file of weights on the Hub",
            "a file here",
            "push it later",
            where="--out",
            code="AK904",
        )
    if not weights:
        errors.add(
            "no adapters were given", "one or more", "name the adapters", where="fit", code="AK904"
        )
    if given and len(given) < len(weights):
        errors.add(
            f"weights of {len(given)} of {len(weights)} adapters",
            "weights of all, or none",
            "give ADAPTER=WEIGHT for each",
            where="adapters",
            code="AK904",
        )
    return folders, names, given or [1 / max(len(weights), 1)] * len(weights)


def _drawn(options: WeightFit, errors: Problems) -> tuple[list, list[float], list[str]]:
    """Records of each file, as many as its share requires; the shares, and the files' names."""
    pairs = []
    for path in files(options.data):
        with errors.collected():
            pairs.append(weight_of(path))
    wrong = [name for name, share in pairs if share <= 0]
    if wrong:
        errors.add(
            f"shares of {listed(wrong)}",
            "numbers above 0",
            "give FILE=2",
            where="--data",
            code="AK904",
        )
    total = sum(share for _, share in pairs if share > 0)
    drawn = []
    for name, share in pairs:
        with errors.collected():
            count = max(1, round(options.samples * max(share, 0) / total))
            drawn.append(draw_records([name], count, options.seed))
    errors.raise_all()
    return drawn, [share for _, share in pairs], [name for name, _ in pairs]


def _problems(one: StoredAdapter, base: str, name: str) -> list[AdapterkitError]:
    """Reasons why an adapter's change is not its weight times one delta on this base."""
    adapter, errors = (
        one.adapter,
        Problems(delta_problems(one.adapter), where=one.adapter.label, code="AK904"),
    )
    values = {
        "fully trained modules": list(one.values.copies),
        "trained biases": list(one.values.biases),
        "rows of tokens": list(one.values.rows),
        "biases of factors": [lora.module for lora in adapter.loras if lora.bias is not None],
    }
    for what, names in values.items():
        if names:
            problem = f"{what}, which a weight does not scale: {listed(names)}"
            errors.add(problem, "factors only", "leave the adapter out, or merge it first")
    if one.config.invocation_tokens:
        errors.add(
            "it acts from its invocation on (aLoRA)", "adapters of all tokens", "leave it out"
        )
    made_for = adapter.base_fingerprint
    if made_for is not None and difference(made_for, base) == "values":
        errors.add(
            f"it was made for a base with other values than {shown(name)} "
            f"(fingerprint {made_for}, not {base})",
            "adapters of this base",
            "give the base that they were trained on",
        )
    return list(errors)


def _split(
    samples: Samples, path: Path, shift: int, options: WeightFit, errors: Problems
) -> tuple[list[Sample], list[Sample]]:
    """The training samples and the held-out samples of one file."""
    own = [s for s in samples.samples if any(x != IGNORED for x in s.labels[shift:])]
    if len(own) < 2:
        errors.add(
            f"{len(own)} samples with tokens that count",
            "2 or more, one of them to be held out",
            "raise --samples, or give a file with more of them",
            where=shown(path),
            code="AK904",
        )
    random.Random(options.seed).shuffle(own)
    held = min(max(1, round(options.holdout * len(own))), len(own) - 1)
    return own[held:], own[:held]


def _check_split(
    split: Sequence[tuple[list[Sample], list[Sample]]],
    samples: Sequence[Samples],
    options: WeightFit,
    adapters: int,
    errors: Problems,
) -> None:
    """Add errors for duplicate samples, and for files and adapters that do not correspond."""
    train = {(s.tokens, s.labels): s.where for own, _ in split for s in own}
    for held in (s for _, own in split for s in own):
        if (held.tokens, held.labels) in train:
            errors.add(
                f"{held.where} is held out, and the same sample as "
                f"{train[held.tokens, held.labels]}, which is fitted to",
                "samples that differ",
                "remove the duplicate samples",
                where="--data",
                code="AK904",
            )
    if samples and sum(len(own) for _, own in split) < 2:
        errors.add(
            "one sample is held out, which has no standard error",
            "2 or more",
            "raise --samples or --holdout",
            where="--holdout",
            code="AK904",
        )
    by_place = [f"--target {options.target}"] * (options.target == "teacher")
    by_place += [f"--start {options.start}"] * (options.start == "stats")
    by_place += [f"--loss-over {options.loss_over}"] * (options.loss_over == "retention")
    if by_place and samples and len(samples) != adapters:
        errors.add(
            f"{len(samples)} files for {adapters} adapters, with {' and '.join(by_place)}",
            "a file for each adapter, in their order",
            "give --data for each",
            where="--data",
            code="AK904",
        )
