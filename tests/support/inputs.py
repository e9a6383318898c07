"""Inputs of layers, and the files of their statistics."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.kernels.lowrank.weighted import root
from tests.support.deltas import net

# of `deltas.net`; "narrow" has more inputs than `statistics` has tokens
LINEAR = [name for name, layer in net().named_modules() if isinstance(layer, torch.nn.Linear)]


def draws(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Normal numbers in float64, of which the last column is `spread` times as large as the first;
    with a spread they are correlated."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if spread == 1 or shape[-1] == 1:
        return values
    return values * torch.linspace(1, spread, shape[-1]) + values[..., :1]


def statistics(
    path: Path, widths: dict[str, int] | None = None, seed: int = 0, tokens: int = 12
) -> tuple[Path, dict[str, Tensor]]:
    """A file of covariances of some inputs of modules by their widths (default: `deltas.net`'s
    linear layers), and these inputs, (tokens, in) float64."""
    layers = dict(net().named_modules())
    widths = widths or {name: layers[name].in_features for name in LINEAR}
    xs = {
        name: draws(tokens, width, seed=1000 * seed + i, spread=6)
        for i, (name, width) in enumerate(widths.items())
    }
    save_file({f"{n}.covariance": (x.T @ x / len(x)).float() for n, x in xs.items()}, path)
    return path, xs


def root_of(path: Path, module: str) -> Tensor:
    """The root that weights a module's errors, float64."""
    return root(load_file(path)[f"{module}.covariance"])[0].double()
