"""Intruder dimensions of an adapter's modules on their base."""

from collections.abc import Callable

from adapterkit.adapters.kinds.dora_deltas import BaseWeights
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Problems, shown
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.lazy import torch
from adapterkit.core.merge.sites import join, names_of
from adapterkit.core.records import Json
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product, Svd
from adapterkit.kernels.lowrank.intruders import intruders


def intruders_of(factors: Factors, weight: StoredParameter, reader: TensorReader) -> Svd:
    """A module's intruder dimensions, as a matrix (out, in)."""
    (product,) = factors.products(reader)
    matrix = weight.matrix(reader).double()
    if not product.left.any():
        return Svd(matrix[:, :0], matrix.new_zeros(0), matrix[:0])
    if not weight.transposed:
        return intruders(matrix, product)
    u, s, vh = intruders(matrix.T, Product(product.right.T, product.left.T))
    return Svd(vh.T, s, u.T)


def weight_of(weights: BaseWeights, factors: Factors) -> StoredParameter:
    """A module's weight; `Refused` if its factors do not fit."""
    return weights.fitting(factors, f"factors {factors.shape} of {shown(factors.module)}")


def intruders_text(counts: dict[str, int]) -> str:
    """A sentence on the intruder dimensions of modules."""
    most = max(counts, key=lambda module: counts[module])
    with_some, total = sum(map(bool, counts.values())), sum(counts.values())
    worst = f"; most: {counts[most]} of {shown(most)}" if total else ""
    return f"{total} intruder dimensions in {with_some} of {len(counts)} modules{worst}"


def counter(on: Folder) -> Callable[[Adapter, list[Json], Problems], Json]:
    """A function that counts the intruder dimensions of an adapter's modules on that base."""

    def count(adapter: Adapter, modules: list[Json], errors: Problems) -> Json:
        counts = count_intruders(adapter, read_checkpoint(on), errors)
        for module in modules:
            module["intruders"] = counts.get(module["module"])
        return {"intruders": intruders_text(counts)} if counts else {}

    return count


def count_intruders(adapter: Adapter, base: Checkpoint, errors: Problems) -> dict[str, int]:
    """The number of intruder dimensions of each module; modules that do not fit the base, and
    stacks of experts, join the errors."""
    notes: list[str] = []
    sites = join([adapter], errors, names_of(None, [adapter], notes))
    joined = [next(iter(site.members.values())) for site in sites.values()]
    weights = BaseWeights(base, adapter, [factors.module for factors in joined], notes)
    counts = {}
    with Sources((base.folder, adapter.folder), {}) as sources, torch.inference_mode():
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=True)
        for factors in joined:
            with errors.collected():
                weight = weight_of(weights, factors)
                counts[factors.module] = len(intruders_of(factors, weight, reader).s)
    return counts
