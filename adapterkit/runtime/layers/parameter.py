"""Factors of a parameter: a matrix of any module, or a stack of experts' matrices."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.keys import part_keys
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.engine.device import with_float64
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.merge.sites import JoinedSite, flips_square_experts, sites_of
from adapterkit.core.weights.layers import is_linear, is_taken_for_experts
from adapterkit.kernels.lazy_sum import LowRankSum, Term, summed
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.site import Patch, Values
from adapterkit.runtime.site import Site as LiveSite
from adapterkit.verbs.shared.targets import PARAMETER, model_type

# transformers' implementations of experts in plain torch; others are kernels, which need tensors
PLAIN_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
FACTORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HINT = "write the peft_version that trained it into adapter_config.json"


class ParameterPatch(FactorsPatch):
    """Replaces a parameter W of a module by W + weight·scale·b·a while the module runs.

    W (out, in): a (r, in), b (out, r). Experts W (E, out, in): a (E, r, in), b (E, out, r), so that
    each expert's factors are contiguous; with `is_transposed` experts are (E, in, out) and the
    delta is (b·a)ᵀ. A file has a (E·r, in), the expert slowest, and b (out, r·E), the expert
    fastest (PEFT 0.19). Unlike PEFT, the sum is not computed if the module only multiplies with its
    parameter, and factors keep their dtype.
    """

    kind, rank_axes = PARAMETER, (-2, -1)

    def __init__(
        self,
        adapter: str,
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        leaf: str,  # the parameter's own name
        transposed: bool = False,
        depth: int = 0,  # how many further parameters of the module the adapter has after this one
    ):
        super().__init__(adapter, a, b, scale)
        self.leaf, self.transposed, self.depth = leaf, transposed, depth
        self.role, self.is_read = f"weight:{leaf}", False

    def target(self, path: str) -> str:
        return f"{path}.{self.leaf}"

    def named(self, path: str) -> str:
        return self.target(path)

    def term(self, weight: float) -> Term:
        """weight·scale·b·a in the parameter's layout, as a product."""
        (a, b), scale = self.joined(), self.scale
        if isinstance(scale, Tensor):
            b, scale = b * scale, 1.0
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return Term(left, right, scale * weight)

    def change(self, values: Values, weight: float) -> None:
        value, term = values[self.leaf], self.term(weight)
        if _multiplies(self.host) and value.dtype in FACTORED:
            sums = isinstance(value, LowRankSum)
            terms = (*value.terms, term) if sums else (term,)
            values[self.leaf] = LowRankSum(value.weight if sums else value, terms)
        else:
            values[self.leaf] = summed(value, [term])

    def check(self, values: Values) -> None:
        """`Refused` if the host did not read its parameter, because another module reads it
        unchanged."""
        self.is_read = self.is_read or getattr(values[self.leaf], "is_read", True)
        if not self.is_read:
            name = type(self.host).__name__
            raise Refused(
                f"{name} does not read {shown(self.leaf)} in its forward",
                expected="parameters that their own module multiplies with",
                where="parameters",
                hint="remove it from parameters, because another module reads it without the "
                "adapter",
                code="AK801",
            )

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).mT if self.transposed else b @ a

    @torch.no_grad()
    def norm(self) -> float:
        """‖scale·b·a‖, Frobenius: Σ <bᵀb, a·aᵀ>, without the product."""
        a, b = (f.to(with_float64(f.device), torch.float64) for f in self.joined())
        return abs(float(self.scale)) * math.sqrt(max(float((b.mT @ b * (a @ a.mT)).sum()), 0.0))

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        value, (left, right, scale) = values[self.leaf], self.term(weight)
        left, right = left.to(value.dtype), right.to(value.dtype)
        (value.baddbmm_ if value.ndim == 3 else value.addmm_)(left, right, alpha=scale)

    def unmergeable(self, site: LiveSite, weight: float) -> str | None:
        return None

    def stored(self, path: str) -> dict[str, Tensor]:
        keys = part_keys(path, depth=self.depth)
        a, b = self.stored_factors()
        if a.ndim == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        return {keys["a"]: a, keys["b"]: b}


