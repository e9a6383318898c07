"""Tiny mixtures of experts, and adapters on their parameters."""

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapterkit import LoraConfig
from adapterkit.runtime import attach

COMMON = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
        "intermediate_size_mlp": 32, "moe_layers": [0, 1], "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_shared_experts": 1, "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8,
        "num_key_value_heads": 4, "num_attention_heads": 8,
    },
}  # fmt: skip
ONE_IMPLEMENTATION = ("llama4_text", "jetmoe")
EXPERTS = ("gate_up_proj", "down_proj")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [
    (kind, implementation)
    for kind in MODELS
    for implementation in (IMPLEMENTATIONS[:1] if kind in ONE_IMPLEMENTATION else IMPLEMENTATIONS)
]
TOKENS = torch.tensor([[5, 9, 3, 17, 4, 30, 8], [6, 40, 11, 22, 9, 7, 12]])


def tiny(kind, implementation="eager"):
    """A tiny model with random weights."""
    config = AutoConfig.for_model(kind, **{**COMMON, **MODELS.get(kind, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation=implementation
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def parameters_of(kind):
    """Ends of the names of a model's experts."""
    if kind == "jetmoe":
        return ["input_linear.weight", "mlp.output_linear.weight"]
    return list(EXPERTS)


def randomize(parameters, seed=0):
    """Random values, of one seed for all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3, generator=generator)


def peft_model(model, parameters, seed=0, **settings):
    """PEFT's model with random factors on these parameters."""
    config = PeftConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=parameters, **settings
    )
    model = get_peft_model(model, config)
    randomize((p for name, p in model.named_parameters() if "lora_" in name), seed)
    return model.eval()


def loss_of(model, inputs=TOKENS):
    """Logits, and the gradient of the embedded tokens, after a backward pass."""
    embeddings = model.get_input_embeddings()(inputs).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    loss = logits.float().square().mean()
    loss.backward()
    return logits.detach(), embeddings.grad


def stored_gradients(handle, name="default"):
    """The gradients of an adapter by their keys in a file."""
    gradients = {}
    for site, part in handle.state.adapters[name].patches():
        values = part.a.data, part.b.data
        part.a.data, part.b.data = part.a.grad, part.b.grad
        gradients |= part.stored(site.path)
        part.a.data, part.b.data = values
    return {key.removeprefix("base_model.model."): g.detach() for key, g in gradients.items()}


def close(got, want):
    got, want = got.detach(), want.detach()
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * float(want.abs().max()))


def two_adapters(base, parameters=EXPERTS):
    """Two adapters with random factors: on all of the parameters, and on the last one."""
    handle = attach(base, LoraConfig(3, 5, [], parameters=parameters), name="first")
    handle.attach(LoraConfig(2, 3, [], parameters=parameters[-1:]), name="second")
    for seed, name in enumerate(handle.names):
        handle.activate(name)
        randomize(handle.parameters(name), seed)
    return handle
