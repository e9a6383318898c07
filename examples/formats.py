"""Convert one trained adapter of a real small model, and load it in other programs.

    python examples/formats.py [FOLDER] [--steps N] [--prompts N]

PEFT trains SmolLM2-135M on this Python's manual (rank 8, all linear layers). `convert` writes the
adapter for mlx-lm, for llama.cpp (GGUF), for vLLM, and back to PEFT. Each program then predicts the
token after the same held-out prompts, with and without the adapter. The table shows how far its
predictions are from PEFT's (Kullback-Leibler divergence in nats), and how much the adapter changed
them. llama.cpp runs the 4-bit file in which SmolLM2 was published; the other programs use its
decoded weights.

Programs that are not installed are left out: `pip install mlx mlx-cpu mlx-lm xllamacpp`. Takes
three minutes of processor time, 2 GB of memory, and nothing from the Hub. Exit status 1 if a
program's predictions are not PEFT's.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads that wait sleep: on a busy machine spinning costs five times the work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
import realmodel
import training
from languages import quieten, say

RANK, ALPHA, RATE = 8, 16, 1e-3
LENGTH = 96  # tokens of a prompt
SAME = 1e-4  # nats, of a program that computes in float32 with the same weights
NEAR = 0.05  # nats, of one that rounds what layers see to 8 bits
EXACT = ("PEFT", "mlx-lm")
Predict = Callable[[Path | None, list[list[int]]], Tensor]  # -> log-probabilities (prompts, vocab)

LLAMA_CPP = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
parameters.cpuparams.n_threads, parameters.n_gpu_layers, parameters.verbosity = 2, 0, -1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if len(sys.argv) > 2:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = sys.argv[2], 1.0
    parameters.lora_adapters = [adapter]
server = xllamacpp.Server(parameters)
for prompt in json.load(sys.stdin):
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": 1, "n_probs": 1 << 20, "temperature": 0.0,
        "cache_prompt": False,
        "logit_bias": [[1000, 1000]],  # draws a printable token; what is told are the model's own
    })
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print("\\n" + json.dumps({token["id"]: token["logprob"] for token in tokens}), flush=True)
"""


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("folder", nargs="?", type=Path, default=Path("formats-output"))
    words.add_argument("--steps", type=int, default=40)
    words.add_argument("--prompts", type=int, default=12)
    chosen = words.parse_args()
    quieten()
    base = realmodel.smollm2()
    held_out, learnt = training.passages(AutoTokenizer.from_pretrained(base))
    prompts = [passage[:LENGTH].tolist() for passage in held_out[: chosen.prompts]]
    source = chosen.folder / "peft"
    train(base, learnt, chosen.steps, source)
    written = convert(source, base, chosen.folder)
    return compare(programs(base, written), source, prompts)


def train(base: Path, passages: Tensor, steps: int, out: Path) -> None:
    """Write an adapter after a few steps with PEFT."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = base.name  # goes into the adapter's config
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    batches = [passages[step * len(passages) // steps][None] for step in range(steps)]
    training.descend(model, batches, RATE)
    model.save_pretrained(out)


def convert(source: Path, base: Path, folder: Path) -> dict[str, Path]:
    """The adapter in each format, by the format's name; and from GGUF back to PEFT."""
    written = {"mlx": folder / "mlx", "gguf": folder / "adapter.gguf", "vllm": folder / "vllm"}
    for name, out in written.items():
        adapterkit.convert(source, to=name, base=base, out=out, overwrite=True)
        say(f"adapterkit convert {source} --to {name} --base {base.name} --out {out}")
    back = folder / "back"
    adapterkit.convert(written["gguf"], to="peft", base=base, out=back, overwrite=True)
    return written | {"back": back}


def programs(base: Path, written: dict[str, Path]) -> dict[str, tuple[Path, Predict]]:
    """A program that reads an adapter: its name, its adapter, and its predictions."""
    by_name: dict[str, tuple[Path, Predict]] = {
        "PEFT, vLLM's layout": (written["vllm"], lambda *job: by_peft(base, *job)),
        "PEFT, through GGUF": (written["back"], lambda *job: by_peft(base, *job)),
    }
    if importlib.util.find_spec("mlx_lm"):
        by_name["mlx-lm"] = (written["mlx"], lambda *job: by_mlx(base, *job))
    if has_llama_cpp():
        model = realmodel.smollm2_gguf()
        files = lambda adapter: [model, *([adapter] if adapter else [])]
        by_name["llama.cpp"] = (
            written["gguf"],
            lambda adapter, prompts: by_llama_cpp(files(adapter), prompts),
        )
    return by_name


@torch.no_grad()
def by_peft(base: Path, adapter: Path | None, prompts: list[list[int]]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    logits = [model(torch.tensor([prompt])).logits[0, -1].double() for prompt in prompts]
    return torch.stack(logits).log_softmax(-1)


def by_mlx(base: Path, adapter: Path | None, prompts: list[list[int]]) -> Tensor:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    model.set_dtype(mx.float32)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    logits = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in prompts]
    return torch.stack([torch.tensor(row.tolist()).double() for row in logits]).log_softmax(-1)


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def by_llama_cpp(files: list[Path], prompts: list[list[int]]) -> Tensor:
    """The logits from a model's file and, after it, an adapter's. In a process of its own, because
    llama.cpp ends the process on errors."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, *map(str, files)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(lines) == len(prompts), f"status {done.returncode}: {done.stderr[-2000:]}"
    rows = [sorted((int(token), p) for token, p in json.loads(line).items()) for line in lines]
    return torch.tensor([[p for _, p in row] for row in rows], dtype=torch.float64)


def compare(
    programs: dict[str, tuple[Path, Predict]], source: Path, prompts: list[list[int]]
) -> int:
    """Print the table; 1 if a program predicts otherwise than PEFT."""
    base = realmodel.smollm2()
    before, after = by_peft(base, None, prompts), by_peft(base, source, prompts)
    say("\n| read by | without the adapter | with it | what it changed |")
    say("|---|---|---|---|")
    say(f"| PEFT | 0 | 0 | {divergence(after, before):.4f} |")
    failures = 0
    for name, (adapter, predict) in programs.items():
        plain, adapted = predict(None, prompts), predict(adapter, prompts)
        near, same = divergence(before, plain), divergence(after, adapted)
        say(f"| {name} | {near:.2g} | {same:.2g} | {divergence(adapted, plain):.4f} |")
        failures += same > (SAME if name.startswith(EXACT) else NEAR)
    return int(failures > 0)


def divergence(one: Tensor, other: Tensor) -> float:
    """The mean over prompts of Σ p (log p - log q), in nats."""
    return float((one.exp() * (one - other)).sum(-1).mean())


if __name__ == "__main__":
    sys.exit(main())
