"""Factors that a tied head shares with the embedding (PEFT's ensure_weight_tying)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.runtime.layers.embedding import EmbeddingPatch
from adapterkit.runtime.layers.linear import LinearPatch
from adapterkit.runtime.patches.memo import Memo
from adapterkit.runtime.site import Patch


class TiedHeadPatch(LinearPatch):
    """The embedding's delta (V, D) on the head's output: a is its bᵀ (r, D), b its aᵀ (V, r).

    It has no parameters of its own, so both stay shared during training in any dtype (PEFT's
    separate when it casts bf16 and fp16 to float32), and merging adds the delta once to each."""

    mixes_rows = False
    _source: tuple[EmbeddingPatch]

    def __init__(self, source: EmbeddingPatch, dropout: float):
        nn.Module.__init__(self)
        # in a tuple: no child of this patch, whose parameters they would be
        self._source = (source,)
        self.adapter, self.dropout = source.adapter, dropout
        self.bias = self.magnitude = None
        for name in ("initial_a", "initial_b"):
            self.register_buffer(name, None)
        self._folded, self._directed = Memo(), Memo(waits=True)

    # an attribute of the other patches; the embedding's, which `take` and `pad` change there
    @property
    def padded(self) -> tuple[int, float] | None:  # type: ignore[override]
        return self._source[0].padded

    def __getattr__(self, name: str) -> Any:
        if name in ("a", "b", "scale"):
            source = self._source[0]
            return source.scale if name == "scale" else (source.b if name == "a" else source.a).T
        return super().__getattr__(name)

    def _with_factors(self, a: Tensor, b: Tensor) -> LinearPatch:
        twin = LinearPatch(self.adapter, a, b, self._source[0].stored_scale, dropout=self.dropout)
        object.__setattr__(twin, "_host", self._host)
        return twin

    def rescale(self, factor: float) -> None:
        """Do nothing, because the embedding's patch does it."""

    def take(self, other: Patch) -> None:
        """Do nothing, because the embedding's patch does it."""

    def pad(self, rank: int) -> None:
        """Do nothing, because the embedding's patch does it."""

    def set_own(self, rank: int, scale: float) -> None:
        """Do nothing, because the embedding's patch does it."""

    def _apply(self, fn: object, recurse: bool = True) -> Any:
        return self


def share(
    patches: Sequence[tuple[str, Patch]], heads: Mapping[str, str], dropout: float
) -> list[tuple[str, Patch]]:
    """The patches by path, with patches of `heads` that share the factors of their embeddings."""
    sources = {path: patch for path, patch in patches if isinstance(patch, EmbeddingPatch)}
    return [
        (path, TiedHeadPatch(sources[heads[path]], dropout))
        if path in heads and isinstance(patch, LinearPatch)
        else (path, patch)
        for path, patch in patches
    ]


def shared_heads(
    patches: Sequence[tuple[str, Patch]], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Head -> the embedding that it shares its weight with, if their factors have equal values and
    no magnitudes, because DoRA's are on different axes."""
    return {
        head: embedding
        for head, patch, embedding, source in both_sides(patches, modules)
        if patch.magnitude is None is source.magnitude
        if patch.scale == source.scale
        if torch.equal(patch.a, source.b.T) and torch.equal(patch.b, source.a.T)
    }


def both_sides(
    patches: Sequence[tuple[str, Patch]], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, LinearPatch, str, EmbeddingPatch]]:
    """Factors of heads, and of the embeddings that they share weights with."""
    weights = {path: modules[path]._parameters.get("weight") for path, _ in patches}
    heads = [(path, patch) for path, patch in patches if isinstance(patch, LinearPatch)]
    sources = [(path, patch) for path, patch in patches if isinstance(patch, EmbeddingPatch)]
    for (head, patch), (embedding, source) in itertools.product(heads, sources):
        if weights[head] is weights[embedding]:
            yield head, patch, embedding, source
