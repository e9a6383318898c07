"""One layer at a time against the whole model: many architectures, nothing in memory that can wait
on the disk."""

import pytest
import torch
import transformers

from tests.support.live import llama, tokens
from tests.support.stored import checkpoint, collected
from tests.support.usual import usual

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4}  # fmt: skip


def build(name, config, **options):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def texts(masked=True, label=True):
    result = []
    for seed in range(3):
        ids = tokens(2, 8 + seed, seed=seed)
        mask = torch.ones_like(ids)
        if masked:
            mask[0, -3:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if label:
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        result.append(batch)
    return result


def pairs():
    """Texts of an encoder and a decoder, as long as each other in one batch."""
    result = []
    for seed, length in enumerate((8, 5)):
        labels = tokens(2, length, seed=9 + seed)
        labels[1, -2:] = -100
        result.append({**texts(label=False)[seed], "labels": labels})
    return result


def images():
    return [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))}
        for i in range(2)
    ]


def sounds():
    return [
        {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(i)),
         "labels": tokens(2, 5, seed=i)}
        for i in range(2)
    ]  # fmt: skip


MOE = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MODELS = {
    "llama": (lambda: llama(num_hidden_layers=3), texts, True),
    "tied llama": (lambda: llama(tie_word_embeddings=True), texts, True),
    "gpt2": (lambda: build("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=3,
                           n_head=4), texts, True),
    "mixtral": (lambda: build("MixtralForCausalLM", "MixtralConfig", **MOE, num_local_experts=4),
                texts, True),
    "qwen2_moe": (lambda: build("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **MOE, num_experts=4,
                                moe_intermediate_size=24, shared_expert_intermediate_size=24),
                  texts, True),
    "gemma2": (lambda: build("Gemma2ForCausalLM", "Gemma2Config", **SIZES, num_key_value_heads=2,
                             head_dim=8, sliding_window=4), texts, True),
    "bert": (lambda: build("BertForMaskedLM", "BertConfig", **SIZES), texts, True),
    "bert alone": (lambda: build("BertModel", "BertConfig", **SIZES),
                   lambda: texts(label=False), False),
    "albert": (lambda: build("AlbertForMaskedLM", "AlbertConfig", **SIZES, embedding_size=16),
               texts, True),
    "t5": (lambda: build("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32,
                         d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0),
           pairs, True),
    "bart": (lambda: build("BartForConditionalGeneration", "BartConfig", vocab_size=64, d_model=32,
                           encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                           decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                           pad_token_id=1, decoder_start_token_id=2), pairs, True),
    "vit": (lambda: build("ViTModel", "ViTConfig", hidden_size=32, intermediate_size=48,
                          num_hidden_layers=2, num_attention_heads=4, image_size=16,
                          patch_size=4), images, False),
    "swin": (lambda: build("SwinModel", "SwinConfig", image_size=16, patch_size=2, embed_dim=16,
                           depths=[2, 2], num_heads=[2, 2], window_size=2), images, False),
    "whisper": (lambda: build(
        "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=64, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1), sounds, True),
}  # fmt: skip


# of kinds of layers that the others have: a decoder's, experts', an encoder's, an encoder and its
# decoder's
ALIKE = ("gemma2", "qwen2_moe", "bert", "swin", "bart")


@pytest.mark.parametrize("name", usual(MODELS, lambda name: name not in ALIKE))
def test_layer_by_layer_equals_the_full_model(tmp_path, large, name):
    """Covariances, means, gradients; gradients of `whole` are autograd's (test_whole)."""
    make, data, has_loss = MODELS[name]
    base = checkpoint(make(), tmp_path / "base")
    what = ("covariance", "mean", *(["gradient"] if has_loss else []))
    whole = collected(base, data(), tmp_path, what=what, whole=True)
    layerwise = collected(base, data(), tmp_path, what=what, memory=0)
    assert layerwise.keys() == whole.keys() and whole
    for key, value in whole.items():
        torch.testing.assert_close(layerwise[key], value, rtol=1e-5, atol=1e-7, msg=key)
    # of forward statistics alone, which end before the head
    forward = collected(base, data(), tmp_path, what=("mean",), memory=0)
    assert forward.keys() == {key for key in whole if key.endswith(".mean")}
    for key, value in forward.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-7, msg=key)


def test_gradients_of_small_layers_outside_the_lists(tmp_path):
    """They stay in memory, and are no part of a unit's."""
    base, data = checkpoint(MODELS["albert"][0](), tmp_path / "base"), texts()
    what = ("mean", "gradient")
    whole = collected(base, data, tmp_path, what=what, whole=True)
    layerwise = collected(base, data, tmp_path, what=what, memory=0)
    assert "predictions.dense.gradient" in whole and layerwise.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(layerwise[key], value, rtol=1e-5, atol=1e-7, msg=key)
