"""Refine weights from one per adapter to one per direction, as long as held-out samples improve."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adapterkit.core.errors import Failed, listed, shown
from adapterkit.core.records import Json
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.lowrank.span import span_weights
from adapterkit.verbs.fit.collection import Evaluations
from adapterkit.verbs.fit.objective import TeacherObjective
from adapterkit.verbs.fit.plan import FitCollection, SampleSplit
from adapterkit.verbs.fit.runs import FitBatch, Runs
from adapterkit.verbs.fit.solver import Balance, Level, Point, minimize
from adapterkit.verbs.fit.verb import LEVELS
from adapterkit.verbs.fit.weighted_adapters import ENDS, ActivationGram, WeightedModule

# nats; `auto` continues until held-out samples get worse; each starts at the previous end
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass
class CoarseToFineFit:
    """The steps of a fit. `rows`: losses on held-out samples (samples,) of everything compared, by
    name; `levels`: the coefficients of the start and of each step, kept or not."""

    fit: FitCollection
    runs: Runs
    evaluations: Evaluations
    rows: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Json] = field(default_factory=list)
    levels: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Point] = field(default_factory=list)  # of the training split
    points: set[bytes] = field(default_factory=set)  # with computed gradients

    def losses(self, c: Tensor, part: SampleSplit) -> Tensor:
        what = f"losses {part.name} {self.runs.weighted_model.directions}"
        compute = lambda: [self.runs.losses(c, part.batches)]
        return self.evaluations.of(what, c, compute, [(len(part.where),)])[0]

    def gradients(self, c: Tensor, part: SampleSplit) -> tuple[Tensor, Tensor]:
        what = f"gradients {part.name} {self.runs.weighted_model.directions}"
        compute = lambda: list(self.runs.gradients(c, part.batches))
        self.points.add(what.encode() + c.numpy().tobytes())
        shapes = [(len(part.where),), (int(part.files.max()) + 1, len(c))]
        losses, rows = self.evaluations.of(what, c, compute, shapes)
        return losses, rows

    def of_adapters(self, weights: Sequence[float]) -> Tensor:
        """Coefficients (all,) for one weight per adapter."""
        return torch.tensor([weights[o] for o, *_ in self.runs.weighted_model.owners]).double()

    def of_one(self, number: int) -> Tensor:
        """Coefficients (all,) for one adapter alone."""
        return self.of_adapters([float(n == number) for n in range(len(self.fit.adapters))])

    def kept(self, per: str) -> str:
        """The last level up to this one whose step is kept; "start" for none."""
        steps = self.steps[: LEVELS.index(per) + 1]
        return next((step["per"] for step in reversed(steps) if step["kept"]), "start")

    def run_steps(self) -> None:
        """Take the steps, each from the last one that was kept."""
        fit, start = self.fit, self._start()
        count = len(fit.adapters)
        if isinstance(self.runs.target, TeacherObjective):
            for batch in (*fit.train.batches, *fit.held.batches):
                self.runs.run(self.of_one(batch.file), [batch], self.runs.target.look)
        self.rows["base"] = self.losses(self.of_adapters([0.0] * count), fit.held)
        for number, label in enumerate(fit.labels):
            self.rows[label] = self.losses(self.of_one(number), fit.held)
        self.rows["equal"] = self.losses(self.of_adapters([1 / count] * count), fit.held)
        self.rows["start"] = self.losses(start, fit.held)
        self._check_finite()
        self.levels["start"] = start
        for per in LEVELS[: LEVELS.index(fit.options.granularity) + 1]:
            if per == "direction":
                self._expand()
            kept = self.kept(per)
            self.levels[per] = self._step(per, self.levels[kept], self.rows[kept])

    def _start(self) -> Tensor:
        """The initial coefficients, within the bounds; 0 for adapters without effect."""
        zeros = self.runs.weighted_model.zeros()
        weights = [0.0 if n in zeros else w for n, w in enumerate(self.fit.start)]
        c = self.of_adapters(weights)
        if self.fit.options.start == "stats":
            compute = lambda: [closed_form(self.fit, self.runs, c)]
            (c,) = self.evaluations.of("start", c, compute, [tuple(c.shape)])
        return c.clamp(*self.fit.options.limits)

    def _check_finite(self) -> None:
        where = self.fit.held.where
        for name, losses in self.rows.items():
            wrong = [where[n] for n in (~losses.isfinite()).nonzero().flatten().tolist()]
            if wrong:
                raise Failed(
                    f"{shown(name)}: the loss of {listed(wrong)} is not finite",
                    expected="numbers",
                    where="fit",
                    hint="give --dtype fp32, or look for damaged weights\nadapterkit diagnose BASE",
                    code="AK905",
                )

    @cached_property
    def train(self) -> Balance:
        return self._balance(self.fit.train)

    @cached_property
    def held(self) -> Balance:
        return self._balance(self.fit.held)

    def _balance(self, part: SampleSplit) -> Balance:
        """The function that combines a split's losses into one number."""
        fit, kind = self.fit, self.fit.options.loss_over
        tokens = part.files.bincount(part.tokens).double()
        shares = tokens / tokens.sum() if kind == "tokens" else fit.shares
        balance = Balance(kind == "worst", part.files, part.weights, shares)
        if kind != "retention":
            return balance
        numbers = range(len(fit.adapters))
        losses = [balance.by_file(self.losses(self.of_one(n), part))[n] for n in numbers]
        own, base = torch.stack(losses), balance.by_file(self.losses(0 * self.of_one(0), part))
        wrong = [fit.names[n] for n in (own >= base).nonzero().flatten().tolist()]
        if wrong:
            raise Failed(
                f"the adapters of {listed(wrong)} do not lower its loss",
                expected="adapters that were trained for their files",
                where="--loss-over retention",
                hint="give another --loss-over",
                code="AK905",
            )
        return replace(balance, own=own, base=base)

    def _expand(self) -> None:
        """Expand the members' coefficients to their directions."""
        self.runs.number(True)
        self.seen.clear()
        self.levels = {per: self.runs.weighted_model.expanded(c) for per, c in self.levels.items()}

    def _step(self, per: str, before: Tensor, losses: Tensor) -> Tensor:
        """The coefficients of a level, with the ridge that does best on held-out samples."""
        fit, train, held = self.fit, self.train, self.held
        found: list[tuple[float, float, Tensor, Tensor]] = []
        ridges = RIDGES if fit.options.ridge == "auto" else (float(fit.options.ridge),)
        level = self._level(per, before)
        for ridge in ridges:
            level = replace(level, ridge=ridge)
            c = minimize(level, self.seen, self._point).c
            after = self.losses(c, fit.held)
            value = held.value(after)
            if found and value > found[-1][0]:
                break
            found.append((value, ridge, c, after))
        value, ridge, c, after = found[-1]
        gain = held.value(losses) - value
        on_train = [train.value(self.gradients(x, fit.train)[0]) for x in (before, c)]
        error = held.error(losses, after)
        self.rows[per] = after
        self.steps.append(
            {
                "per": per,
                "weights": fit.weights[per],
                "ridge": ridge,
                "train": on_train[1],
                "train_gain": on_train[0] - on_train[1],
                "held": value,
                "gain": gain,
                "error": error,
                "kept": gain > error,
                "passes": len(self.points),
            }
        )
        return c

    def _point(self, c: Tensor) -> Point:
        return Point.of(c, self.train, *self.gradients(c, self.fit.train))

    def _level(self, per: str, before: Tensor) -> Level:
        owners = self.runs.weighted_model.owners
        names: list[Any] = (
            [o[: ENDS[per]] for o in owners] if per in ENDS else [*range(len(owners))]
        )
        numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
        groups = torch.tensor([numbers[name] for name in names])
        adapters = torch.tensor([owner[0] for owner in owners])
        each = 1 / adapters.bincount()[adapters].double()
        shares = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, groups, each)
        return Level(before, groups, shares, 0.0, *self.fit.options.limits)


