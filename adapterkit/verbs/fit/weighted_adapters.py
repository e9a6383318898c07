"""Apply all adapters to one model, each with a coefficient at each module."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Problems
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.runtime.layers.linear import LinearPatch
from adapterkit.runtime.layers.parameter import ParameterPatch, is_transposed, of_parameter
from adapterkit.runtime.load.reading import StoredAdapter, join_folder
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.state import State
from adapterkit.verbs.look.heatmaps import place_of

NAME = "fit"  # of the patches at the sites
ENDS = {"adapter": 1, "layer": 2, "module": 3}  # of a coefficient's owner


@dataclass
class Acting:
    """The coefficients (all,) of a pass, and those of a teacher, whose states are appended to the
    pass's own rows in the head."""

    own: Tensor
    teacher: Tensor | None = None


class WeightedFactors(FactorsPatch):
    """y + b·(g ⊙ a·x): the stacked factors of all adapters of a module; g: the coefficients of a's
    rows for the current pass."""

    weighted_model: "WeightedModel"
    columns: Tensor  # of the coefficients, for each of a's rows: (R,), or (experts, R)

    def joined(self) -> tuple[Tensor, Tensor]:
        return self._of(self.weighted_model.acting.own)

    def _of(self, c: Tensor) -> tuple[Tensor, Tensor]:
        gain = c.to(self.b.device)[self.columns.to(self.b.device)].to(self.b)
        is_stack = self.b.ndim == 3 and self.rank_axes == (-2, -1)
        shape = (-1, 1, gain.shape[-1]) if is_stack else (-1, *(1 for _ in self.b.shape[2:]))
        return self.a, self.b * gain.view(shape)

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.weighted_model.seen is not None and self.is_matrix:
            self.weighted_model.seen.add(self.site.path, F.linear(x, self.a))
        acting = self.weighted_model.acting
        if acting.teacher is None or self.host is not self.weighted_model.head:
            return y + self.product(x, *self.joined())
        halves = zip(x.chunk(2), (acting.own, acting.teacher), strict=True)
        return y + torch.cat([self.product(half, *self._of(c)) for half, c in halves])


