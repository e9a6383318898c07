"""Objectives of a fit: the loss of the tokens that count, or the distance of the predictions from
those of each file's own adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.verbs.stats.data.masks import IGNORED
from adapterkit.verbs.stats.model.coroutines import Coroutine
from adapterkit.verbs.stats.model.predictions import Predictions

if TYPE_CHECKING:
    from adapterkit.verbs.fit.runs import FitBatch
    from adapterkit.verbs.fit.weighted_adapters import WeightedModel

STATES = 0.1  # weight of the last hidden states, relative to the predictions
LARGEST = 65504.0  # of float16


@dataclass
class Objective(Predictions):
    """The model's own loss of each sample, the mean over its tokens that count, in nats."""

    def losses(self, batch: "FitBatch") -> Tensor:
        """(rows,)"""
        logits, labels = self.logits(batch.inputs), batch.inputs["labels"]
        if labels.ndim < 2:  # one for each input
            return F.cross_entropy(logits, labels, reduction="none")
        labels = self.targets(labels)
        options = {"ignore_index": IGNORED, "reduction": "none"}
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
        return losses.view_as(labels).sum(1) / (labels != IGNORED).sum(1)

    @contextmanager
    def watching(self, weighted_model: "WeightedModel") -> Iterator[None]:
        """Observe the model's calls as far as the objective needs it."""
        yield


@dataclass
class TeacherObjective(Objective):
    """KL(p ‖ q) of each sample, the mean over the positions whose label counts, and STATES·‖h - t‖²
    / ‖t‖² of the last hidden states. p and t are a teacher's. Only its states are kept, in 16 bits:
    the head predicts from them again, with the teacher's adapters, in the same call. For a model
    without a named head, a classifier, the predictions are kept."""

    weighted_model: "WeightedModel" = field(init=False)

    states: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: dict[Coroutine | None, Tensor] = field(default_factory=dict)  # by the pass
    added: dict[Coroutine | None, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, weighted_model: "WeightedModel") -> Iterator[None]:
        self.weighted_model, head = weighted_model, weighted_model.head
        if head is None:
            yield
            return

        def record_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            one, (x,) = Coroutine.current(), args
            self.seen[one] = x
            other = self.added.get(one)
            return (x if other is None else torch.cat([x, other.to(x)]),)

        hook = head.register_forward_pre_hook(record_input)
        try:
            yield
        finally:
            hook.remove()

    def look(self, batch: "FitBatch") -> Tensor:
        """Keep the states of a batch, with only the teacher active, and its coefficients of
        members; return (rows,) zeros."""
        logits = self.logits(batch.inputs)
        states = self.seen.pop(Coroutine.current(), logits).detach()
        short = torch.float16 if float(states.abs().max()) < LARGEST else torch.bfloat16
        self.states[batch.samples] = (
            states.to("cpu", short),
            self.weighted_model.acting.own.detach(),
        )
        return torch.zeros(len(states))

    def losses(self, batch: "FitBatch") -> Tensor:
        """(rows,)"""
        one, (states, c) = Coroutine.current(), self.states[batch.samples]
        self.added[one] = states
        self.weighted_model.acting.teacher = self.weighted_model.expanded(c)
        both = self.logits(batch.inputs)
        del self.added[one]
        logits, theirs = (
            (both, states.to(both)) if self.weighted_model.head is None else both.chunk(2)
        )
        own, states = self.seen.pop(one, logits), states.to(logits)
        counts = self.targets(batch.inputs["labels"]) != IGNORED
        p, q = theirs.log_softmax(-1), logits.log_softmax(-1)
        apart = (p.exp() * (p - q)).sum(-1)
        sums = lambda values: values.reshape(len(counts), -1).sum(1)
        error = sums(((own - states) * counts[..., None]).square())
        size = sums((states * counts[..., None]).square())
        return sums(apart * counts) / sums(counts) + STATES * error / size
