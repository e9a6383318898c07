"""The weights to begin with that need no gradients: those of `combine --method regspan`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.lowrank.span import span_weights
from adapterkit.verbs.fit.plan import FitCollection
from adapterkit.verbs.fit.runs import FitBatch, Runs
from adapterkit.verbs.fit.weighted_adapters import ActivationGram, WeightedModule

ENDS = {"adapter": 0, "layer": 1}  # of what a module's group is: nothing, its layer, itself


def closed_form(fit: FitCollection, runs: Runs, start: Tensor) -> Tensor:
    """c (coefficients,) of least Σᵢ wᵢ E‖Σⱼ cⱼ Δⱼ xᵢ - Δᵢ xᵢ‖² for each adapter, layer or module,
    xᵢ what a module sees of the i-th file with its adapter.

    Of the inputs E[u uᵀ], u = a·x, is enough. Modules that see no vectors are taken to see all
    directions alike; of stacks of experts c is the start's."""
    weighted_model, count = runs.weighted_model, len(fit.adapters)
    owners = torch.tensor([owner[0] for owner in weighted_model.owners])
    seen: list[ActivationGram] = []
    for number in range(count):
        weighted_model.seen = ActivationGram()
        own = [one for one in fit.train.batches if one.file == number]
        only = (owners == number).double()
        runs.run(only, [*_alone(own)], lambda one: 0 * runs.target.logits(one).flatten()[:1])
        seen.append(weighted_model.seen)
    weighted_model.seen = None
    groups = [owner[1:][: ENDS.get(fit.options.per, 2)][-1:] for owner in weighted_model.owners]
    modules = []
    for place in weighted_model.places:
        with runs.loaded(place):
            assert place.part is not None
            if place.part.a.ndim != 3 or place.leaf is None:
                modules.append((str(groups[place.first]), *_equations(place, count, seen)))
    found = span_weights(modules, fit.shares.tolist(), 0.0)
    pairs = zip(owners.tolist(), groups, start.tolist(), strict=True)
    values = [float(found[str(g)][0][n]) if str(g) in found else c for n, g, c in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _equations(
    place: WeightedModule, count: int, seen: Sequence[ActivationGram]
) -> tuple[list[Product | None], Callable[[int], Tensor]]:
    """The deltas of a module, None of an adapter that lacks it, by their rows of u; E[u uᵀ]."""
    part = place.part
    assert part is not None
    a, b = part.a.flatten(1).double().cpu(), part.b.flatten(1).double().cpu()
    rows = torch.eye(len(a), dtype=torch.float64)
    products: list[Product | None] = [None] * count
    for column, number in enumerate(place.members):
        own = part.columns == place.first + column
        products[number] = Product(b[:, own], rows[own])

    def covariance(number: int) -> Tensor:
        mean = seen[number].mean(place.path)
        return a @ a.T if mean is None else mean

    return products, covariance


def _alone(batches: Sequence[FitBatch]) -> Iterator[FitBatch]:
    """Each sample by itself, without padding."""
    for batch in batches:
        mask = batch.inputs.get("attention_mask")
        for row, number in enumerate(batch.samples):
            inputs = {key: value[row : row + 1] for key, value in batch.inputs.items()}
            if mask is not None:
                length, whole = int(mask[row].sum()), mask.shape[1:]
                for key, value in inputs.items():
                    inputs[key] = value[:, :length] if value.shape[1:] == whole else value
            yield replace(batch, inputs=inputs, samples=(number,))
