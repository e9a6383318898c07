"""Compare adapters of one base: cosines, shared spaces, opposed signs, the effect of a sum.

All from the factors, in float64, module by module; only the signs come from rows of the products.
"""

from collections.abc import Sequence
from typing import NamedTuple

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Problems, Refused
from adapterkit.core.inputs.adapter_door import adapter_or_file
from adapterkit.core.inputs.sources import open_statistics, open_unconverted
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.merge.sites import join
from adapterkit.core.options import StrPath
from adapterkit.core.records import Json
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.look.heatmaps import natural, place_of
from adapterkit.verbs.shared.statistics_file import read_covariance, select_covariances

ROWS = 16  # of each product, whose elements' signs are compared


class _Sums(NamedTuple):
    """Sums over modules, each (adapters, adapters)."""

    inner: Tensor
    inputs: Tensor  # of cos² of the angles between spaces, and below how many there are
    outputs: Tensor
    angles: Tensor
    opposed: Tensor
    elements: Tensor

    @classmethod
    def zeros(cls, count: int) -> "_Sums":
        return cls(*torch.zeros(len(cls._fields), count, count, dtype=torch.float64))


def adapter_of(source: StrPath, base: Folder | None) -> Folder:
    """The adapter of a source in PEFT's layout."""
    folder = open_unconverted(source)
    adapter = adapter_or_file(folder, base)
    if CONFIG in adapter.files():
        return adapter
    raise Refused(
        "no adapter",
        expected="adapters, in any format",
        where=folder.label,
        hint="check the path",
        code="AK206",
    )


def distinct(names: list[str]) -> list[str]:
    """The names; repeated ones get a number."""
    return [f"{name} {n + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]


@torch.inference_mode()
def compare_adapters(folders: Sequence[Folder], stats: StrPath | None = None) -> Json:
    """The `pairs` of a report; `Refused` for adapters whose modules do not fit each other."""
    errors, count = Problems(), len(folders)
    adapters = [read_adapter(folder, number) for number, folder in enumerate(folders)]
    sites = join(adapters, errors)
    errors.raise_all()
    sums, layers = _Sums.zeros(count), {}
    opened = list(folders)
    statistics = None if stats is None else open_checkpoint(open_statistics(stats), count)
    if statistics is not None:
        opened.append(statistics.folder)
    widths = {name: next(iter(site.members.values())).shape[1] for name, site in sites.items()}
    inputs = select_covariances(statistics, widths)
    on_outputs = torch.zeros_like(sums.inner)
    with Sources(tuple(opened), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=False)
        for name, site in sites.items():
            products = {n: factors.products(reader) for n, factors in site.members.items()}
            layer = layers.setdefault(place_of(name)[0], torch.zeros_like(sums.inner))
            covariance = None if statistics is None else read_covariance(reader, inputs[name])
            for experts in zip(*products.values(), strict=True):
                of = dict(zip(products, experts, strict=True))
                layer += _add(sums, of)
                if covariance is not None:
                    on_outputs += _inner_products(of, count, covariance)
    ordered = sorted(layers.items(), key=lambda one: natural(one[0]))
    result = {
        "cosines": _cosines(sums.inner),
        "inputs": _shares(sums.inputs, sums.angles),
        "outputs": _shares(sums.outputs, sums.angles),
        "opposed": _shares(sums.opposed, sums.elements),
        "layers": [{"layer": layer, "cosines": _cosines(inner)} for layer, inner in ordered],
        "sum": _sum(sums.inner),
    }
    return result | ({} if statistics is None else {"output_cosines": _cosines(on_outputs)})


def _add(sums: _Sums, of: dict[int, Product]) -> Tensor:
    """Add the products of a module, by adapter; return their inner products."""
    inner = _inner_products(of, len(sums.inner))
    sums.inner.add_(inner)
    decomposed = {n: _spaces(product) for n, product in of.items()}
    signs = {n: _signs(product) for n, product in of.items()}
    for i, one in decomposed.items():
        for j, other in decomposed.items():
            sums.inputs[i, j] += float((one[1] @ other[1].T).square().sum())
            sums.outputs[i, j] += float((one[0].T @ other[0]).square().sum())
            sums.angles[i, j] += min(one[0].shape[1], other[0].shape[1])
            both = signs[i] * signs[j]
            sums.opposed[i, j] += float((both < 0).sum())
            sums.elements[i, j] += float((both != 0).sum())
    return inner


def _inner_products(of: dict[int, Product], count: int, covariance: Tensor | None = None) -> Tensor:
    """⟨Xᵢ, Xⱼ⟩, or ⟨Xᵢ C, Xⱼ⟩, of the adapters that have the module."""
    table = torch.zeros(count, count, dtype=torch.float64)
    for i, one in of.items():
        right = one.right if covariance is None else one.right @ covariance.double()
        for j, other in of.items():
            table[i, j] = algebra.inner(Product(one.left, right), other)
    return table


def _spaces(product: Product) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the outputs, in columns, and of the inputs, in rows."""
    svd = algebra.svd(product)
    rank = int((svd.s > svd.s.max() * 1e-6).sum()) if bool(svd.s.any()) else 0
    return svd.u[:, :rank], svd.vh[:rank]


def _signs(product: Product) -> Tensor:
    """The signs of some rows' elements."""
    rows = torch.linspace(0, len(product.left) - 1, min(ROWS, len(product.left))).long()
    return (product.left[rows] @ product.right).sign()


def _cosines(inner: Tensor) -> list[list[float | None]]:
    """Cosines; null if an adapter is zero, or has no such module."""
    norms = inner.diagonal().clamp_min(0).sqrt()
    return _shares(inner, norms[:, None] * norms)


def _shares(part: Tensor, whole: Tensor) -> list[list[float | None]]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return [[p / w if w else None for p, w in zip(*rows, strict=True)] for rows in pairs]


def _sum(inner: Tensor) -> Json:
    """The norm of the plain sum of all deltas, that of independent deltas, and the retention of
    each."""
    squares = inner.diagonal()
    (kept,) = _shares(inner.sum(0)[None], squares[None])
    return {
        "norm": max(float(inner.sum()), 0.0) ** 0.5,
        "independent": float(squares.sum()) ** 0.5,
        "retention": kept,
    }
