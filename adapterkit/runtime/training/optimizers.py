"""Optimizers for an adapter's factors: LoRA+, LoRA-FA and Riemannian preconditioning.

Each takes all trainable adapters of a handle, active or not, and other trained parameters.
"""

# torch's functions of lists of tensors, one launch on a GPU for all, begin with an underscore
# pyright: reportPrivateImportUsage=false

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterkit.core.errors import Problems, Refused
from adapterkit.core.records import Json
from adapterkit.core.registry import experimental
from adapterkit.kernels.block_sizes import piece
from adapterkit.runtime.handle import Adapters
from adapterkit.runtime.layers.parameter import ParameterPatch
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.memo import bits_of, same
from adapterkit.runtime.sharding import full_tensor, is_sharded, spread
from adapterkit.runtime.site import Patch, Site

T = TypeVar("T")
CACHED = 1 << 18  # values of parameters that a CPU computes with together
ROUNDING = 4  # times the sum of a Gram matrix' diagonal: more than what its sums are rounded by


def loraplus(
    h: Adapters,
    optimizer_class: type[Optimizer],
    *,
    lr: float,
    ratio: float,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
    **kwargs: object,
) -> Optimizer:
    """LoRA+ (arXiv:2402.12354): b learns at lr·ratio, a at lr, factors of embeddings at
    embedding_lr.

    Magnitudes and other vectors learn like b, matrices that are no factors like a; vectors other
    than magnitudes have no weight decay. bitsandbytes' optimizers keep 32-bit states for factors of
    embeddings. Unlike PEFT, weights of RMS norms count as vectors, and magnitudes of convolutions
    as magnitudes. `Refused` without trainable adapters."""
    _check(
        lr=(lr, lr >= 0, "a number from 0"),
        ratio=(ratio, ratio > 0, "a number above 0"),
        embedding_lr=(embedding_lr, embedding_lr >= 0, "a number from 0"),
    )
    kinds: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "vector": []}
    for site, patch, name, parameter in trained(h):
        kinds[_kind(site, patch, name, parameter)].append(parameter)
    for parameter in unfrozen(h):
        kinds["vector" if parameter.ndim == 1 else "a"].append(parameter)
    rates = {"a": lr, "embedding": embedding_lr, "b": lr * ratio, "vector": lr * ratio}
    groups = [
        {"params": params, "lr": rates[k], "weight_decay": 0.0 if k == "vector" else weight_decay}
        for k, params in kinds.items()
        if params
    ]
    # the base class takes no lr; every optimizer does
    optimizer = optimizer_class(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    embeddings = kinds["embedding"]
    if embeddings and optimizer_class.__module__.startswith("bitsandbytes."):
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        GlobalOptimManager.get_instance().override_config(embeddings, "optim_bits", 32)
    return optimizer


def _kind(site: Site, patch: Patch, name: str, parameter: nn.Parameter) -> str:
    """The group of LoRA+'s rates that a parameter belongs to."""
    if isinstance(patch, FactorsPatch):
        if name in ("a", "b"):
            return "embedding" if isinstance(site.host, nn.Embedding) else name
        if name == "magnitude":
            return "b"
    return "vector" if parameter.ndim == 1 else "a"


@experimental
class LoraFA(Optimizer):
    """LoRA-FA (arXiv:2308.03303): AdamW on b with the gradient

    ĝ = g_b·(a aᵀ + 1e-8·I)⁺ / scale²,  a (r, in) frozen, b (out, r), in float32 or wider,

    whose step of scale·b·a is the closest to that of the full weight; other parameters get plain
    AdamW. Weight decay is decoupled, after the step. `names`: adapters, None for all trainable
    ones. Make it before DDP wraps the model, and after FSDP2 shards it. `Refused` without trainable
    adapters, before a is frozen.

    PEFT multiplies under bfloat16 autocast, off by 2.5e-3, and fails with several adapters, DoRA,
    lora_bias and embeddings."""

    def __init__(
        self,
        h: Adapters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        names: str | Iterable[str] | None = None,
    ):
        _check(
            lr=(lr, lr >= 0, "a number from 0"),
            betas=(betas, all(0 <= beta < 1 for beta in betas), "two numbers from 0, below 1"),
            eps=(eps, eps >= 0, "a number from 0"),
            weight_decay=(weight_decay, weight_decay >= 0, "a number from 0"),
        )
        self._factors: dict[nn.Parameter, FactorsPatch] = {}  # by b
        self._projections: dict[nn.Parameter, tuple[Tensor | None, Tensor]] = {}
        parameters = []
        for _, patch, name, parameter in trained(h, names):
            if isinstance(patch, FactorsPatch) and name == "a":
                continue
            if isinstance(patch, FactorsPatch) and name == "b":
                self._factors[parameter] = patch
            parameters.append(parameter)
        for patch in self._factors.values():
            patch.fix("a")
        if names is None:
            parameters += unfrozen(h)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    # torch overloads step; one signature serves both
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            own = [parameter for parameter in group["params"] if parameter.grad is not None]
            for some in _together(own, lambda p: (*_place(p), p.dtype), Tensor.numel):
                gradients = {p: _gradient(p) for p in some} | self._projected(some)
                self._update(some, list(gradients.values()), group)
        return loss

    def _update(self, parameters: Sequence[Tensor], gradients: list[Tensor], group: Json) -> None:
        """AdamW's step, with each operation on all these parameters at once."""
        states = [self._state_of(parameter) for parameter in parameters]
        steps, m, v = ([one[key] for one in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, value=1 - beta2)
        sizes = torch._foreach_sqrt(v)
        torch._foreach_add_(sizes, group["eps"])
        rates = [-lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in map(float, steps)]
        torch._foreach_addcdiv_(list(parameters), m, sizes, rates)
        if group["weight_decay"]:
            torch._foreach_mul_(list(parameters), 1 - lr * group["weight_decay"])

    def _state_of(self, parameter: Tensor) -> Json:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _projected(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """g_b·(a aᵀ + 1e-8·I)⁺ / scale² of each b; with a scale of 0 the gradient is 0."""
        projected: dict[nn.Parameter, Tensor] = {}
        for patches in _alike(self._factors[b] for b in parameters if b in self._factors):
            gradients = [_gradient(patch.b) for patch in patches]
            products = (stacked(patches, gradients) @ self._inverses(patches)).chunk(len(patches))
            torch._foreach_div_(products, [patch.stored_scale**2 or 1.0 for patch in patches])
            for patch, product, gradient in zip(patches, products, gradients, strict=True):
                projected[patch.b] = shaped_as(product, gradient)
        return projected

    def _inverses(self, patches: Sequence[FactorsPatch]) -> Tensor:
        """(a aᵀ + 1e-8·I)⁺ of each patch; usually computed once, because a is frozen."""
        stamps, kept = {patch: _stamp(patch.a) for patch in patches}, self._projections
        old = [patch for patch in patches if not same(stamps[patch], kept.get(patch.b, (None,))[0])]
        if old:
            grams = damped_grams(stacked(old, [patch.a for patch in old]), 1e-8)
            inverses = torch.linalg.pinv(grams, hermitian=True).chunk(len(old))
            for patch, inverse in zip(old, inverses, strict=True):
                kept[patch.b] = stamps[patch], inverse
        return joined([kept[patch.b][1] for patch in patches])


def _stamp(a: Tensor) -> Tensor | None:
    """A stamp that changes with a; on a GPU only with writes that count a version, because
    comparing bits would synchronize."""
    bits = bits_of([full_tensor(a)], wait=False)
    return torch.tensor([a.data_ptr(), a._version]) if bits is None else bits


@experimental
def Riemannian(
    h: Adapters, optimizer_class: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: object
) -> Optimizer:
    """An optimizer that first preconditions the gradients of linear layers' factors, and of
    parameters':

    g_a ← (bᵀb + reg·I)⁺·g_a,  g_b ← g_b·(a aᵀ + reg·I)⁺,  a (r, in), b (out, r),

    in float32 or wider (arXiv:2402.02347), with a reg of at least the rounding error of the
    products. `optimizer_class` updates the rest as usual, including factors of other layers, as in
    PEFT. `Refused` without trainable factors of linear layers, and for optimizers that evaluate the
    loss themselves, because they would see other gradients."""
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    _check(
        optimizer_class=(
            optimizer_class.__name__,
            closure is None or closure.default is not inspect.Parameter.empty,
            "an optimizer that needs no closure",
        ),
        reg=(reg, reg >= 0, "a number from 0"),
    )
    parameters, factors = [], list[FactorsPatch]()
    for site, patch, name, parameter in trained(h):
        parameters.append(parameter)
        if isinstance(patch, FactorsPatch) and name == "b" and not patch.fixed:
            is_linear = patch.b.ndim == 2 and not isinstance(site.host, nn.Embedding)
            if is_linear or isinstance(patch, ParameterPatch):
                factors.append(patch)
    if not factors:
        raise Refused(
            "no adapter trains both factors of a linear layer",
            expected="such an adapter",
            where="Riemannian",
            hint="use the optimizer itself",
            code="AK805",
        )

    def precondition(_: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise Refused(
                "step(closure)",
                expected="step()",
                where="Riemannian",
                hint="compute the gradients before the step",
                code="AK805",
            )
        with torch.no_grad():
            for name in ("a", "b"):
                own = [patch for patch in factors if getattr(patch, name).grad is not None]
                for patches in _alike(own):
                    _precondition(patches, name, reg)

    # as in `loraplus`: every optimizer takes lr
    optimizer = optimizer_class([*parameters, *unfrozen(h)], lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(precondition)
    return optimizer


def _precondition(patches: Sequence[FactorsPatch], name: str, reg: float) -> None:
    """Precondition the gradients of a, or of b, of patches with equal shapes."""
    gradients = [_gradient(getattr(patch, name)) for patch in patches]
    stack = stacked(patches, gradients)
    if name == "a":
        product = damped_inverses(stacked(patches, [patch.b for patch in patches]).mT, reg) @ stack
    else:
        product = stack @ damped_inverses(stacked(patches, [patch.a for patch in patches]), reg)
    pairs = zip(product.chunk(len(patches)), gradients, strict=True)
    products = [shaped_as(one, gradient) for one, gradient in pairs]
    if is_sharded(gradients[0]):
        for one, gradient in zip(products, gradients, strict=True):
            gradient.copy_(one)
    else:
        torch._foreach_copy_(gradients, products)


def _together(
    values: Iterable[T], kind: Callable[[T], tuple], size: Callable[[T], int]
) -> Iterator[list[T]]:
    """Batches of values of one kind, whose first item is the device, for one computation."""
    kinds: dict[tuple, list[T]] = {}
    for value in values:
        kinds.setdefault(kind(value), []).append(value)
    for (device, *_), members in kinds.items():
        limit = piece(device, CACHED)
        some, taken = list[T](), 0
        for value in members:
            if some and taken + size(value) > limit:
                yield some
                some, taken = [], 0
            some.append(value)
            taken += size(value)
        yield some


def _place(tensor: Tensor) -> tuple:
    """Its device, and the processes that it is sharded over."""
    return tensor.device, tensor.device_mesh if is_sharded(tensor) else None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _alike(patches: Iterable[FactorsPatch]) -> Iterator[list[FactorsPatch]]:
    """Patches whose factors have equal shapes, to be stacked."""

    def kind(patch: FactorsPatch) -> tuple:
        a, b = patch.a, patch.b
        shapes = a.shape, a.dtype, b.shape, b.dtype
        return *_place(b), isinstance(patch, ParameterPatch), *shapes

    return _together(patches, kind, lambda patch: patch.a.numel() + patch.b.numel())


def stacked(patches: Sequence[FactorsPatch], values: Sequence[Tensor]) -> Tensor:
    """a of patches with equal shapes as (n, r, in), or b as (n, out, r), or their gradients,
    float32 or wider: one matrix per patch, expert, or group of a convolution."""
    matrices = joined([_matrices(*pair) for pair in zip(patches, values, strict=True)])
    return matrices.to(torch.promote_types(matrices.dtype, torch.float32))


def _matrices(patch: FactorsPatch, value: Tensor) -> Tensor:
    """As `stacked` for one patch, gathered if it is sharded."""
    value = full_tensor(value.detach())
    if isinstance(patch, ParameterPatch) and value.ndim == 3:
        return value
    groups = patch.a.shape[0] // patch.b.shape[1]
    return value.flatten(1).unflatten(0, (groups, -1))


def joined(stacks: Sequence[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(list(stacks))


def damped_grams(
    factors: Tensor,  # (n, r, in)
    damping: float,
) -> Tensor:  # (n, r, r)
    """f fᵀ + damping·I of each f."""
    grams = factors @ factors.mT
    grams.diagonal(dim1=-2, dim2=-1).add_(damping)
    return grams


def damped_inverses(
    factors: Tensor,  # (n, r, in)
    damping: float,
) -> Tensor:  # (n, r, r)
    """(f fᵀ + damping·I)⁺ of each f; a damping above 0 uses Cholesky's decomposition, which does
    not synchronize a device: the damping is then at least the rounding error of f fᵀ."""
    grams = damped_grams(factors, damping)
    if not damping:
        return torch.linalg.pinv(grams, hermitian=True)
    diagonals = grams.diagonal(dim1=-2, dim2=-1)
    rounding = ROUNDING * torch.finfo(grams.dtype).eps * diagonals.sum(-1, keepdim=True)
    diagonals.add_((rounding - damping).clamp_min_(0))
    wide = grams if grams.device.type == "mps" else grams.double()
    lower, _ = torch.linalg.cholesky_ex(wide)
    one = torch.eye(grams.shape[-1], dtype=wide.dtype, device=wide.device)
    inverses = torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)
    return (inverses.mT @ inverses).to(grams.dtype)


def shaped_as(value: Tensor, other: Tensor) -> Tensor:
    """A value with another's shape and dtype, sharded like it."""
    return spread(value.reshape(other.shape).to(other.dtype), other)


def trained(
    h: Adapters, names: str | Iterable[str] | None = None
) -> Iterator[tuple[Site, Patch, str, nn.Parameter]]:
    """Parameters of trainable adapters with their names in their patches; `Refused` without any."""
    names = h.names if names is None else [names] if isinstance(names, str) else list(names)
    h.state.known(names)
    adapters = [h.state.adapters[name] for name in names]
    table = {
        parameter: (site, patch, name)
        for adapter in adapters
        if adapter.trainable
        for site, patch in adapter.patches()
        for name, parameter in patch.trained()
    }
    if not table:
        raise Refused(
            "no trainable adapter",
            expected="one or more",
            where="optimizer",
            hint="attach one, or load one with trainable=True",
            code="AK805",
        )
    for parameter, place in table.items():
        yield *place, parameter


def unfrozen(h: Adapters) -> list[nn.Parameter]:
    """Trained parameters of the model that belong to no adapter."""
    adapters = h.state.adapters.values()
    own = {p for adapter in adapters for _, patch in adapter.patches() for p in patch.parameters()}
    return [p for p in h.model.parameters() if p.requires_grad and p not in own]


def _check(**options: tuple[object, bool, str]) -> None:
    """`Refused` with all invalid options: their values, whether they are valid, and valid ones."""
    errors = Problems(where="optimizer", code="AK805")
    for name, (value, is_valid, expected) in options.items():
        if not is_valid:
            errors.add(f"{name} {value!r}", expected, f"give {expected}")
    errors.raise_all()
