"""Statistics of a model's layers by plain hooks, in float64: what `adapterkit stats` is held
against, and what inits are given."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterkit.verbs.shared.statistics_file import METADATA

Modules = dict[str, nn.Module]


def linear_modules(model: nn.Module, ends: Iterable[str]) -> Modules:
    """The linear layers whose names end so."""
    ends = tuple(ends)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.endswith(ends)
    }


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


@torch.no_grad()
def inputs_of(model: nn.Module, modules: Modules, batches: list[dict]) -> dict[str, Tensor]:
    """All inputs of each module (tokens, in), without padding and masked labels, float64."""
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    masks: list[Tensor] = []

    def hook(name):
        return lambda module, args, output: rows[name].append(args[0][masks[-1]].double())

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        masks.append(mask & (batch["labels"] != -100) if "labels" in batch else mask)
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def statistics_of(x: Tensor) -> dict[str, Tensor]:
    """Those of inputs (tokens, in), float32."""
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    statistics = {
        "covariance": x.T @ x / len(x),
        "mean": mean,
        "components": directions.T.flip(0),
        "variances": variances.flip(0).clamp(min=0),
        "variance": variances.sum().view(1),
    }
    return {kind: value.float() for kind, value in statistics.items()}


def gradients_of(model: nn.Module, modules: Modules, batches: list[dict]) -> dict[str, Tensor]:
    """dLoss/dW of each module (out, in), the mean over the batches."""
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    gradients = {
        name: (module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad)
        / len(batches)
        for name, module in modules.items()
    }
    model.zero_grad()
    return {name: value.contiguous() for name, value in gradients.items()}


def save_statistics(model: nn.Module, modules: Modules, batches: list[dict], file: Path) -> Path:
    """All kinds of statistics of these modules; modules with the same inputs have them once. The
    batches have labels."""
    owners: list[tuple[str, Tensor]] = []
    tensors, shared = {}, {}
    for name, x in inputs_of(model, modules, batches).items():
        owner = next((o for o, y in owners if y.shape == x.shape and torch.equal(x, y)), None)
        if owner is None:
            owners.append((name, x))
            tensors |= {f"{name}.{kind}": value for kind, value in statistics_of(x).items()}
        else:
            shared[name] = owner
    for name, gradient in gradients_of(model, modules, batches).items():
        tensors[f"{name}.gradient"] = gradient
    metadata = {"format": "pt", METADATA: json.dumps({"shared": shared})}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)
    return file
