"""The report has a row for everything that an adapter has on a model."""

import pytest
import torch

from adapterkit import LoraConfig
from adapterkit.runtime import attach
from tests.support.live import llama, peft_of

pytestmark = pytest.mark.quick


def test_every_part_of_every_adapter():
    adapters = attach(
        llama(attention_bias=True),
        LoraConfig(
            4, 6, ["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}, bias="lora_only",
            modules_to_save=["model.norm"], trainable_tokens=[1, 2], init=False,
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
    part = adapters.state.sites[layer(0)].patches["default"]["delta"]
    norm = torch.linalg.norm(1.5 * part.b @ part.a).item()
    assert shares[layer(0), "default", "factors"].norm == pytest.approx(norm, rel=1e-5)
    assert not shares[layer(0), "other", "factors"].active
    table = rows.table().splitlines()
    assert table[0].split() == "module kind adapter part rank scale norm active".split()
    assert len(table) == 1 + len(shares)
    kinds = "4 Linear factors, 2 Linear bias, 1 LlamaRMSNorm copy, 1 Embedding tokens"
    assert str(rows) == repr(rows) and len(str(rows).splitlines()) == 3
    names, _, counts = str(rows).splitlines()[2].partition(": ")
    assert names == "by kind" and sorted(counts.split(", ")) == sorted(kinds.split(", "))


def test_totals_as_peft(tmp_path):
    config = LoraConfig(4, 6, ["q_proj", "lm_head"], modules_to_save=["norm"])
    adapters = attach(llama(), config)
    adapters.save(tmp_path)
    report, peft = adapters.report(), peft_of(tmp_path, llama())
    trained, both = peft.get_nb_trainable_parameters()
    assert (report.trainable, report.total) == (trained, both)
    assert report.share == trained / both
    assert str(report).splitlines() == [
        f"trainable parameters: {trained:,} ({trained / both * 100:.4g} %)",
        f"total parameters: {both:,}",
        "by kind: 3 Linear factors, 5 LlamaRMSNorm copy",
    ]
    adapters.activate(None)
    assert adapters.report().trainable == 0


def test_totals_of_a_quantized_base():
    import bitsandbytes as bnb

    net = torch.nn.Sequential(torch.nn.Linear(64, 65, bias=False), torch.nn.Linear(65, 64))
    count = sum(p.numel() for p in net.parameters())
    layer = bnb.nn.Linear4bit(64, 65, bias=False, quant_type="nf4")
    layer.load_state_dict(net[0].state_dict())
    net[0] = layer.to("cpu")
    layer(torch.zeros(1, 64))
    assert net[0].weight.numel() < 64 * 65
    report = attach(net, LoraConfig(2, 2, ["0"])).report()
    assert report.total - report.trainable == count
