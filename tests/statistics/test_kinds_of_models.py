"""Quantized bases, 16 bits, experts, masks, CorDA's own covariance, models without layers."""

import copy

import pytest
import torch
import transformers

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Refused
from adapterkit.verbs.stats.collect import open_sources
from adapterkit.verbs.stats.data.tokens import TokenTracker
from adapterkit.verbs.stats.job import CollectionPlan
from adapterkit.verbs.stats.model import layers as units
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.verb import StatsOptions
from tests.statistics.test_layerwise import MODELS, pairs, texts
from tests.support import tiny
from tests.support.live import llama, tokens
from tests.support.stored import checkpoint, collect_sums, collected

WHAT = ("covariance", "gradient")


def notes_of(base, batches, **options):
    with open_sources(base.folder) as sources:
        stored = StoredModel(base, sources, torch.device("cpu"))
        return CollectionPlan(stored, StatsOptions(**options), batches).notes


def inputs_of(model, data, names):
    """The vectors that layers see, by batch."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(
                (args[0] if args else next(iter(kwargs.values()))).detach()
            ),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def covariance(vectors):
    rows = torch.cat([x.reshape(-1, x.shape[-1]).double() for x in vectors])
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_a_quantized_base_is_what_it_decodes_to(tmp_path, large, to):
    checkpoint(llama(hidden_size=64, intermediate_size=128), tmp_path / "base")
    adapterkit.quantize(tmp_path / "base", out=tmp_path / "packed", to=to)
    adapterkit.dequantize(tmp_path / "packed", out=tmp_path / "plain")
    packed, plain = (open_checkpoint(LocalFolder(tmp_path / name)) for name in ("packed", "plain"))
    expected = collected(plain, texts(), tmp_path, what=WHAT, whole=True)
    stats = collected(packed, texts(), tmp_path, what=WHAT, memory=0)
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(stats[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_models_equal_the_reference(tmp_path, large, dtype):
    """The model computes in its own dtype, as transformers loads it; sums and files are float32."""
    base = checkpoint(llama(dtype=dtype), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert model.dtype == dtype
    name = "model.layers.1.mlp.down_proj"
    expected = covariance(inputs_of(model, texts(masked=False), [name])[name])
    stats = collected(base, texts(masked=False), tmp_path, what=WHAT, memory=0)
    assert all(value.dtype == torch.float32 for value in stats.values())
    torch.testing.assert_close(stats[f"{name}.covariance"].double(), expected, rtol=1e-4, atol=1e-6)
    whole = collected(base, texts(masked=False), tmp_path, what=WHAT, whole=True)
    for key, value in whole.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(stats[key], value, rtol=0.02, atol=0.01 * scale, msg=key)


def test_buffers_are_the_loaded_models(tmp_path):
    """And parameters once they are read; tied ones are one."""
    from adapterkit.core.checkpoint.reader import Sources

    for name in ("tied llama", "t5", "swin", "whisper", "gemma2"):
        model = MODELS[name][0]()
        base = checkpoint(model, tmp_path / name)
        with Sources((base.folder,), {}) as sources:
            stored = StoredModel(base, sources, torch.device("cpu"))
            assert all(value.is_meta for value in stored.model.parameters())
            stored.load(stored.parameters(), stored.device)
        expected = type(model).from_pretrained(tmp_path / name)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = (dict(getattr(m, kind)()) for m in (stored.model, expected))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), (name, kind)


def test_masks_of_an_encoder_and_a_decoder(tmp_path, large):
    """Texts as long as each other: cross-attention sees the encoder's tokens, q the decoder's."""
    model, data = MODELS["t5"][0](), pairs()[:1]
    base = checkpoint(model, tmp_path / "base")
    cross = "decoder.block.1.layer.1.EncDecAttention"
    names = {f"{cross}.k": "attention_mask", f"{cross}.q": "labels"}
    seen = inputs_of(model, data, names)
    stats = collected(base, data, tmp_path, memory=0)
    for name, of in names.items():
        mask = data[0][of].bool() if of == "attention_mask" else data[0][of] != -100
        assert 0 < mask.sum() < mask.numel()
        expected = covariance([seen[name][0][mask]])
        actual = stats[f"{name}.covariance"].double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_batches_without_padding_are_followed_once(tmp_path, large, monkeypatch, whole):
    """Of those of the same shapes."""
    followed = set()
    mark = TokenTracker.mark
    monkeypatch.setattr(
        TokenTracker, "mark", lambda self, x, mask: (followed.add(self), mark(self, x, mask))
    )
    base = checkpoint(llama(), tmp_path / "base")
    data = [{"input_ids": tokens(2, 6, seed=seed)} for seed in range(4)]
    stats = collected(base, data, tmp_path, whole=whole)
    assert len(followed) == 1
    name = "model.layers.1.mlp.down_proj"
    expected = covariance(inputs_of(llama(), data, [name])[name])
    torch.testing.assert_close(stats[f"{name}.covariance"].double(), expected, rtol=1e-5, atol=1e-6)
    followed.clear()
    padded = {**data[0], "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    other = {"input_ids": tokens(2, 5)}
    collected(base, [*data, padded, other], tmp_path / "others", whole=whole)
    assert len(followed) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_padding_added_by_the_model_counts_in_no_batch(tmp_path, large, whole):
    """Longformer pads to its window, and has the tokens first in its attention."""
    model = tiny.model("longformer").eval()
    base = checkpoint(model, tmp_path / "base")
    data = [{"input_ids": tokens(3, 7, seed=seed)} for seed in range(3)]
    names = [f"encoder.layer.1.{name}" for name in ("attention.self.query", "output.dense")]
    first, then = inputs_of(model, data, names).values()
    assert {x.shape[:2] for x in first} == {(8, 3)} and {x.shape[:2] for x in then} == {(3, 8)}
    stats = collected(base, data, tmp_path, whole=whole)
    for name, kept in zip(names, ([x[:7] for x in first], [x[:, :7] for x in then]), strict=True):
        actual = stats[f"{name}.covariance"].double()
        torch.testing.assert_close(actual, covariance(kept), rtol=1e-4, atol=1e-5)


def test_cordas_own_covariance(tmp_path, large):
    """The mean over calls of one row of x xᵀ / max(x)², of all tokens."""
    model, name = llama(), "model.layers.1.self_attn.o_proj"
    base = checkpoint(model, tmp_path / "base")
    with pytest.raises(Refused, match="batches have several rows"):
        collect_sums(base, texts(), tmp_path / "work", compat="peft")
    data = [{key: x[row : row + 1] for key, x in batch.items()} for batch in texts()
            for row in range(2)]  # fmt: skip
    seen = inputs_of(model, data, [name])[name]
    rows = [(x / x.max().abs()).reshape(-1, x.shape[-1]) for x in seen]
    expected = sum(x.T @ x for x in rows) / len(rows)
    for whole in (True, False):
        stats = collected(base, data, tmp_path, compat="peft", whole=whole, memory=0)
        torch.testing.assert_close(stats[f"{name}.covariance"], expected)


def test_a_model_without_layers_runs_as_one(tmp_path, large, monkeypatch):
    """With a note, and the same statistics."""
    base = checkpoint(llama(), tmp_path / "base")
    expected = collected(base, texts(), tmp_path, whole=True)
    monkeypatch.setattr(units, "_elements", lambda model: iter(()))
    assert any("run as a whole" in note for note in notes_of(base, texts()))
    for key, value in collected(base, texts(), tmp_path).items():
        assert torch.equal(value, expected[key])


def test_parameters_that_are_not_stored(tmp_path):
    """A layer's are refused; a pooler behind all layers is zero, with a note."""
    model, data = MODELS["bert alone"][0](), texts(label=False)
    state = model.state_dict()
    without = {key: value for key, value in state.items() if "pooler" not in key}
    base = checkpoint(model, tmp_path / "pooler", state_dict=without)
    assert any("pooler" in note for note in notes_of(base, data, what=("mean",)))
    assert collected(base, data, tmp_path, what=("mean",))
    without = {key: value for key, value in state.items() if "layer.1.output.dense" not in key}
    base = checkpoint(copy.deepcopy(model), tmp_path / "layer", state_dict=without)
    with pytest.raises(Refused, match="every parameter"):
        collect_sums(base, data, tmp_path / "other")
    assert not [*(tmp_path / "other").iterdir()]