def is_stack(patch: Patch) -> bool:
    """Return whether a patch is on experts' matrices."""
    return isinstance(patch, ParameterPatch) and patch.a.ndim == 3


def takes_indices(host: nn.Module) -> bool:
    """Return whether experts get all tokens in order with an index of experts for each; others get
    tokens sorted by expert, or run once per expert."""
    names = list(inspect.signature(type(host).forward).parameters)
    return any(name.endswith(("_index", "_indices")) for name in names[2:])


def _multiplies(host: nn.Module) -> bool:
    """Return whether a module's code uses only operations of torch."""
    implementation = getattr(getattr(host, "config", None), "_experts_implementation", None)
    return implementation in PLAIN_EXPERTS


def is_transposed(host: nn.Module, leaf: str) -> bool:
    """Return whether a parameter's matrices are (in, out), for a stack by the module's class."""
    parameter = host._parameters[leaf]
    assert parameter is not None
    return parameter.ndim == 3 and bool(getattr(host, "is_transposed", False))


class ModelParameters:
    """A live model's parameters by name."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]):
        self.label, self.modules = type(model).__name__, modules

    def parameter(self, name: str) -> nn.Parameter | None:
        module, _, leaf = name.rpartition(".")
        return self.modules[module]._parameters.get(leaf)


def of_parameter(factors: Factors, host: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b in the patch's layout; a file stores experts' as a (E * r, in) and b (out, r * E)."""
    parameter = host._parameters[factors.leaf or ""]
    assert parameter is not None
    if parameter.ndim == 3:
        experts = len(parameter)
        a = a.unflatten(0, (experts, -1))
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
    return (b.mT.contiguous(), a.mT.contiguous()) if factors.flip else (a, b)


def split_parameters(
    adapter: Adapter, model: nn.Module, modules: Mapping[str, nn.Module], errors: Problems
) -> tuple[list[Lora], list[Factors]]:
    """Split an adapter's factors into those of modules and those of parameters; factors that do not
    fit the model's parameters are added to the errors."""
    of_modules: list[Lora] = []
    of_parameters: list[Factors] = []
    parameters = ModelParameters(model, modules)
    by_module: dict[str, list[Lora]] = {}
    for lora in adapter.loras:
        by_module.setdefault(lora.module, []).append(lora)
    for module, loras in by_module.items():
        host = modules.get(module)
        own = [] if host is None else list(host._parameters)
        leaves = adapter.leaves(module, own)
        is_layer = host is not None and is_linear(host)  # a router is none
        if leaves == ["weight"] and is_layer and is_taken_for_experts(model_type(model), module):
            leaves = []  # a linear layer, as `writing` writes it
        if host is None or not (leaves or any(lora.depth for lora in loras)):
            of_modules += loras
            continue
        with errors.collected():
            sites = sites_of(module, {0: loras}, {0: leaves}, {0: adapter}, own, parameters)
            of_parameters += [_stored(adapter, site, host) for site in sites]
    return of_modules, of_parameters


def _stored(adapter: Adapter, site: JoinedSite, host: nn.Module) -> Factors:
    """A file's factors of one parameter, and whether in and out are exchanged, as by PEFT up to
    0.18."""
    factors = site.members[0]
    assert site.leaf is not None
    parameter, transposed = host._parameters[site.leaf], is_transposed(host, site.leaf)
    assert parameter is not None
    out, columns = factors.shape
    if parameter.ndim == 2:
        flip = False
    elif out == columns:
        flip = flips_square_experts(adapter, site.name, transposed, None, HINT) != transposed
    else:
        flip = (parameter.shape[1:] == (columns, out)) != transposed
    return replace(factors, flip=flip)
