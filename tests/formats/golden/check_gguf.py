"""llama.cpp with the adapters that `convert --to gguf` writes, against torch with PEFT.

    python check_gguf.py LLAMA_CPP

LLAMA_CPP: `vendor/llama.cpp` of llama-cpp-python's source distribution, whose converters make the
base models and the adapters to compare with. llama.cpp runs from the `xllamacpp` wheel, which is no
test dependency. A base's log-probabilities of all tokens after a prompt, and by how much they
change with an adapter, are the same as torch's: to 1e-5, or as far as the base's own.

Measured, the largest difference of a log-probability beside torch: 3e-6 to 6e-6 for Llama (linear
layers, other ranks and alphas, rsLoRA, embeddings, head), Qwen2, Mistral 3 (multimodal) and Mixtral
with its experts, whose log-probabilities change by 1.6 to 5.0; 2e-5 for Qwen3.5 with its linear
attention, 1.8e-3 for Gemma and 1.2e-3 for Gemma 3 (multimodal), whose bases alone are as far apart.
Beside the converter's adapter: 0 in all cases that it reads; of an adapter for Mistral 3 it writes
the base. With factors on tied embeddings llama.cpp ends the process; the script shows that they are
refused.

Versions: xllamacpp 2026.10.11549, llama-cpp-python 0.3.36, transformers 5.24.0, PEFT 0.21.2.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import adapterkit
from adapterkit.core.errors import Refused

PROMPT = [1, 5, 9, 13, 40, 77, 200, 33]
END = 2  # of a text
TOLERANCE = 1e-5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LINEAR[:4]
INSIDE = r".*language_model.*\.\w+_proj"  # of multimodal models
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"k_proj": 6, "layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"v_proj": 11, "layers.0.mlp.down_proj": 2.5},
}
# base, the adapter's settings, whether llama.cpp's converter reads them too
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "linear": ("llama", {"target_modules": LINEAR}, True),
    "patterns": ("llama", {"target_modules": LINEAR, **PATTERNS}, False),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}, False),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, True),
    "head": ("llama", {"target_modules": ["lm_head", "k_proj"]}, True),
    "qwen2": ("qwen2", {"target_modules": LINEAR}, True),
    "gemma": ("gemma", {"target_modules": LINEAR}, True),
    "gemma3": ("gemma3", {"target_modules": INSIDE}, True),
    "mistral3": ("mistral3", {"target_modules": INSIDE}, False),
    "qwen3.5": ("qwen3_5", {"target_modules": "all-linear"}, True),
    "experts": ("mixtral", {"target_modules": ATTENTION, "target_parameters": STACKS}, False),
}


def main(llama_cpp: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bases = write_bases(root, llama_cpp)
        for case, (base, settings, is_plain) in CASES.items():
            check(root, llama_cpp, case, bases[base], settings, is_plain)
        check_tied(root, bases["gemma"])


def write_bases(root: Path, llama_cpp: Path) -> dict[str, Path]:
    """Tiny models with a tokenizer of bytes, and the same as base.gguf in each folder."""
    text = root / "text"
    text.write_text("\n".join(f"the fox jumps over {i} dogs and {7 * i} cats" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(root / "tokenizer"), vocab_size=300, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=END, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = (root / "tokenizer.model").read_bytes()
    count = sentencepiece.SentencePieceProcessor(str(root / "tokenizer.model")).GetPieceSize()
    sizes: dict[str, Any] = {
        "vocab_size": count, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "eos_token_id": END,
    }  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**sizes),
        "qwen2": transformers.Qwen2Config(**sizes),
        "gemma": transformers.GemmaConfig(**sizes | {"tie_word_embeddings": True}),
        "mixtral": transformers.MixtralConfig(**sizes, num_local_experts=4),
    }
    eyes = {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 14,
        "num_hidden_layers": 1, "image_size": 28,
    }  # fmt: skip
    more = {"query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True}
    configs["gemma3"] = transformers.Gemma3Config(
        text_config=sizes | more, vision_config=eyes, tie_word_embeddings=True
    )
    configs["mistral3"] = transformers.Mistral3Config(
        text_config=sizes | {"model_type": "mistral"},
        vision_config=eyes | {"model_type": "pixtral", "head_dim": 8},
        tie_word_embeddings=False,
    )
    linear = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_hidden_layers": 4, "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    }  # fmt: skip
    configs["qwen3_5"] = transformers.Qwen3_5TextConfig(**sizes | linear)
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = auto_of(config).from_config(config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                is_norm = "norm" in key
                shift = 1.0 if is_norm and not name.startswith("gemma") else 0.0
                value.copy_(torch.randn_like(value) * (0.1 if is_norm else 0.15) + shift)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        arguments = [folders[name], "--outtype", "f32", "--outfile", root / f"{name}.gguf"]
        if name == "qwen3_5":
            write_byte_pairs(text, count, folders[name])
            run("-c", AS_QWEN, llama_cpp / "convert_hf_to_gguf.py", *arguments, "--no-mtp")
        else:
            (folders[name] / "tokenizer.model").write_bytes(tokenizer)
            run(llama_cpp / "convert_hf_to_gguf.py", *arguments)
    return folders


# its converter reads no other kind of tokenizer, and those alone that it knows
AS_QWEN = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "qwen2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_byte_pairs(text: Path, count: int, folder: Path) -> None:
    """A tokenizer of `count` byte pairs."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=count, show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    fast.save_pretrained(folder)


