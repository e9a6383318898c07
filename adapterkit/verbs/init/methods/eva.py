"""eva: a has the principal directions of the layer's inputs, b is zero; modules that they explain
best get more rank."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from adapterkit.core import options
from adapterkit.core.errors import Refused, Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import RedistributingInit

NOISE = 1e-12  # of the largest variance


@dataclass(frozen=True)
class Eva(RedistributingInit):
    """a = the principal directions of the centered inputs, b = 0: the delta is zero.

    Ranks are redistributed over the model. The first round(rank·rho) components of every module are
    candidates; those that explain the largest shares of their layer's variance are kept, as many as
    all ranks together. Among equal ones the first module's count, so that of modules with the same
    inputs the first has the largest rank. `adjust_scaling_factors`: alpha grows with the rank.
    `whiten`: each row of a is divided by the square root of its standard deviation σ.

    Unlike PEFT, whose components are of an incremental, randomized decomposition (`tau` stops it),
    these are exact. Its `whiten` divides by √(σ √tokens), which depends on how often it went
    through the data, and once for each of the modules with the same inputs."""

    rho: float = 2.0
    whiten: bool = False
    adjust_scaling_factors: bool = True

    name = "eva"
    source = "arXiv:2410.07170"
    needs = ("components", "variances", "variance")
    changes_base = False
    kinds = ("linear",)

    def __post_init__(self):
        options.checked("rho", options.number("at least 1", lambda value: value >= 1), self.rho)
        options.checked("whiten", options.FLAG, self.whiten)
        options.checked("adjust_scaling_factors", options.FLAG, self.adjust_scaling_factors)

    def candidates(self, modules: Iterable[tuple[Hashable, int, int]]) -> dict[Hashable, int]:
        most: dict[Hashable, int] = {}
        for components, rank, width in modules:
            most[components] = max(most.get(components, 0), min(round(rank * self.rho), width))
        return most

    def too_few(self, module: str, rank: int, stored: int, needed: int, where: str) -> Refused:
        return Refused(
            f"{stored} components of {shown(module)}",
            expected=f"at least {needed}: rank {rank} times rho {self.rho:g}",
            where=where,
            hint=f"collect them with components {needed}, or give a smaller rank or rho",
            code="AK106",
        )

    def new_alpha(self, alpha: float, rank: int, new_rank: int) -> float:
        return alpha * new_rank / rank if self.adjust_scaling_factors else alpha

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        components: Tensor,
        variances: Tensor,
        variance: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank), zeros if there are fewer components; weight (out, in), of
        which only the shape matters, components (k, in), variances (k,) and their total (1,)
        float32."""
        a = components[:rank]
        if self.whiten and variances[:1].any():
            # directions without variance would grow without bounds
            least = variances[0] * NOISE
            a = a / variances[:rank, None].clamp(min=least).sqrt().sqrt()
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        return a.contiguous(), a.new_zeros(len(weight), rank)

    def ratios(self, rank: int, variances: Tensor, variance: Tensor) -> list[float]:
        total, values = float(variance), variances[:rank].double().tolist()
        shares = [value / total for value in values] if total > 0 else []
        return [share for share in shares if share > NOISE * shares[0]]


def distribute(ratios: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Ranks of modules from the falling ratios that their components explain: how many of each are
    among the `budget` largest of all; fewer in total if there are not as many.

    Raises `Unrecoverable` if there are none."""
    pool = [(ratio, module) for module, its in enumerate(ratios) for ratio in its]
    pool.sort(key=lambda pair: -pair[0])
    if not pool:
        raise Unrecoverable(
            "no variance in any module's inputs",
            expected="inputs that differ",
            where="statistics",
            hint="collect the statistics on more texts",
            code="AK106",
        )
    ranks = [0] * len(ratios)
    for _, module in pool[:budget]:
        ranks[module] += 1
    return ranks
