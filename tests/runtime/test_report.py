"""The report has a row for everything that an adapter has on a model."""

import pytest
import torch

from adapterkit import LoraConfig
from adapterkit.runtime import attach
from tests.support.live import llama

pytestmark = pytest.mark.quick


def test_every_part_of_every_adapter():
    adapters = attach(
        llama(attention_bias=True),
        LoraConfig(
            4, 6, ["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}, bias="lora_only",
            modules_to_save=["norm"], trainable_tokens=[1, 2], init=False,
        ),
        seed=1,
    )  # fmt: skip
    adapters.attach(LoraConfig(2, 4, ["q_proj"], dora=True), name="other", seed=2)
    rows = adapters.report()
    shares = {(row.module, share.name, share.part): share for row in rows for share in row.adapters}
    layer = "model.layers.{}.self_attn.q_proj".format
    assert set(shares) == {
        *((layer(i), "default", part) for i in (0, 1) for part in ("factors", "bias")),
        *((layer(i), "other", "factors") for i in (0, 1)),
        ("model.norm", "default", "copy"), ("model.embed_tokens", "default", "tokens"),
    }  # fmt: skip
    assert [shares[layer(i), "default", "factors"].rank for i in (0, 1)] == [4, 2]
    assert shares[layer(1), "default", "factors"].scale == 3
    part = adapters.state.sites[layer(0)].parts["default"]["delta"]
    norm = torch.linalg.norm(1.5 * part.b @ part.a).item()
    assert shares[layer(0), "default", "factors"].norm == pytest.approx(norm, rel=1e-5)
    assert not shares[layer(0), "other", "factors"].active
    table = str(rows).splitlines()
    assert table[0].split() == "module kind adapter part rank scale norm active".split()
    assert len(table) == 1 + len(shares)
