"""One number of the losses of all samples, and how sure a difference of two is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SOFT = 0.05  # nats: files this much below the worst count e times less


@dataclass(frozen=True)
class Balance:
    """How the losses of files (files,) become one: see `balance` of fit. `files` (samples,):
    numbers of the samples' files; `weights` (samples,): their shares of these; `shares` (files,),
    1 together: of the files in what is a mean over them; `own` and `base`: of each file the loss of
    its adapter and of the base, for `retention`."""

    is_worst: bool
    files: Tensor
    weights: Tensor
    shares: Tensor
    own: Tensor | float = 0.0
    base: Tensor | float = 1.0

    def by_file(self, losses: Tensor) -> Tensor:
        """Of losses (samples,) those of the files, in nats per token."""
        return losses.new_zeros(len(self.shares)).index_add(0, self.files, self.weights * losses)

    def of_files(self, by_file: Tensor) -> Tensor:
        if self.is_worst:
            return SOFT * torch.logsumexp(by_file / SOFT, 0)
        return self.shares @ ((by_file - self.own) / (self.base - self.own))

    def value(self, losses: Tensor) -> float:
        """What is minimized, of losses (samples,)."""
        return float(self.of_files(self.by_file(losses)))

    def slopes(self, losses: Tensor) -> Tensor:
        """d value / d by_file (files,)."""
        return torch.func.grad(self.of_files)(self.by_file(losses))

    def error(self, before: Tensor, after: Tensor) -> float:
        """The standard error of value(before) - value(after), of paired samples: within files, or
        over all samples where a file has one alone."""
        weights = self.slopes(before)[self.files] * self.weights
        has_pairs = int(self.files.bincount().min()) > 1
        groups = self.files if has_pairs else torch.zeros_like(self.files)
        change, total = before - after, 0.0
        for number in groups.unique():
            its = groups == number
            spread = weights[its] * (change[its] - change[its].mean())
            total += float(spread.square().sum()) * len(spread) / (len(spread) - 1)
        return math.sqrt(total)
