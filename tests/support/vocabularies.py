"""Adapters that train token rows, or carry copies of a resized vocabulary."""

import torch

from tests.support import oracle
from tests.support.oracle import DTYPES, load, stored


def _tokens(base, folder, build=oracle.llama, **config):
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [79, 3, 40]} | config
    oracle.train(load(build, base), folder, **config)


COPY = "base_model.model.model.embed_tokens.base_layer.weight"


def _two(llama, tmp_path):
    """Two adapters of embedding, head and attention; PEFT stores copies of the base's embedding and
    head in both."""
    for seed in (1, 2):
        oracle.train(
            load(oracle.llama, llama),
            tmp_path / f"a{seed}",
            seed=seed,
            target_modules=["embed_tokens", "lm_head", "q_proj"],
        )
        assert COPY in stored(tmp_path / f"a{seed}")
    return tmp_path / "a1", tmp_path / "a2"


def _copies(llama, folder, dtype="bf16", change=0.0, **config):
    """An adapter of the embedding whose copy is of the base in another dtype, or of another
    base."""
    model = load(oracle.llama, llama).to(DTYPES[dtype])
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += change
    oracle.train(model, folder, target_modules=["embed_tokens"], **config)
    return folder
