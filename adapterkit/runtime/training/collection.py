"""Collect statistics of a live model's layers: of their inputs, and of their weights' gradients."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkit.core.checkpoint.disk import storage_errors
from adapterkit.core.engine.device import float32_products, has_room
from adapterkit.core.errors import Failed, Problems, Refused, did_you_mean, listed
from adapterkit.core.options import StrPath
from adapterkit.core.records import Json
from adapterkit.runtime.layers import KINDS
from adapterkit.runtime.load.writing import check_local, replace, writes
from adapterkit.runtime.quantized import stored
from adapterkit.runtime.targets import LiveResolver
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.statistics_file import INPUT_KINDS, INPUTS, METADATA, key_of
from adapterkit.verbs.shared.statistics_file import KINDS as ALL_KINDS
from adapterkit.verbs.shared.targets import Target
from adapterkit.verbs.stats.data.masks import Masks, Rule
from adapterkit.verbs.stats.model.gradients import Gradients
from adapterkit.verbs.stats.sums import COMPONENTS, Sums

GRADIENT = "gradient"
WHAT = (*INPUTS, GRADIENT)
SUMMED = 4 * 9 / 16  # bytes of an element of a covariance in a block's sums
COMPAT = {"peft": ("covariance", GRADIENT)}  # kinds with another definition there


def collect(
    model: nn.Module,
    run_model: Callable[[], object],
    *,
    what: str | Sequence[str] = "covariance",
    targets: str | Sequence[str] | None = None,
    compat: str | None = None,
    mask: Rule | None = None,
    components: int = COMPONENTS,
    out: StrPath | None = None,
) -> dict[str, Tensor]:
    """Statistics `<module>.<kind>` of each linear layer while `run_model()` runs, float32 on the
    CPU, for `attach(stats=)` and `--stats`.

    `what`, separated by commas: `covariance` E[x xᵀ] (in, in) of the layer's inputs; `mean` E[x]
    (in,); `pca`, the principal directions of the centered inputs, `components` (k, in) with
    `variances` (k,) and the total `variance` (1,), at most `components` of them; `gradient`
    dLoss/dW (out, in), the mean over the backward passes of run_model(), without an optimizer: each
    gradient is added when it is computed, and freed. Sums are in float32 over blocks, then in
    float64.

    Inputs count if attention_mask is not 0 and labels are not -100 in the model's call. `mask`, a
    function of the arguments of the model's forward by name, returns other flags (batch, length),
    None for all, for an encoder-decoder a pair. Tokens are tracked through the model's operations,
    even if a layer reorders them; vectors without a token, for example of an image, count. Layers
    called outside of the model's own forward count all.

    `targets`: as in LoraConfig, None for all linear layers. `out`: a safetensors file to write as
    well, where layers that always get the same input share one set of statistics; the mapping has a
    copy for each. Layers without input are left out. Active adapters act; disable them with
    `disabled()`. The model, its mode and its gradients do not change.

    `compat="peft"`: a covariance is the mean over calls of x xᵀ / max(x)², of all tokens
    (`preprocess_corda`, arXiv:2406.05223; one row at a time, `Failed` for a batch of several), and
    gradients are divided by the calls of each layer (`preprocess_loraga`, arXiv:2407.05000).
    `Refused` for targets that are no linear layers, or that have no gradient, before anything runs;
    `Failed` for values that are not finite, and if it is unknown which vectors count."""
    if out is not None:
        check_local(out, "collect")
    kinds = _kinds(what, compat)
    chosen = _targets(model, targets, GRADIENT in kinds)
    inputs = [kind for kind in kinds if kind != GRADIENT]
    if {"covariance", "pca"}.intersection(inputs):
        _warn_of_memory(chosen)
    sums = Sums(inputs, _count(components), normalize=compat is not None)
    masks = Masks(model, mask or (None if compat is None else lambda arguments: None))
    transposed = {target.path: target.kind == "conv1d" for target in chosen}
    gradients = Gradients(model, transposed, per_call=compat is not None)
    with ExitStack() as stack:
        if inputs:
            stack.enter_context(masks.watching())
        for target in chosen if inputs else ():
            watch = partial(_watch, sums, masks, target.path)
            hook = target.module.register_forward_pre_hook(watch, with_kwargs=True)
            stack.callback(hook.remove)
        if GRADIENT in kinds:
            stack.enter_context(gradients.watching())
        run_model()
    with float32_products():
        sums.settle()
    _check_run(sums if inputs else None, gradients if GRADIENT in kinds else None, len(chosen))
    tensors = dict(sums.statistics()) if inputs else {}
    tensors |= {key_of(path, GRADIENT): value for path, value in gradients.means()}
    if out is not None and writes():
        vectors = max((total.vectors for total in sums.groups), default=0)
        about = {"shared": sums.shared, "tokens": vectors, "what": kinds}
        about |= {"model": type(model).__name__} | ({"compat": compat} if compat else {})
        _write(out, tensors, about)
    for module, owner in sums.shared.items():
        for kind in INPUT_KINDS:
            if (value := tensors.get(key_of(owner, kind))) is not None:
                tensors[key_of(module, kind)] = value.clone()
    keys = [key_of(target.path, kind) for target in chosen for kind in ALL_KINDS]
    return {key: tensors[key] for key in keys if key in tensors}


def _warn_of_memory(targets: Sequence[Target]) -> None:
    """Warn before the run if sums, even with totals on the host, may not fit a GPU's memory."""
    needed = Counter[torch.device]()
    for target in targets:
        width = KINDS[target.kind].shapes(target.module, 1)[0][1]
        for weight in (tensor for tensor in stored(target.module) if tensor.ndim > 1):
            needed[weight.device] += int(SUMMED * width**2)
            break
    for device, nbytes in needed.items():
        if device.type == "cuda" and not has_room(device, nbytes, 0):
            text = f"sums of {len(targets)} layers take up to {nbytes / 1e9:.1f} GB of {device}"
            hint = "collect them in several runs, each of some targets"
            warnings.warn(f"{text}, which has less free; {hint}", stacklevel=3)


