"""What the suites of adapter algebra share: a model of every kind of layer, adapters of it, and
their deltas as PEFT loads them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support import oracle

LAYERS = ["embed", "line", "image", "tall", "point", "square", "volume", "fit", "narrow"]


def net() -> nn.Module:
    """Every kind of layer, without attention, which PEFT's combination does not know."""
    model = oracle.net()
    del model.attention
    return model


def trained(folder: Path, seed: int, **config) -> Path:
    """An adapter of `net`, all of it moved at random."""
    oracle.train(net(), folder, seed=seed, **({"target_modules": LAYERS} | config))
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """scale * b @ a of every module as PEFT loads the adapter, in float64, as a matrix (out,
    in)."""
    actual = {}
    with oracle.quiet():
        model = oracle.peft_model(net(), folder)
    for path, layer in model.named_modules():
        if isinstance(layer, oracle.peft_layers.LoraLayer):
            embedding = isinstance(layer.get_base_layer(), nn.Embedding)
            factors = (
                (layer.lora_embedding_A, layer.lora_embedding_B)
                if embedding
                else (layer.lora_A, layer.lora_B)
            )
            a, b = (f["a0"] if embedding else f["a0"].weight for f in factors)
            actual[path.removeprefix("base_model.model.")] = (
                layer.scaling["a0"] * b.double().flatten(1) @ a.double().flatten(1)
            )
    return {name: delta.detach() for name, delta in actual.items()}


def weighted(sources: list[Path], weights) -> dict[str, Tensor]:
    """Σ weight * delta by module."""
    total: dict[str, Tensor] = {}
    for source, weight in zip(sources, weights, strict=True):
        for name, delta in deltas(source).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def assert_close(actual: dict, expected: dict, tolerance: float = 2e-6) -> None:
    assert set(actual) == set(expected)
    for name, delta in expected.items():
        assert float((actual[name] - delta).norm()) <= tolerance * max(
            float(delta.norm()), 1e-12
        ), name
