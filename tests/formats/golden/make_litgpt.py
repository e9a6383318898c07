"""Adapters of litgpt, saved as `litgpt finetune lora` does: `python make_litgpt.py` fills litgpt/.

Made with litgpt 0.5.13 (lightning 2.6, torch 2.13). deltas/ has what its own merge adds to the
weights, under the names that its own converter gives them in transformers. `query_value_old` has
the module names of litgpt up to 0.5.3; the rows of lora_B are the same there (its lora_ind scatters
them to the interleaved rows of the weight).
"""

import shutil
from pathlib import Path

import torch
import yaml
from litgpt.config import Config as BaseConfig
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt.utils import save_config
from safetensors.torch import save_file

HERE = Path(__file__).parent
TARGETS = ("query", "key", "value", "projection", "mlp", "head")
SHAPE = {
    "n_layer": 1, "n_embd": 16, "n_head": 4, "n_query_groups": 2, "head_size": 4,
    "intermediate_size": 24, "padded_vocab_size": 20, "vocab_size": 20, "block_size": 32,
}  # fmt: skip
CASES = {
    "all": TARGETS,
    "query_value": ("query", "value"),
    "query_value_old": ("query", "value"),
    "key": ("key", "mlp"),
}


def make(name: str, targets: tuple[str, ...]) -> None:
    torch.manual_seed(7)
    lora = {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.05}
    lora |= {f"lora_{target}": target in targets for target in TARGETS}
    config = Config.from_name("Llama-3-8B", **SHAPE, **lora)
    model = GPT(config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    state = {k: v for k, v in model.state_dict().items() if lora_filter(k, v)}
    if name.endswith("_old"):
        state = {k.replace("attn.qkv.", "attn.attn."): v for k, v in state.items()}
    home = HERE / "litgpt" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    torch.save({"model": state}, home / "lit_model.pth.lora")
    save_config(BaseConfig.from_name("Llama-3-8B", **SHAPE), home)  # the base's, as it copies it
    run = {"checkpoint_dir": "checkpoints/tiny", "out_dir": "out", "precision": "32-true", **lora}
    (home / "hyperparameters.yaml").write_text(yaml.dump(run, sort_keys=False))

    before = weights(model, config)
    merge_lora_weights(model)
    after = weights(model, config)
    deltas = {key: after[key] - before[key] for key in before}
    deltas = {key: delta.contiguous() for key, delta in deltas.items() if delta.any()}
    save_file(deltas, HERE.parent / f"deltas/litgpt_{name}.safetensors")


def weights(model: GPT, config: Config) -> dict[str, torch.Tensor]:
    """The weights under transformers' names."""
    state = {
        key.replace("linear.", ""): value.clone()
        for key, value in model.state_dict().items()
        if not lora_filter(key, value)
    }
    converted: dict[str, torch.Tensor] = {}
    copy_weights_llama(config, converted, state)
    return converted


if __name__ == "__main__":
    for case, targets in CASES.items():
        make(case, targets)
