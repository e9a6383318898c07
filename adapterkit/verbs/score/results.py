"""Losses of models on the same samples: means with confidence intervals over samples, and
differences that are paired by sample."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit.core.records import Json
from adapterkit.core.system.memory import return_memory

Z = 1.959963984540054  # 97.5 % of a normal distribution
FEW = (12.706205, 4.302653, 3.182446, 2.776445)  # of Student's t with 1 to 4 degrees
ELEMENTS = 1 << 18  # logits that are compared at a time


@dataclass(frozen=True)
class Estimate:
    """A mean per token, with the bounds of its 95 % interval: None for a single sample."""

    value: float
    low: float | None
    high: float | None

    def row(self) -> Json:
        return vars(self)

    @property
    def has_zero(self) -> bool:
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean_per_token(sums: Tensor, tokens: Tensor) -> Estimate:
    """m = Σ sums / Σ tokens over samples, and m ± t·√v.

    v = (N - 1)/N · Σ (mᵢ - m)², with mᵢ of all samples except i, because samples were drawn, and
    their lengths with them (the jackknife: Cochran, Sampling Techniques, 6.17); t: Student's, of
    N - 1 degrees. The linear approximation is too narrow if lengths differ much."""
    value, count = float(sums.sum() / tokens.sum()), len(sums)
    if count < 2:
        return Estimate(value, None, None)
    changes = (sums - value * tokens) / (tokens.sum() - tokens)
    width = student(count - 1) * float(changes.norm()) * math.sqrt((count - 1) / count)
    return Estimate(value, value - width, value + width)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-4 (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(FEW):
        return FEW[degrees - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / degrees**n for n, term in enumerate(terms, 1))


@dataclass
class SampleSums:
    """Sums over the tokens of each sample, in float64 and nats; a `Measure`."""

    count: int
    table: Tensor = field(init=False)  # (samples, 4): tokens, losses, divergences, same first token

    def __post_init__(self) -> None:
        self.table = torch.zeros(self.count, 4, dtype=torch.float64)

    def __call__(self, number: int, logits: Tensor, labels: Tensor, other: Tensor | None) -> None:
        """Add a sample's predictions. `other`: (n, vocabulary), a reference's."""
        row = torch.zeros(4, dtype=torch.float64)
        each = max(1, ELEMENTS // logits.shape[-1])
        for first in range(0, len(labels), each):
            here = slice(first, first + each)
            at, q = labels[here, None], logits[here].double().log_softmax(-1)
            row[0] += len(at)
            row[1] -= q.gather(-1, at).sum().cpu()
            if other is not None:  # in float32 the divergence of similar models would be noise
                p = other[here].double().log_softmax(-1)
                row[2] += (p.exp() * (p - q)).sum().cpu()
                row[3] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
        self.table[number] = row
        return_memory(0)  # else the thread of each sample keeps its own

    @property
    def tokens(self) -> Tensor:
        return self.table[:, 0]

    @property
    def losses(self) -> Tensor:
        return self.table[:, 1]


def score_row(sums: SampleSums, best: SampleSums, compared: bool) -> Json:
    """The numbers of one model; `best`: the sums of the model of least loss."""
    loss = mean_per_token(sums.losses, sums.tokens)
    row = {"loss": loss.row(), "perplexity": _exp(loss.value)}
    if sums is not best:
        more = mean_per_token(sums.losses - best.losses, sums.tokens)
        row["more"] = more.row() | {"within_noise": more.has_zero}
    if compared:
        row["kl"] = mean_per_token(sums.table[:, 2], sums.tokens).row()
        row["same_top1"] = float(sums.table[:, 3].sum() / sums.tokens.sum())
    return row


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
