"""Protocols of inits: frozen records whose fields are their options. The factors are drawn from
random numbers alone, or computed from the weight and statistics of a layer. Shapes are those of the
file: a (r, in), b (out, r)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import ClassVar

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.registry import STABLE, Tier

Pair = tuple[Tensor, Tensor]  # a and b, float32


class Initialization(ABC):
    """Constants of every init. A record has no other public attributes, because a misspelt one is
    refused."""

    name: ClassVar[str]  # the name that users type
    source: ClassVar[str]  # the paper
    tier: ClassVar[Tier] = STABLE
    # inputs of the factors: the weight, and kinds of statistics
    needs: ClassVar[tuple[str, ...]] = ()
    changes_base: ClassVar[bool]  # the base becomes W - scale·b@a
    # the layers on which it is defined
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "conv", "experts")
    fixed: ClassVar[tuple[str, ...]] = ()  # factors that are not trained

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            return
        known = {name for base in cls.__mro__[1:] for name in (*vars(base), *_annotated(base))}
        unknown = {name for name in vars(cls) if name[0] != "_"} - known - {*_annotated(cls)}
        if unknown:
            raise TypeError(
                f"{cls.__name__} has attributes that no init has: {', '.join(sorted(unknown))}"
            )


def _annotated(cls: type) -> Iterable[str]:
    return inspect.get_annotations(cls)


class DrawnInit(Initialization):
    """An init from random numbers alone."""

    zero_b: ClassVar[bool]  # b is zero

    @abstractmethod
    def draw(
        self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator
    ) -> Pair: ...

    def start(
        self,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        generator: torch.Generator,
        embedding: bool,
    ) -> Pair:
        """a and b of a layer. On an embedding, the zero factor is the one that is looked up, as in
        LoRA's own code."""
        if embedding and self.zero_b:
            return torch.zeros(a_shape), torch.randn(b_shape, generator=generator)
        return self.draw(a_shape, b_shape, generator)


class ComputedInit(Initialization):
    """An init from a layer's weight, or statistics of it."""

    triplets_per_rank: ClassVar[int] = 1  # singular triplets of the weight
    # (weight (out, in), rank, scale, **statistics by their kinds); the weight has no values where
    # it is not needed. ValueError for statistics that it cannot use
    factors: Callable[..., Pair]

    @property
    def draws(self) -> bool:
        """True if `factors` takes a `generator`."""
        return False

    def start(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        statistics: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Pair:
        """a and b of a layer."""
        drawn = {"generator": generator} if self.draws else {}
        return self.factors(weight, rank, scale, **statistics, **drawn)


class RedistributingInit(ComputedInit):
    """An init that gives ranks to the layers whose input components explain most."""

    @abstractmethod
    def candidates(self, modules: Iterable[tuple[Hashable, int, int]]) -> dict[Hashable, int]:
        """The number of components in the redistribution, by the owner of the components: the
        largest number that a module of that owner needs.

        `modules`: (owner of the components, rank, in) of each."""

    @abstractmethod
    def too_few(self, module: str, rank: int, stored: int, needed: int, where: str) -> Refused:
        """The refusal of a file with fewer components than the redistribution needs."""

    @abstractmethod
    def ratios(self, rank: int, variances: Tensor, variance: Tensor) -> list[float]:
        """The falling shares of a layer's variance that its first components explain; none without
        variance."""

    @abstractmethod
    def new_alpha(self, alpha: float, rank: int, new_rank: int) -> float:
        """alpha after the redistribution."""
