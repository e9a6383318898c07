"""Adapters to combine: three of one rank, and some of mixed ranks."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.deltas import trained


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    """Three adapters of one rank on every kind of layer, of different alphas."""
    root = tmp_path_factory.mktemp("three")
    return [
        trained(root / f"a{i}", seed=i, r=4, lora_alpha=alpha)
        for i, alpha in enumerate((6, 3.5, 8))
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    """Ranks, scales, patterns and modules that differ; bfloat16 factors in one."""
    root = tmp_path_factory.mktemp("mixed")
    first = trained(
        root / "a0",
        1,
        r=4,
        lora_alpha=6,
        rank_pattern={"fit": 7},
        alpha_pattern={"fit": 3, "narrow": 1.5},
    )
    second = trained(root / "a1", 2, r=3, lora_alpha=5, use_rslora=True)
    third = trained(root / "a2", 3, r=2, lora_alpha=4, target_modules=["fit", "image", "embed"])
    tensors = {k: v.bfloat16() for k, v in load_file(third / "adapter_model.safetensors").items()}
    save_file(tensors, third / "adapter_model.safetensors")
    return [first, second, third]
