"""Stored models with adapters, as a fit runs them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.verbs.fit.objective import Objective
from adapterkit.verbs.fit.runs import FitBatch, Runs
from adapterkit.verbs.fit.weighted_adapters import WeightedModel
from adapterkit.verbs.stats.model.layers import OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel


@contextmanager
def runs_of(
    base: Path,
    adapters: Sequence[Path],
    work: Path,
    *,
    whole: bool = True,
    target: type[Objective] = Objective,
    directions: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Runs]:
    """Runs of a model with these adapters, ready; the model in float64."""
    folder = LocalFolder(base)
    work.mkdir(exist_ok=True)
    with Sources((folder,), {}) as sources:
        stored = StoredModel(open_checkpoint(folder), sources, torch.device("cpu"), dtype=dtype)
        units = OffloadedLayers.of(stored)
        weighted_model = WeightedModel(stored.model, tuple(map(LocalFolder, adapters)))
        weighted_model.number(directions)
        own = target(in_float64(stored.model) if dtype == torch.float64 else stored.model)
        runs = Runs(stored, weighted_model, units, own, whole, work, 0, lambda: None)
        with runs.ready():
            yield runs


def batches_of(inputs: Sequence[dict], rows: int = 8) -> list[FitBatch]:
    """Batches of at most so many rows."""
    result, first = [], 0
    for each in inputs:
        count = len(next(iter(each.values())))
        for at in range(0, count, rows):
            own = {key: _wide(value[at : at + rows]) for key, value in each.items()}
            size = len(next(iter(own.values())))
            numbers = tuple(range(first, first + size))
            result.append(FitBatch(own, torch.ones(size), numbers, len(result)))
            first += size
    return result


def points(size: int) -> torch.Tensor:
    """Coefficients that differ."""
    return torch.linspace(-0.5, 1.2, size).double()


def in_float64(model: Any) -> Any:
    """The model, with what its code computes in float32 in the model's dtype."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    root = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * (x * root)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value