def closed_form(fit: FitCollection, runs: Runs, start: Tensor) -> Tensor:
    """c (coefficients,) of least Σᵢ wᵢ E‖Σⱼ cⱼ Δⱼ xᵢ - Δᵢ xᵢ‖² for each adapter, layer or module,
    xᵢ the inputs of a module on the i-th file with its adapter.

    E[u uᵀ] of the inputs is enough, u = a·x. Modules that see no vectors are assumed to see all
    directions alike; stacks of experts keep the start's c."""
    weighted_model, count = runs.weighted_model, len(fit.adapters)
    owners = torch.tensor([owner[0] for owner in weighted_model.owners])
    seen: list[ActivationGram] = []
    for number in range(count):
        weighted_model.seen = ActivationGram()
        own = [one for one in fit.train.batches if one.file == number]
        only = (owners == number).double()
        runs.run(only, [*_alone(own)], lambda one: 0 * runs.target.logits(one.inputs).flatten()[:1])
        seen.append(weighted_model.seen)
    weighted_model.seen = None
    groups = [
        owner[1 : ENDS.get(fit.options.granularity, 3)][-1:] for owner in weighted_model.owners
    ]
    modules = []
    for place in weighted_model.places:
        with runs.loaded(place):
            assert place.patch is not None
            if place.patch.a.ndim != 3 or place.leaf is None:
                modules.append((str(groups[place.first]), *_equations(place, count, seen)))
    found = span_weights(modules, fit.shares.tolist(), 0.0)
    pairs = zip(owners.tolist(), groups, start.tolist(), strict=True)
    values = [float(found[str(g)][0][n]) if str(g) in found else c for n, g, c in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _equations(
    place: WeightedModule, count: int, seen: Sequence[ActivationGram]
) -> tuple[list[Product | None], Callable[[int], Tensor]]:
    """The deltas of a module, None for an adapter that lacks it, by their rows of u; E[u uᵀ]."""
    patch = place.patch
    assert patch is not None
    a, b = patch.a.flatten(1).double().cpu(), patch.b.flatten(1).double().cpu()
    rows = torch.eye(len(a), dtype=torch.float64)
    products: list[Product | None] = [None] * count
    for column, number in enumerate(place.members):
        own = patch.columns == place.first + column
        products[number] = Product(b[:, own], rows[own])

    def covariance(number: int) -> Tensor:
        mean = seen[number].mean(place.path)
        return a @ a.T if mean is None else mean

    return products, covariance


def _alone(batches: Sequence[FitBatch]) -> Iterator[FitBatch]:
    """Yield each sample alone, without padding."""
    for batch in batches:
        mask = batch.inputs.get("attention_mask")
        for row, number in enumerate(batch.samples):
            inputs = {key: value[row : row + 1] for key, value in batch.inputs.items()}
            if mask is not None:
                length, whole = int(mask[row].sum()), mask.shape[1:]
                for key, value in inputs.items():
                    inputs[key] = value[:, :length] if value.shape[1:] == whole else value
            yield replace(batch, inputs=inputs, samples=(number,))
