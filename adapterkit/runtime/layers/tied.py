"""Factors that a tied head shares with the embedding (PEFT's ensure_weight_tying)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.runtime.layers.embedding import EmbeddingPart
from adapterkit.runtime.layers.linear import LinearPart
from adapterkit.runtime.parts.memo import Memo
from adapterkit.runtime.site import Part


class TiedHeadPart(LinearPart):
    """The embedding's delta (V, D) on the head's output: a is its bᵀ (r, D), b its aᵀ (V, r).

    It has no parameters of its own, so both stay shared during training in any dtype (PEFT's
    separate when it casts bf16 and fp16 to float32), and merging adds the delta once to each."""

    mixes_rows = False
    _source: tuple[EmbeddingPart]

    def __init__(self, source: EmbeddingPart, dropout: float):
        nn.Module.__init__(self)
        # in a tuple: no child of this part, whose parameters they would be
        self._source = (source,)
        self.adapter, self.dropout = source.adapter, dropout
        self.bias = self.magnitude = None
        for name in ("initial_a", "initial_b"):
            self.register_buffer(name, None)
        self._folded, self._directed = Memo(), Memo(waits=True)

    # an attribute of the other parts; the embedding's, which `take` and `pad` change there
    @property
    def padded(self) -> tuple[int, float] | None:  # type: ignore[override]
        return self._source[0].padded

    def __getattr__(self, name: str) -> Any:
        if name in ("a", "b", "scale"):
            source = self._source[0]
            return source.scale if name == "scale" else (source.b if name == "a" else source.a).T
        return super().__getattr__(name)

    def _with_factors(self, a: Tensor, b: Tensor) -> LinearPart:
        twin = LinearPart(self.adapter, a, b, self._source[0].stored_scale, dropout=self.dropout)
        object.__setattr__(twin, "_host", self._host)
        return twin

    def rescale(self, factor: float) -> None:
        """Do nothing, because the embedding's part does it."""

    def take(self, other: Part) -> None:
        """Do nothing, because the embedding's part does it."""

    def pad(self, rank: int) -> None:
        """Do nothing, because the embedding's part does it."""

    def set_own(self, rank: int, scale: float) -> None:
        """Do nothing, because the embedding's part does it."""

    def _apply(self, fn: object, recurse: bool = True) -> Any:
        return self


def share(
    parts: Sequence[tuple[str, Part]], heads: Mapping[str, str], dropout: float
) -> list[tuple[str, Part]]:
    """The parts by path, with parts of `heads` that share the factors of their embeddings."""
    sources = {path: part for path, part in parts if isinstance(part, EmbeddingPart)}
    return [
        (path, TiedHeadPart(sources[heads[path]], dropout))
        if path in heads and isinstance(part, LinearPart)
        else (path, part)
        for path, part in parts
    ]


def shared_heads(
    parts: Sequence[tuple[str, Part]], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Head -> the embedding that it shares its weight with, if their factors have equal values and
    no magnitudes, because DoRA's are on different axes."""
    return {
        head: embedding
        for head, part, embedding, source in both_sides(parts, modules)
        if part.magnitude is None is source.magnitude
        if part.scale == source.scale
        if torch.equal(part.a, source.b.T) and torch.equal(part.b, source.a.T)
    }


def both_sides(
    parts: Sequence[tuple[str, Part]], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, LinearPart, str, EmbeddingPart]]:
    """Factors of heads, and of the embeddings that they share weights with."""
    weights = {path: modules[path]._parameters.get("weight") for path, _ in parts}
    heads = [(path, part) for path, part in parts if isinstance(part, LinearPart)]
    sources = [(path, part) for path, part in parts if isinstance(part, EmbeddingPart)]
    for (head, part), (embedding, source) in itertools.product(heads, sources):
        if weights[head] is weights[embedding]:
            yield head, part, embedding, source
