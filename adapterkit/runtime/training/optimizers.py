"""Optimizers that know an adapter's factors: LoRA+, LoRA-FA and Riemannian preconditioning.

Each takes all trainable adapters of a handle, active or not, and what else of the model is trained.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterkit.errors import Problems, Refused
from adapterkit.records import Json
from adapterkit.runtime.handle import Adapters
from adapterkit.runtime.layers.parameter import ParameterPart
from adapterkit.runtime.parts.factors import FactorsPart
from adapterkit.runtime.sharding import spread, whole
from adapterkit.runtime.site import Part, Site


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

    Magnitudes and other vectors learn as b, matrices that are no factors as a; vectors other than
    magnitudes have no weight decay. bitsandbytes' optimizers keep 32-bit states for factors of
    embeddings. Unlike PEFT, weights of RMS norms count as vectors, and magnitudes of convolutions
    as magnitudes. `Refused` without trainable adapters."""
    _check(
        lr=(lr, lr >= 0, "a number from 0"),
        ratio=(ratio, ratio > 0, "a number above 0"),
        embedding_lr=(embedding_lr, embedding_lr >= 0, "a number from 0"),
    )
    kinds: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "vector": []}
    for site, part, name, parameter in trained(h):
        kinds[_kind(site, part, name, parameter)].append(parameter)
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


def _kind(site: Site, part: Part, name: str, parameter: nn.Parameter) -> str:
    """Which of LoRA+'s rates a parameter has."""
    if isinstance(part, FactorsPart):
        if name in ("a", "b"):
            return "embedding" if isinstance(site.host, nn.Embedding) else name
        if name == "magnitude":
            return "b"
    return "vector" if parameter.ndim == 1 else "a"


