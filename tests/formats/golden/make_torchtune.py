"""Adapters of torchtune, saved as its checkpointer does: `python make_torchtune.py` fills
torchtune/.

Made with torchtune 0.6.1, torchao 0.9 (0.18 no longer has what it imports), torch 2.13. deltas/ has
what its own merge adds to the weights, under the names and in the rows that its own converter to
transformers gives them.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf, tune_to_peft_adapter_config
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 20, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16,
    "max_seq_len": 32, "intermediate_dim": 24,
}  # fmt: skip
MODEL = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
CASES = {
    "lora": {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
             "apply_lora_to_mlp": True, "apply_lora_to_output": True},
    "dora": {"lora_attn_modules": ["q_proj", "v_proj"], "use_dora": True},
}  # fmt: skip


def make(name: str, options: dict) -> None:
    torch.manual_seed(7)
    model = lora_llama3(**SHAPE, **options, lora_rank=3, lora_alpha=6)
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter)
        if key.endswith("magnitude"):
            parameter.data = parameter.data.abs() + 1
    home = HERE / "torchtune" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    state = {k: v.detach().clone() for k, v in get_adapter_state_dict(model.state_dict()).items()}
    torch.save(state, home / "adapter_model.pt")
    targets = list(options["lora_attn_modules"])
    targets += ["w1", "w2", "w3"] if options.get("apply_lora_to_mlp") else []
    targets += ["output"] if options.get("apply_lora_to_output") else []
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "peft_type": "LORA"}
    settings = tune_to_peft_adapter_config(settings, "tiny/model")
    (home / "adapter_config.json").write_text(json.dumps(settings))
    # its checkpointer copies the model's config beside the adapter
    (home / "config.json").write_text(json.dumps({"model_type": "llama", **MODEL}))
    whole = {k: v.detach().clone() for k, v in model.state_dict().items()}
    plain = {k: v.clone() for k, v in whole.items() if k not in state}
    merged = get_merged_lora_ckpt(whole, rank=3, alpha=6)
    before, after = (tune_to_hf(dict(one), 4, 2, 16) for one in (plain, merged))
    keys = [key for key in before if not torch.equal(before[key], after[key])]
    if "use_dora" in options:  # its delta is of the base too
        base = {key: before[key].contiguous() for key in keys}
        save_file(base, HERE.parent / f"deltas/torchtune_{name}_base.safetensors")
    deltas = {key: (after[key] - before[key]).contiguous() for key in keys}
    save_file(deltas, HERE.parent / f"deltas/torchtune_{name}.safetensors")


if __name__ == "__main__":
    for case, options in CASES.items():
        make(case, options)
