"""An adapter of a resized vocabulary."""

import peft
import pytest
import torch

from tests.support import oracle
from tests.support.oracle import load


@pytest.fixture
def resized(llama, tmp_path):
    """An adapter trained after `resize_token_embeddings(90)`, on attention; PEFT saved both
    embeddings. And its model."""

    def make(base=llama, build=oracle.llama, size=90, **config):
        model = load(build, base)
        with oracle.quiet():
            model.resize_token_embeddings(size, mean_resizing=False)
        model.name_or_path = str(base)
        with oracle.quiet():
            wrapped = peft.get_peft_model(
                model, peft.LoraConfig(r=4, **({"target_modules": ["q_proj"]} | config))
            )
            oracle.perturb(wrapped, 1)
            with torch.no_grad():
                embedding = wrapped.get_input_embeddings().weight
                embedding[80:] = torch.randn(
                    embedding[80:].shape, generator=torch.Generator().manual_seed(3)
                ).to(embedding)
            wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
            theirs = wrapped.merge_and_unload()
        return tmp_path / "adapter", theirs

    return make