class LoraFA(Optimizer):
    """LoRA-FA (arXiv:2308.03303): AdamW on b with the gradient

    ĝ = g_b·(a aᵀ + 1e-8·I)⁺ / scale²,  a (r, in) frozen, b (out, r), in float32 or wider,

    whose step of scale·b·a is the closest one to that of the whole weight; on what is no b plain
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
        self._factors: dict[nn.Parameter, FactorsPart] = {}  # by b
        self._projections: dict[nn.Parameter, tuple[tuple, Tensor]] = {}
        parameters = []
        for _, part, name, parameter in trained(h, names):
            if isinstance(part, FactorsPart) and name == "a":
                continue
            if isinstance(part, FactorsPart) and name == "b":
                self._factors[parameter] = part
            parameters.append(parameter)
        for part in self._factors.values():
            part.fix("a")
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: Json) -> None:
        gradient = parameter.grad
        assert gradient is not None
        part = self._factors.get(parameter)
        if part is not None:
            gradient = self._projected(gradient, parameter, part)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        m = state["exp_avg"].lerp_(gradient, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        parameter.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _projected(self, gradient: Tensor, b: nn.Parameter, part: FactorsPart) -> Tensor:
        """g_b·(a aᵀ + 1e-8·I)⁺ / scale²; where the scale is 0, so is the gradient."""
        version = (id(part.a), part.a._version, part.a.device)
        if self._projections.get(b, (None,))[0] != version:  # a is frozen: once, as a rule
            self._projections[b] = version, damped_inverse(matrices(part, part.a), 1e-8)
        product = matrices(part, gradient) @ self._projections[b][1]
        return shaped_as(product.div_(part.scale**2 or 1.0), gradient)


def Riemannian(
    h: Adapters, optimizer_class: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: object
) -> Optimizer:
    """An optimizer whose steps first precondition the gradients of linear layers' factors, and of
    parameters':

    g_a ← (bᵀb + reg·I)⁺·g_a,  g_b ← g_b·(a aᵀ + reg·I)⁺,  a (r, in), b (out, r),

    in float32 or wider (arXiv:2402.02347). All else is as `optimizer_class` does it, factors of
    other layers too, as in PEFT. `Refused` without trainable factors of linear layers, and for
    optimizers that evaluate the loss themselves: they would see other gradients."""
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    _check(
        optimizer_class=(
            optimizer_class.__name__,
            closure is None or closure.default is not inspect.Parameter.empty,
            "an optimizer that needs no closure",
        ),
        reg=(reg, reg >= 0, "a number from 0"),
    )
    parameters, factors = [], {}
    for site, part, name, parameter in trained(h):
        parameters.append(parameter)
        if isinstance(part, FactorsPart) and name == "b" and not part.fixed:
            is_linear = part.b.ndim == 2 and not isinstance(site.host, nn.Embedding)
            if is_linear or isinstance(part, ParameterPart):
                factors[parameter] = part
    if not factors:
        raise Refused(
            "no adapter trains both factors of a linear layer",
            expected="such an adapter",
            where="Riemannian",
            hint="use the optimizer itself",
        )

    def precondition(_: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise Refused(
                "step(closure)",
                expected="step()",
                where="Riemannian",
                hint="compute the gradients before the step",
            )
        with torch.no_grad():
            for part in factors.values():
                _precondition(part, reg)

    # as in `loraplus`: every optimizer takes lr
    optimizer = optimizer_class([*parameters, *unfrozen(h)], lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(precondition)
    return optimizer


def _precondition(part: FactorsPart, reg: float) -> None:
    a, b = matrices(part, part.a), matrices(part, part.b)
    a_gradient, b_gradient = part.a.grad, part.b.grad
    if a_gradient is not None:
        product = damped_inverse(b.mT, reg) @ matrices(part, a_gradient)
        a_gradient.copy_(shaped_as(product, a_gradient))
    if b_gradient is not None:
        product = matrices(part, b_gradient) @ damped_inverse(a, reg)
        b_gradient.copy_(shaped_as(product, b_gradient))


def matrices(part: FactorsPart, value: Tensor) -> Tensor:
    """a as (n, r, in) or b as (n, out, r), or their gradients, float32 or wider: one matrix, of
    experts one each, of a convolution one a group; gathered where it is sharded."""
    value = whole(value.detach()).to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(part, ParameterPart) and value.ndim == 3:
        return value
    groups = part.a.shape[0] // part.b.shape[1]
    return value.flatten(1).unflatten(0, (groups, -1))


def damped_inverse(factors: Tensor, damping: float) -> Tensor:
    """(f fᵀ + damping·I)⁺ of each f (r, in)."""
    grams = factors @ factors.mT
    grams.diagonal(dim1=-2, dim2=-1).add_(damping)
    return torch.linalg.pinv(grams, hermitian=True)


def shaped_as(value: Tensor, other: Tensor) -> Tensor:
    """A value with another's shape and dtype, sharded as it is."""
    return spread(value.reshape(other.shape).to(other.dtype), other)


def trained(
    h: Adapters, names: str | Iterable[str] | None = None
) -> Iterator[tuple[Site, Part, str, nn.Parameter]]:
    """Parameters of trainable adapters with their names in their parts; `Refused` if there are
    none."""
    names = h.names if names is None else [names] if isinstance(names, str) else list(names)
    h.state.known(names)
    adapters = [h.state.adapters[name] for name in names]
    table = {
        parameter: (site, part, name)
        for adapter in adapters
        if adapter.trainable
        for site, part in adapter.parts()
        for name, parameter in part.trained()
    }
    if not table:
        raise Refused(
            "no trainable adapter",
            expected="one or more",
            where="optimizer",
            hint="attach one, or load one with trainable=True",
        )
    for parameter, place in table.items():
        yield *place, parameter


def unfrozen(h: Adapters) -> list[nn.Parameter]:
    """Parameters of the model that are trained and no adapter's."""
    adapters = h.state.adapters.values()
    own = {p for adapter in adapters for _, part in adapter.parts() for p in part.parameters()}
    return [p for p in h.model.parameters() if p.requires_grad and p not in own]


def _check(**options: tuple[object, bool, str]) -> None:
    """`Refused` with all options that are invalid: their values, whether they are valid, what is
    expected."""
    errors = Problems(where="optimizer")
    for name, (value, is_valid, expected) in options.items():
        if not is_valid:
            errors.add(f"{name} {value!r}", expected, f"give {expected}")
    errors.raise_all()
