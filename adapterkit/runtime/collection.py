"""Statistics of what the layers of a live model see, as `loftq --stats` takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.errors import Failed, Refused, did_you_mean, shown
from adapterkit.runtime.targets import resolve
from adapterkit.tasks.statistics import key_of

KINDS = ("linear", "conv1d")  # layers whose inputs are vectors


def collect(
    model: nn.Module,
    run_model: Callable[[], object],
    *,
    what: str = "covariance",
    targets: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """`<module>.covariance`, E[x xᵀ] (in, in) of each linear layer's inputs while `run_model()`
    runs; safetensors' `save_file` writes what `adapterkit loftq --stats` reads.

    float32 on the CPU; sums in float32, or float64 for such inputs. Padding counts as input:
    run texts without it. Active adapters act: leave them out with `disabled()`. Layers that see
    nothing are left out. `targets`: as in LoraConfig, None for all linear layers. `Refused` for
    targets that are no linear layers, before anything runs; `Failed` for inputs that are not
    finite. The model is left as it was.

    CorDA (arXiv:2406.05223) and PEFT's `preprocess_corda` take the same mean, of one batch row."""
    if what != "covariance":
        raise Refused(
            f"what={what!r}",
            expected="covariance",
            where="collect",
            hint=did_you_mean([what], ["covariance"]) or "leave it out",
        )
    modules = _modules(model, targets)
    sums = Sums()
    hooks = [
        module.register_forward_pre_hook(_watch(sums, path), with_kwargs=True)
        for path, module in modules.items()
    ]
    try:
        run_model()
    finally:
        for hook in hooks:
            hook.remove()
    sums.settle()
    if not sums.by_module:
        raise Failed(
            f"none of {len(modules)} layers saw an input",
            expected="run_model() runs the model",
            where="collect",
            hint="call the model itself in run_model",
        )
    return {
        key_of(path, "covariance"): sums.mean(path) for path in modules if path in sums.by_module
    }


def _modules(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    chosen = resolve(model, LoraConfig(targets="all-linear" if targets is None else targets))
    others = [target.path for target in chosen if target.kind not in KINDS]
    if others or not chosen:
        raise Refused(
            f"{', '.join(map(shown, others[:3]))}: no linear layer" if others else "no layer",
            expected="linear layers of the model",
            where="targets",
            hint="name others",
        )
    return {target.path: model.get_submodule(target.path) for target in chosen}


def _watch(sums: "Sums", path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        sums.add(path, x.detach())

    return hook


@dataclass
class Sum:
    """Σ x xᵀ of layers that saw the same inputs so far."""

    total: Tensor
    vectors: int = 0
    modules: set[str] = field(default_factory=set)


@dataclass
class Latest:
    """The input x that was seen last, and the layers that saw it."""

    x: Tensor
    version: int | Tensor  # of its values; a copy of them in inference mode, which counts none
    product: Tensor  # x xᵀ, summed over the vectors
    modules: set[str]

    def is_input(self, x: Tensor) -> bool:
        """Whether x is the same memory, seen the same way, unchanged."""
        return (
            self.x.data_ptr() == x.data_ptr()
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
            and self.x.dtype == x.dtype
            and self.x.device == x.device
            and (
                torch.equal(self.version, x)
                if isinstance(self.version, Tensor)
                else self.version == x._version
            )
        )


class Sums:
    """Sums of layers: those that always see the same inputs, as q, k and v do, have one sum and one
    product between them."""

    def __init__(self) -> None:
        self.by_module: dict[str, Sum] = {}
        self.latest: Latest | None = None

    @torch.inference_mode(False)  # tensors of inference mode could not be changed outside of it
    @torch.no_grad()
    def add(self, module: str, x: Tensor) -> None:
        """Add an input of a layer."""
        latest = self.latest
        if latest is not None and module not in latest.modules and latest.is_input(x):
            latest.modules.add(module)
            return
        self.settle()
        version = x.clone() if x.is_inference() else x._version
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        self.latest = Latest(x, version, rows.T @ rows, {module})

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self) -> None:
        """Add the last input to the sums of the layers that saw it; a sum whose layers did not all
        see it is split."""
        if self.latest is None:
            return
        x, product, modules = self.latest.x, self.latest.product, self.latest.modules
        self.latest = None
        while modules:
            old = self.by_module.get(next(iter(modules)))
            if old is None:
                group = modules - self.by_module.keys()
                total = Sum(torch.zeros_like(product))
            else:
                group = modules & old.modules
                total = old if group == old.modules else Sum(old.total.clone(), old.vectors)
                old.modules = old.modules - group
            total.total += product
            total.vectors += x[..., 0].numel()
            total.modules = group
            self.by_module |= dict.fromkeys(group, total)
            modules = modules - group

    def mean(self, module: str) -> Tensor:
        """E[x xᵀ] of a layer, of its own memory: safetensors writes none twice."""
        total = self.by_module[module]
        mean = (total.total / max(total.vectors, 1)).float().cpu()
        if not bool(mean.isfinite().all()):
            raise Failed(
                f"inputs of {shown(module)} that are not finite",
                expected="numbers",
                where="collect",
                hint="run the model in float32 or bfloat16",
            )
        return mean