def check(
    root: Path, llama_cpp: Path, case: str, base: Path, settings: dict[str, Any], is_plain: bool
) -> None:
    """One adapter: in torch, by adapterkit, by llama.cpp's converter."""
    folder, model = root / f"adapter-{case}", root / f"{base.name}.gguf"
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    peft = get_peft_model(load(base), lora)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter).bfloat16() / 10)
    peft.save_pretrained(folder, save_embedding_layers=False)
    plain, expected = log_probabilities(load(base)), log_probabilities(peft)
    ours = root / f"{case}-ours.gguf"
    adapterkit.convert(folder, to="gguf", base=base, out=ours)
    actual = in_llama_cpp(model, ours)
    without = in_llama_cpp(model)
    # Gemma's activation comes from a table of float16 there
    limit = max(TOLERANCE, 4 * difference(without, plain))
    apart = difference(actual - without, expected - plain)
    line = f"{case:10} change {difference(expected, plain):.2f}, beside torch {apart:.1e}"
    line += f" (the base alone {difference(without, plain):.1e})"
    assert apart < limit < difference(expected, plain) / 100, line
    if is_plain:
        theirs = root / f"{case}-theirs.gguf"
        script = llama_cpp / "convert_lora_to_gguf.py"
        run(script, "--base", base, "--outfile", theirs, folder)
        apart = difference(actual, in_llama_cpp(model, theirs))
        line += f", beside llama.cpp's converter {apart:.1e}"
        assert apart == 0, line
    print(line)


def check_tied(root: Path, base: Path) -> None:
    """Factors of tied embeddings are refused: llama.cpp aborts with them."""
    folder = root / "adapter-tied"
    lora = LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(load(base), lora).save_pretrained(folder, save_embedding_layers=False)
    try:
        adapterkit.convert(folder, to="gguf", base=base, out=root / "tied.gguf")
    except Refused as error:
        print(f"tied       refused: {error.problem}")
        return
    raise AssertionError("factors of tied embeddings were written")


def auto_of(config: Any) -> Any:
    is_multimodal = hasattr(config, "vision_config")
    return (
        transformers.AutoModelForImageTextToText
        if is_multimodal
        else (transformers.AutoModelForCausalLM)
    )


def load(base: Path) -> Any:
    auto = auto_of(transformers.AutoConfig.from_pretrained(base))
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def log_probabilities(model: Any) -> Tensor:  # (vocabulary,) float64
    """Of the token after the prompt."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), -1)


def in_llama_cpp(model: Path, adapter: Path | None = None) -> Tensor:  # (vocabulary,) float64
    """The same in llama.cpp, in a process of its own: it ends the process on errors."""
    arguments = [str(model), *([str(adapter)] if adapter is not None else [])]
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, json.dumps(PROMPT), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    line = next((one for one in done.stdout.splitlines() if one.startswith("{")), None)
    assert line is not None, f"status {done.returncode}: {done.stderr[-2000:]}"
    pairs = sorted((int(token), value) for token, value in json.loads(line).items())
    return torch.tensor([value for _, value in pairs], dtype=torch.float64)


LLAMA_CPP = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[2]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
parameters.cpuparams.n_threads, parameters.n_gpu_layers, parameters.verbosity = 1, 0, -1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
flash = xllamacpp.llama_flash_attn_type
parameters.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
if len(sys.argv) > 3:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = sys.argv[3], 1.0
    parameters.lora_adapters = [adapter]
answer = xllamacpp.Server(parameters).handle_completions({
    "prompt": json.loads(sys.argv[1]), "n_predict": 1, "n_probs": 100000, "temperature": 0.0,
    "logit_bias": [[290, 1000]],  # draws a printable token; what is told are the model's own
})
answer = answer if isinstance(answer, dict) else json.loads(answer)
tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps({token["id"]: token["logprob"] for token in tokens}))
"""


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def run(*arguments: Any) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