class ActivationGram:
    """E[u uᵀ] (R, R) of u = a·x by module, all tokens alike."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = Counter[str]()

    def add(self, path: str, u: Tensor) -> None:
        u = u.reshape(-1, u.shape[-1]).double()
        self.sums[path] = self.sums.get(path, 0) + (u.T @ u).cpu()
        self.counts[path] += len(u)

    def mean(self, path: str) -> Tensor | None:
        return self.sums[path] / self.counts[path] if path in self.sums else None


@cache
def weighted_kind(kind: type[FactorsPatch]) -> type[WeightedFactors]:
    """The class of these layers with coefficients."""
    return type(f"Weighted{kind.__name__}", (WeightedFactors, kind), {})


@dataclass
class WeightedModule:
    """A module or a parameter, the factors that adapters (by their numbers) have there, and its
    first coefficient. Each adapter has one, or one for each singular triplet."""

    path: str
    leaf: str | None
    kind: type[FactorsPatch]
    members: dict[int, Factors] = field(default_factory=dict)
    first: int = 0
    patch: WeightedFactors | None = None

    @property
    def name(self) -> str:
        """The name in files of weights."""
        return self.path if self.leaf is None else f"{self.path}.{self.leaf}"

    def counts(self, directions: bool) -> list[int]:
        """Coefficients of each member."""
        return [one.count if directions else 1 for one in self.members.values()]


class WeightedModel:
    """Adapters joined with a model whose parameters are loaded later; `directions`: each singular
    triplet has a coefficient."""

    acting: Acting
    seen: ActivationGram | None = None  # collects the modules' inputs, if set

    def __init__(self, model: nn.Module, folders: tuple[Folder, ...]):
        self.model, self.folders, self.directions = model, folders, False
        self.state = State(model)
        errors = Problems()
        self.adapters: list[StoredAdapter] = []
        for number, folder in enumerate(folders):
            with errors.collected():
                self.adapters.append(join_folder(self.state, folder, number))
        errors.raise_all()
        self.places = self._places()
        self.number(False)

    def _places(self) -> list[WeightedModule]:
        found: dict[tuple[str, str | None], WeightedModule] = {}
        for number, stored in enumerate(self.adapters):
            own = [*stored.factors, *((self._kind(one), one) for one in stored.parameters)]
            for kind, factors in own:
                key = factors.module, factors.leaf
                place = found.setdefault(key, WeightedModule(*key, kind))
                place.members[number] = factors
        order = {name: number for number, name in enumerate(self.state.modules)}
        return sorted(found.values(), key=lambda place: order[place.path])

    @cached_property
    def head(self) -> Any:
        """The module that predicts from the last hidden states; None if the model names none."""
        model: Any = self.model
        return model.get_output_embeddings()

    def _kind(self, factors: Factors) -> type[FactorsPatch]:
        """The class for a parameter; the head's weight acts on rows, because some may be a
        teacher's."""
        host = self.state.modules[factors.module]
        is_head = host is self.head and isinstance(host, nn.Linear)
        return LinearPatch if is_head and factors.leaf == "weight" else ParameterPatch

    def number(self, directions: bool) -> None:
        """Give each member its coefficients: one, or one for each triplet."""
        self.directions, first = directions, 0
        for place in self.places:
            place.first = first
            first += sum(place.counts(directions))
        self.size = first
        vars(self).pop("owners", None)

    def expanded(self, c: Tensor) -> Tensor:
        """Coefficients of members, repeated for each of their coefficients."""
        counts = [n for place in self.places for n in place.counts(self.directions)]
        return c.repeat_interleave(torch.tensor(counts, device=c.device))

    @cached_property
    def owners(self) -> list[tuple[int, str, str]]:
        """The adapter, layer (or the module outside of layers) and module of each coefficient."""
        return [
            (number, place_of(place.name)[0] or place.name, place.name)
            for place in self.places
            for number, count in zip(place.members, place.counts(self.directions), strict=True)
            for _ in range(count)
        ]

    def count(self, level: str) -> int:
        """The number of coefficients of a level."""
        if level == "direction":
            return sum(sum(place.counts(True)) for place in self.places)
        return len({owner[: ENDS[level]] for owner in self.owners})

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the adapters; they act once their values are loaded."""
        for place in self.places:
            host = self.state.modules[place.path]
            more: dict[str, Any] = {}
            if place.leaf is not None and place.kind is ParameterPatch:
                transposed = is_transposed(host, place.leaf)
                more = {"leaf": place.leaf, "transposed": transposed, "depth": 0}
            empty = torch.empty(0, device="meta")
            place.patch = weighted_kind(place.kind)(NAME, empty, empty, 1.0, **more)
            place.patch.weighted_model = self
            if place.leaf is not None and not more:
                place.patch.role = f"delta:{place.leaf}"  # the module may have factors, too
            self.state.site(place.path).add(place.patch.eval())
        for site in self.state.sites.values():
            site.select({NAME: 1.0})
        try:
            yield
        finally:
            for site in list(self.state.sites.values()):
                site.remove(NAME)
                site.leave()
            self.state.sites.clear()

    def load(
        self, places: Sequence[WeightedModule], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read factors, at least in float32."""
        with Sources(self.folders, {}) as sources:
            reader = LocalReader(sources, device, dtype=None)
            for place in places:
                assert place.patch is not None
                self._fill(place, place.patch, reader, torch.promote_types(dtype, torch.float32))

    def _fill(
        self, place: WeightedModule, patch: WeightedFactors, reader: LocalReader, dtype: torch.dtype
    ) -> None:
        host, at = self.state.modules[place.path], place.first
        a_axis, b_axis = patch.rank_axes
        rows, outputs, columns = [], [], []
        counts = place.counts(self.directions)
        for factors, count in zip(place.members.values(), counts, strict=True):
            a, b = reader.tensor(factors.a).to(dtype), reader.tensor(factors.b).to(dtype)
            if place.leaf is not None:
                a, b = of_parameter(factors, host, a, b)
            own = torch.arange(at, at + count)
            if self.directions:
                is_stack = a_axis < 0 and a.ndim == 3
                a, b = _triplets(a, b, is_stack)
                own = own.view(len(a), -1) if is_stack else own
            rows.append(a)
            outputs.append(b * factors.scale)
            columns.append(own if self.directions else own.expand(a.shape[a_axis]))
            at += count
        patch.a = nn.Parameter(torch.cat(rows, a_axis), False)
        patch.b = nn.Parameter(torch.cat(outputs, b_axis), False)
        patch.columns = torch.cat(columns, -1)

    def free(self, places: Sequence[WeightedModule]) -> None:
        for place in places:
            assert place.patch is not None
            empty = nn.Parameter(torch.empty(0, device="meta"), False)
            place.patch.a = place.patch.b = empty

    def zeros(self) -> set[int]:
        """The adapters whose deltas are all zero."""
        with Sources(self.folders, {}) as sources:
            read = LocalReader(sources, torch.device("cpu"), dtype=None).tensor
            acts = lambda one: bool(read(one.a).any()) and bool(read(one.b).any())
            factors = {
                n: [p.members[n] for p in self.places if n in p.members]
                for n in range(len(self.folders))
            }
            return {n for n, its in factors.items() if not any(map(acts, its))}


def _triplets(a: Tensor, b: Tensor, is_stack: bool = False) -> tuple[Tensor, Tensor]:
    """a and b with one row and column for each singular value of b·a."""
    if is_stack:
        pairs = [_triplets(*each) for each in zip(a, b, strict=True)]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
    u, s, vh = algebra.svd(Product(b.flatten(1).double(), a.flatten(1).double()))
    right, left = (s[:, None] * vh).view(-1, *a.shape[1:]), u.view(len(b), -1, *b.shape[2:])
    return right.to(a.dtype), left.to(b.dtype)
