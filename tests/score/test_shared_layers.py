"""Models that have layers in common: each is computed once, to the same numbers."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit.verbs.score.verb import score
from adapterkit.verbs.stats.model import activations
from adapterkit.verbs.stats.model import layers as units
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule
from tests.support import oracle
from tests.support.texts import save_tokenizer, write_rows

TEXTS = [{"text": text} for text in ("who is that?", "the others are there.", "no, they were")]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each unit computes something; embeddings and heads are units."""
    calls, original = Counter[str](), LayerwiseSchedule.computed

    def count(self, unit, *rest):
        calls[unit.name] += 1
        return original(self, unit, *rest)

    monkeypatch.setattr(LayerwiseSchedule, "computed", count)
    monkeypatch.setattr(units, "LARGE", 1)
    monkeypatch.setattr(activations, "SMALL", 1)
    return calls


@pytest.fixture
def base(tmp_path: Path) -> Path:
    oracle.save_base(oracle.llama(), tmp_path / "base", "fp32")
    return save_tokenizer(tmp_path / "base")


def changed(base: Path, name: str, key: str) -> Path:
    """A copy of a model, with another value of one tensor."""
    out = base.parent / name
    out.mkdir()
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def rows(models: list[Path], data: Path, **options) -> dict[str, dict]:
    return {row["model"]: row for row in score([*map(str, models)], data=data, **options)["rows"]}


@pytest.mark.parametrize("memory", [None, 1])  # 1: all activations are in the file
def test_layers_before_the_first_that_differs_are_computed_once(base, computed, memory):
    data = write_rows(base.parent / "texts.jsonl", *TEXTS)
    last = changed(base, "last", "model.layers.1.mlp.down_proj.weight")
    first = changed(base, "first", "model.layers.0.mlp.down_proj.weight")
    alone = {str(one): rows([one], data)[str(one)]["loss"] for one in (base, last, first)}
    computed.clear()
    together = rows([base, last, first], data, memory=memory)
    assert {name: row["loss"] for name, row in together.items()} == alone
    assert len({row["value"] for row in alone.values()}) == 3
    once, each = len(TEXTS), len(TEXTS) * 3
    assert computed["model.embed_tokens"] == once
    assert computed["model.layers.0"] == 2 * once
    assert computed["model.layers.1"] == computed["lm_head"] == each


def test_a_copy_in_another_file_shares_all_but_the_head(base, computed):
    data = write_rows(base.parent / "texts.jsonl", *TEXTS)
    copy = changed(base, "copy", "lm_head.weight")
    found = rows([base, copy], data, against=base)
    assert found[str(base)]["kl"]["value"] == 0 and found[str(base)]["same_top1"] == 1
    assert found[str(copy)]["kl"]["value"] > 0
    assert {computed[name] for name in computed if name != "lm_head"} == {len(TEXTS)}


def test_models_whose_settings_differ_share_nothing(base, computed):
    data = write_rows(base.parent / "texts.jsonl", *TEXTS)
    other = changed(base, "other", "lm_head.weight")
    config = (other / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in config
    (other / "config.json").write_text(
        config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
    )
    assert rows([base, other], data).keys() == {str(base), str(other)}
    assert set(computed.values()) == {2 * len(TEXTS)}


def test_a_layer_that_is_called_twice_gives_both_outputs(base, computed, monkeypatch):
    """As models that repeat their layers do."""
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.llama.modeling_llama import LlamaModel

    def twice(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        positions = self.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in (*self.layers, self.layers[-1]):
            x = layer(x, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    monkeypatch.setattr(LlamaModel, "forward", twice)
    data = write_rows(base.parent / "texts.jsonl", *TEXTS)
    copy = changed(base, "copy", "lm_head.weight")
    alone = {str(one): rows([one], data)[str(one)]["loss"] for one in (base, copy)}
    computed.clear()
    together = rows([base, copy], data)
    assert {name: row["loss"] for name, row in together.items()} == alone
    assert computed["model.layers.1"] == 2 * len(TEXTS)
