"""From one weight for each adapter to one for each direction, as far as samples that are held out
say that it helps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adapterkit.core.errors import Failed, listed, shown
from adapterkit.core.records import Json
from adapterkit.verbs.fit.balance import Balance
from adapterkit.verbs.fit.closed_form import closed_form
from adapterkit.verbs.fit.journal import Evaluations
from adapterkit.verbs.fit.objective import TeacherObjective
from adapterkit.verbs.fit.plan import FitCollection, SampleSplit
from adapterkit.verbs.fit.runs import Runs
from adapterkit.verbs.fit.solver import Level, Point, minimize
from adapterkit.verbs.fit.verb import LEVELS

# nats; `auto` goes on until one does worse on what is held out; each begins where one ended
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01)
ENDS = {"adapter": 1, "layer": 2, "module": 3}  # of a coefficient's owner


@dataclass
class CoarseToFineFit:
    """The steps of a fit; `rows`: losses held out (samples,) of all that is compared, by name;
    `levels`: the coefficients of the start and of each step, kept or not."""

    fit: FitCollection
    runs: Runs
    evaluations: Evaluations
    rows: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Json] = field(default_factory=list)
    levels: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Point] = field(default_factory=list)  # of the training part
    points: set[bytes] = field(default_factory=set)  # whose gradients were asked for

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
        """Coefficients (all,) of one weight for each adapter."""
        return torch.tensor([weights[o] for o, *_ in self.runs.weighted_model.owners]).double()

    def kept(self, per: str) -> str:
        """The last level up to that one whose step is kept; "start" for none."""
        steps = self.steps[: LEVELS.index(per) + 1]
        return next((step["per"] for step in reversed(steps) if step["kept"]), "start")

    def climb(self) -> None:
        """Take the steps, each from the last one that is kept."""
        fit, start = self.fit, self._start()
        count = len(fit.adapters)
        one = lambda n: [float(i == n) for i in range(count)]
        if isinstance(self.runs.target, TeacherObjective):
            self._look(self.runs.target)
        self.rows["base"] = self.losses(self.of_adapters([0.0] * count), fit.held)
        for number, label in enumerate(fit.labels):
            self.rows[label] = self.losses(self.of_adapters(one(number)), fit.held)
        self.rows["equal"] = self.losses(self.of_adapters([1 / count] * count), fit.held)
        self.rows["start"] = self.losses(start, fit.held)
        self._check_finite()
        self.levels["start"] = start
        for per in LEVELS[: LEVELS.index(fit.options.per) + 1]:
            if per == "direction":
                self._expand()
            kept = self.kept(per)
            self.levels[per] = self._step(per, self.levels[kept], self.rows[kept])

    def _start(self) -> Tensor:
        """The coefficients to begin with, within the bounds; of adapters that do nothing 0."""
        zeros = self.runs.weighted_model.zeros()
        weights = [0.0 if n in zeros else w for n, w in enumerate(self.fit.start)]
        c = self.of_adapters(weights)
        if self.fit.options.start == "stats":
            compute = lambda: [closed_form(self.fit, self.runs, c)]
            (c,) = self.evaluations.of("start", c, compute, [tuple(c.shape)])
        return c.clamp(*self.fit.options.limits)

    def _look(self, teacher: TeacherObjective) -> None:
        """Keep what each file's own adapter makes of its samples."""
        count = len(self.fit.adapters)
        for batch in (*self.fit.train.batches, *self.fit.held.batches):
            c = self.of_adapters([float(n == batch.file) for n in range(count)])
            self.runs.run(c, [batch], teacher.look)

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
        """How a part's losses become one number."""
        fit, kind = self.fit, self.fit.options.balance
        tokens = part.files.bincount(part.tokens).double()
        shares = tokens / tokens.sum() if kind == "tokens" else fit.shares
        balance = Balance(kind == "worst", part.files, part.weights, shares)
        if kind != "retention":
            return balance
        count = len(fit.adapters)
        one = lambda n: self.of_adapters([float(i == n) for i in range(count)])
        losses = [balance.by_file(self.losses(one(n), part))[n] for n in range(count)]
        own, base = torch.stack(losses), balance.by_file(self.losses(0 * one(0), part))
        wrong = [fit.names[n] for n in (own >= base).nonzero().flatten().tolist()]
        if wrong:
            raise Failed(
                f"the adapters of {listed(wrong)} do not lower its loss",
                expected="adapters that were trained for their files",
                where="--balance retention",
                hint="give another --balance",
                code="AK905",
            )
        return replace(balance, own=own, base=base)

    def _expand(self) -> None:
        """Coefficients of members become those of their directions."""
        self.runs.number(True)
        self.seen.clear()
        self.levels = {per: self.runs.weighted_model.expanded(c) for per, c in self.levels.items()}

    def _step(self, per: str, before: Tensor, losses: Tensor) -> Tensor:
        """The coefficients of a level, of the ridge that does best on what is held out."""
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