def _kinds(what: str | Sequence[str], compat: str | None) -> list[str]:
    names = what.split(",") if isinstance(what, str) else list(what)
    names = [name.strip() if isinstance(name, str) else repr(name) for name in names]
    unknown = [name for name in names if name not in WHAT]
    if unknown or not names:
        raise Refused(
            f"what={what!r}",
            expected=", ".join(WHAT),
            where="collect",
            hint=did_you_mean(unknown, WHAT) or "name one or more of them",
            code="AK902",
        )
    if compat is None:
        return names
    others = [name for name in names if name not in COMPAT.get(compat, ())]
    if others:
        raise Refused(
            f"compat={compat!r} of {', '.join(others)}",
            expected="covariance and gradient, with compat='peft'",
            where="collect",
            hint="collect these in another call, without compat",
            code="AK902",
        )
    return names


def _count(components: int) -> int:
    if isinstance(components, bool) or not isinstance(components, int) or components < 1:
        raise Refused(
            f"components={components!r}",
            expected="a whole number above 0",
            where="collect",
            hint="give the number of principal directions of a layer",
            code="AK902",
        )
    return components


def _targets(
    model: nn.Module, targets: str | Sequence[str] | None, gradients: bool
) -> list[Target]:
    config = LoraConfig(targets="all-linear" if targets is None else targets)
    chosen = LiveResolver(model, config).resolve()
    others = [target.path for target in chosen if not KINDS[target.kind].is_matrix]
    fixed = [t.path for t in chosen if gradients and t.path not in others and not _is_plain(t)]
    errors = Problems(code="AK902")
    if others or not chosen:
        errors.add(
            f"{listed(others)}: no linear layer" if others else "no layer",
            "linear layers of the model",
            "name linear layers, or leave targets out",
            where="targets",
        )
    if fixed:
        errors.add(
            f"gradients of {listed(fixed)}: quantized, or on the meta device",
            "weights of floats",
            "load the base in bfloat16 or float32, or name other targets",
            where="collect",
        )
    errors.raise_all()
    return chosen


def _is_plain(target: Target) -> bool:
    """Return whether a layer's weight gets gradients."""
    weight = target.module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta


@torch.compiler.disable
@float32_products()
def _watch(
    sums: Sums, masks: Masks, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    sums.add(path, x.detach(), masks.of(path, x))


def _check_run(sums: Sums | None, gradients: Gradients | None, layers: int) -> None:
    """`Failed` if a run gave no inputs, or no gradients."""
    errors = Problems(where="collect", code="AK902")
    if sums is not None and not sums.by_module:
        errors.add(
            f"none of {layers} layers saw an input",
            "run_model() runs the model",
            "call the model itself in run_model",
            kind=Failed,
        )
    if gradients is not None and not gradients.totals:
        errors.add(
            f"none of {layers} layers got a gradient",
            "run_model() runs the model and calls backward() of its loss",
            "model(**batch).loss.backward() for each batch, without an optimizer",
            kind=Failed,
        )
    errors.raise_all()


def _write(out: StrPath, tensors: dict[str, Tensor], about: Json) -> None:
    path = Path(out)
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda patch: save_file(tensors, patch, metadata))
