"""A base that a verb changes together with the adapter that goes with it: what both outputs share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapter import PREFIX
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused
from adapterkit.factors import Place
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Svd
from adapterkit.ops import produced
from adapterkit.patterns import matcher
from adapterkit.plan import Bundle, Inputs, Made
from adapterkit.weights.names import Names


@dataclass(frozen=True)
class Scaling:
    """What the factors' product is multiplied by: alpha / rank, or alpha / √rank; alpha is the rank unless it is given."""

    rank: int
    alpha: float | None
    rslora: bool

    @property
    def given(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.given / (math.sqrt(self.rank) if self.rslora else self.rank)


def targeted(targets: str | None, keys: Sequence[str]) -> list[str]:
    """Of weights' keys those whose module the regex matches."""
    if targets is None:
        return list(keys)
    wanted = matcher(targets, "--targets")
    found = [key for key in keys if wanted(key.removesuffix(".weight"))]
    if not found:
        do = "check the regex"
        raise Refused(f"--targets {targets!r} matches none", expected="a quantised module", where="--targets", do=do)
    return found


def module_of(names: Names, module: str) -> str:
    """The module's name in the loaded model, whose weight is stored under the key `module.weight`."""
    key = f"{module}.weight"
    if names.model is None or key in names.model.parameters:
        return module
    found = (name for name, p in names.model.parameters.items() if len(p.slots) == 1 and p.slots[0].key == key)
    return next(found, key).removesuffix(".weight")


def place_of_linear(module: str, shape: tuple[int, ...]) -> Place:
    """Where the factors of a linear layer (out, in) go."""
    return Place(f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight", (shape[1],), (), shape[0], None)


def adapter_of(base: Checkpoint, factors: Sequence[Bundle], scaling: Scaling, summary: str, folder: str = "") -> produced.Output:
    """The adapter of these factors, for a base made from this one."""
    modules = {bundle.name: bundle.name for bundle in factors}
    settings = produced.plain_settings() | {"use_rslora": scaling.rslora}
    kept = {"base_model_name_or_path": produced.hub_id(base.folder), "task_type": produced.task_type(base.config)}
    return produced.Output([], factors, modules, settings, summary, folder, alpha=scaling.given, kept=kept)


def factors_of(svd: Svd, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) with scale·b@a = u s vᵀ, norms balanced."""
    a, b = lowrank.refit(Svd(svd.u, svd.s / scale, svd.vh), rank)
    return a.contiguous(), b.contiguous()


@dataclass(frozen=True)
class FromAside:
    """One module's factors, made with its quantised weight."""

    name: str
    place: Place
    rank: int
    dtype: str
    reads = ()

    @property
    def most(self) -> tuple[Stored, ...]:
        return produced.bounds(self.place, self.rank, self.dtype)

    @property
    def memory(self) -> int:
        return 3 * sum(stored.nbytes for stored in self.most)

    def make(self, inputs: Inputs) -> Made:
        a, b = (inputs.aside(f"{self.name}.{side}") for side in "ab")
        dtype = dtypes.torch_dtype(self.dtype)
        return Made({self.place.a_key: a.to(dtype), self.place.b_key: b.to(dtype)}, {"rank": len(a)})
