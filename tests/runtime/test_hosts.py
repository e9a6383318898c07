"""Modules that are changed under their adapters: refused at the next forward and by save, and what
only wraps or moves them goes on."""

import pytest
import torch
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach
from tests.support.live import llama, tokens

QV = ["q_proj", "v_proj"]


def resize(model):
    model.resize_token_embeddings(70, mean_resizing=False)


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    ).eval()  # fmt: skip


def text(model):
    return model(tokens()).logits


def image(model):
    torch.manual_seed(1)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    return model(x, 3, states).sample


def replace(model):
    model.model.layers[1].self_attn = llama(seed=1).model.layers[1].self_attn


CASES = {
    "head": (llama, {"targets": ["q_proj", "lm_head"]}, resize, text, "lm_head: replaced"),
    "embedding": (llama, {"targets": ["embed_tokens"]}, resize, text, "embed_tokens: resized"),
    "copy": (llama, {"modules_to_save": ["lm_head"]}, resize, text, "lm_head: replaced"),
    "tokens": (llama, {"trainable_tokens": [1, 2]}, resize, text, "embed_tokens: resized"),
    "layer": (llama, {"targets": QV}, replace, text, "layers.1.self_attn"),
    "fused": (
        unet, {"targets": ["to_q", "to_out.0"]}, lambda model: model.fuse_qkv_projections(),
        image, "to_q.*fused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_at_the_next_forward_and_by_save(case, tmp_path):
    make, config, change, run, words = CASES[case]
    model = make()
    h = attach(model, LoraConfig(**{"targets": QV, "init": False, **config}), seed=1)
    run(model)
    change(model)
    for call in (lambda: run(model), lambda: h.save(tmp_path / "out"), lambda: h.merge()):
        with pytest.raises(AdapterkitError, match=words):
            call()
    assert not (tmp_path / "out").exists()
    with h.disabled(), torch.no_grad():
        disabled = run(model)
    h.detach()
    other = make()
    change(other)
    with torch.no_grad():
        torch.testing.assert_close(run(model), disabled)
        if case != "layer":
            torch.testing.assert_close(run(model)[..., :4], run(other)[..., :4])
    attach(model, LoraConfig(targets=["o_proj"] if make is llama else ["to_out.0"]))
    run(model)


def test_rows_of_what_was_replaced(tmp_path):
    h = attach(llama(), LoraConfig(targets=["lm_head"]))
    h.activate(None)
    resize(h.model)
    text(h.model)
    with pytest.raises(AdapterkitError, match="replaced"), h.rows(["default", None]):
        text(h.model)


class Wrapper(nn.Module):
    """As torch's CheckpointWrapper and FSDP: in the module's place, around it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_or_resized_modules_keep_their_adapters(tmp_path):
    model = llama()
    h = attach(model, LoraConfig(targets=[*QV, "lm_head"], init=False), seed=1)
    expected = text(model)
    model.model.layers[0] = Wrapper(model.model.layers[0])
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(text(model), expected)
    h.save(tmp_path / "wrapped")
    model = llama()
    h = attach(model, LoraConfig(targets=QV, init=False), seed=1)
    resize(model)
    assert text(model).shape[-1] == 70
    h.save(tmp_path / "elsewhere")


def test_adapters_work_after_diffusers_unfuses():
    model = unet()
    h = attach(model, LoraConfig(targets=["to_q"], init=False), seed=1)
    expected = image(model)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    torch.testing.assert_close(image(model), expected)
    h.detach()


def test_fused_attentions_with_a_flag():
    """Flux's, whose processor stays."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    h = attach(model, LoraConfig(targets=["to_q", "add_k_proj"], init=False), seed=1)
    model.fuse_qkv_projections()
    with pytest.raises(AdapterkitError, match="fused"):
        h.merge()
    model.unfuse_qkv_projections()
    h.merge()
