"""Shared code of the benchmarks: a checkpoint and an adapter of a chosen size, a timed process, the
metrics of the machine.

The checkpoint is a Llama of TinyLlama's widths (hidden 2048, intermediate 5632, vocabulary 32000)
with as many layers as the size needs. It is generated one shard at a time and kept, so that a
second run starts at once.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_EVERY = 0.02  # seconds between two looks at a process's memory
STD = 0.02  # of the weights
RELATIVE_DELTA = 0.01  # Frobenius norm of the delta over that of the weight
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GB = 1_000_000_000

# What PEFT 0.21.2 writes for a plain LoRA; `make_adapter` sets the first line's values.
PEFT_CONFIG = json.loads("""{
    "r": 0, "lora_alpha": 0, "target_modules": [],
    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
    "auto_mapping": null, "base_model_name_or_path": null, "bias": "none", "corda_config": null,
    "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
    "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
    "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
    "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null,
    "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "rank_pattern": {}, "revision": null, "target_parameters": null,
    "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
    "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null
}""")


# --- a checkpoint and an adapter ------------------------------------------------------------------


def config_for(size: float) -> dict:
    """A Llama config whose bf16 weights take about `size` GB (below 0.5 GB the vocabulary shrinks,
    below 0.1 all)."""
    hidden, intermediate, heads = (2048, 5632, 16) if size >= 0.1 else (256, 704, 2)
    # no layer's width: a merge would look for ties
    vocab = 32000 if size >= 0.5 else 4000 if size >= 0.1 else 1000
    layer = (
        2 * hidden * hidden + 2 * hidden * hidden * 4 // 16 + 3 * hidden * intermediate + 2 * hidden
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 128,
        "num_hidden_layers": max(1, round((size * GB / 2 - 2 * vocab * hidden) / layer)),
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def layer_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """Module inside a layer -> (out, in)."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def model_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, shape) of every tensor, in the model's order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for n in range(config["num_hidden_layers"]):
        for module, shape in layer_shapes(config).items():
            yield f"model.layers.{n}.{module}.weight", shape
        yield f"model.layers.{n}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{n}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def make_base(folder: Path, size: float, shard: float) -> Path:
    """Write the checkpoint into `folder` unless it is there already; at most one shard is in
    memory."""
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        return folder
    config, shards, used = config_for(size), [[]], 0
    for key, shape in model_shapes(config):
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and used + nbytes > shard * GB:
            shards, used = [*shards, []], 0
        shards[-1].append((key, shape))
        used += nbytes

    generator, weight_map, parameters = torch.Generator().manual_seed(0), {}, 0
    part = fresh(folder.with_name(folder.name + ".part"))
    for i, entries in enumerate(shards, 1):
        name = (
            f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        tensors = {}
        for key, shape in entries:
            weight = (
                torch.randn(shape, generator=generator) * STD
                if len(shape) == 2
                else torch.ones(shape)
            )
            tensors[key] = weight.bfloat16()
            weight_map[key] = name
            parameters += weight.numel()
        save_file(tensors, part / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": parameters, "total_size": 2 * parameters},
            "weight_map": weight_map,
        }
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (part / "config.json").write_text(json.dumps(config, indent=2))
    return part.rename(folder)


def make_adapter(
    folder: Path, config: dict, dtype: str, rank: int = 16, alpha: int = 32, seed: int = 1
) -> Path:
    """Write an all-linear LoRA adapter in PEFT's layout, its deltas RELATIVE_DELTA of the
    weights."""
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        return folder
    # ||b@a|| = sqrt(rank * out * in) * std^2
    std = (RELATIVE_DELTA * STD / (alpha / rank * rank**0.5)) ** 0.5
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for n in range(config["num_hidden_layers"]):
        for module, (out_features, in_features) in layer_shapes(config).items():
            for factor, shape in (
                ("lora_A", (rank, in_features)),
                ("lora_B", (out_features, rank)),
            ):
                values = torch.randn(shape, generator=generator) * std
                key = f"base_model.model.model.layers.{n}.{module}.{factor}.weight"
                tensors[key] = values.to(getattr(torch, dtype))
    adapter_config = {
        **PEFT_CONFIG,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(TARGETS),
    }
    part = fresh(folder.with_name(folder.name + ".part"))
    save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
    (part / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2, sort_keys=True))
    return part.rename(folder)


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parser_of(
    script: str | None,  # its docstring
    repeat: int = 3,
    work: str = "adapterkit-benchmark",
) -> argparse.ArgumentParser:
    """The options of every benchmark: --repeat, --work and --json."""
    parser = argparse.ArgumentParser(
        description=script, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=repeat, help=f"rounds ({repeat})")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / work)
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser


def alone(work: Path) -> IO[bytes]:
    """Hold `work` until the file is closed; wait while another benchmark has it, whose timings
    would be spoiled too."""
    file = (work / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another benchmark in {work}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def warm(*folders: Path) -> None:
    """Read every file, so that each competitor finds its input in the page cache."""
    buffer = bytearray(8 << 20)
    for folder in folders:
        for path in filter(Path.is_file, folder.rglob("*")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# --- a process, timed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One process: wall time with its start, what it says of itself (`seconds=` on its last line,
    `processor=` before that), peak memory."""

    wall: float  # seconds
    reported: float | None  # seconds
    peak: int  # bytes of anonymous memory, its children's included
    processor: float | None = None  # seconds of all its threads
    out: str = ""  # all that it printed


class ProcessFailed(RuntimeError):
    """A competitor ended with an error; the message is the end of what it wrote."""


def time_process(argv: list[str], env: dict[str, str] | None = None) -> Timing:
    start = time.perf_counter()
    process = subprocess.Popen(
        argv,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_EVERY):
            peak[0] = max(peak[0], anonymous_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out, err = process.communicate()
        wall = time.perf_counter() - start
    finally:
        ended.set()
        watcher.join()
    if process.returncode != 0:
        raise ProcessFailed(
            f"exit status {process.returncode}\n" + "\n".join((out + err).splitlines()[-12:])
        )
    reported = re.search(r"^seconds=([\d.]+)\s*\Z", out, re.MULTILINE)
    processor = re.search(r"^processor=([\d.]+)$", out, re.MULTILINE)
    said = (float(found[1]) if found else None for found in (reported, processor))
    return Timing(wall, next(said), peak[0], next(said), out)


def anonymous_memory(pid: int) -> int:
    """Resident anonymous bytes (no file mappings) of a process and its descendants; 0 once it is
    gone.

    RssAnon rather than smaps_rollup: the same number, without walking page tables under the
    process's memory lock.
    """
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        if found := re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE):
            total = int(found[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(anonymous_memory, map(int, (task / "children").read_text().split())))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


# --- metrics for the report -----------------------------------------------------------------------


def print_rows(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Print the times of merges of one model, with those of cp."""
    print(name)
    for competitor, row in rows.items():
        ratio = row["in_process"] / rows["cp"]["in_process"]
        print(
            f"  {competitor:20} {row['seconds']:7.2f} s, in process {row['in_process']:7.2f} s = "
            f"{ratio:5.2f} of cp, processor {row['processor']:6.2f} s, {row['memory_mb']:6.0f} MB"
        )


def environment(*packages: str) -> dict:
    """Date, command, machine and versions, without a path or a user's name."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    arguments = [re.sub(r"(^|=)/\S*/", r"\1", argument) for argument in sys.argv[1:]]
    return {
        "command": " ".join(
            ["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *arguments]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[1] if cpu else platform.machine(),
        "memory_gib": round(memory / 2**30, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in packages},
        },
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
