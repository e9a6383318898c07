"""Statistics of what the layers of a live model see, as `loftq --stats` takes them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.errors import Failed, Refused, did_you_mean, shown
from adapterkit.runtime.targets import resolve
from adapterkit.statistics.sums import Sums
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
        key_of(path, "covariance"): sums.of(sums.by_module[path])["covariance"]
        for path in modules
        if path in sums.by_module
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


def _watch(sums: Sums, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        sums.add(path, x.detach())

    return hook
