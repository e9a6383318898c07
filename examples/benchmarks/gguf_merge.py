"""Compare merging an adapter into a GGUF file with copying the file: seconds, and whether the
memory stays flat.

    python examples/benchmarks/gguf_merge.py                    1 and 4 GB, Q4_K_M and Q8_0
    python examples/benchmarks/gguf_merge.py --sizes 0.2 --types Q8_0 --repeat 1    a quick look
    python examples/benchmarks/gguf_merge.py --json gguf-merge.json

The model is a Llama of TinyLlama's widths in blocks of llama.cpp's types (in Q4_K_M half of v and
down, and the head, in Q6_K). One adapter is of attention alone, one of all linear layers. `cp` is a
copy and fsync of what it wrote. Both take turns; before each run the output is removed, the disk
synced and the input read once. `seconds` are the wall time of the process; `in process` is the same
without the interpreter's start and the import of torch, and
`processor` the time that its threads ran, whatever else the machine does. Memory is anonymous.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import common
import torch
from safetensors.torch import load_file, save_file

from adapterkit.kernels.quant import ggml

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BITS = {"Q8_0": 8.5, "Q4_K_M": 4.85}
HASHES = ("sha256", "none")
TILE = 64  # rows that are encoded, and repeated

COPY = """
import os, shutil, sys, time
start = time.perf_counter()
shutil.copyfile(sys.argv[1], sys.argv[2])
handle = os.open(sys.argv[2], os.O_RDONLY)
os.fsync(handle)
print(f"processor={time.process_time()}")
print(f"seconds={time.perf_counter() - start}")
"""

MERGE = """
import sys, time, torch
from adapterkit import merge
base, adapter, out, hash = sys.argv[1:]
start, before = time.perf_counter(), time.process_time()
merge(base, [adapter], out=out, hash=hash)
print(f"processor={time.process_time() - before}")
print(f"seconds={time.perf_counter() - start}")
"""


def type_of(mix: str, module: str, layer: int) -> str:
    if mix == "Q4_K_M":
        more = module in ("self_attn.v_proj", "mlp.down_proj") and layer % 2 == 0
        return "Q6_K" if more or module == "head" else "Q4_K"
    return mix


def blocks(kind: str, shape: tuple[int, int], cache: dict) -> "torch.Tensor":
    """Random weights in blocks, some rows repeated."""
    rows, width = shape
    if (kind, width) not in cache:
        generator = torch.Generator().manual_seed(0)
        cache[kind, width] = ggml.encode(
            kind, torch.randn(TILE, width, generator=generator) * common.STD
        )
    tile = cache[kind, width]
    return tile.repeat(-(-rows // TILE), 1)[:rows]


def make_model(path: Path, size: float, mix: str) -> tuple[Path, dict]:
    """The file, unless it is there, and the config that it is made by."""
    import gguf

    config = common.config_for(size * 16 / BITS[mix])
    if path.exists():
        return path, config
    writer, cache = gguf.GGUFWriter(path.with_suffix(".part"), "llama", use_temp_file=False), {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    hidden = config["hidden_size"]
    tensors.append(("token_embd.weight", type_of(mix, "", 1), (config["vocab_size"], hidden)))
    for layer in range(config["num_hidden_layers"]):
        for module, shape in common.layer_shapes(config).items():
            kind = type_of(mix, module, layer)
            tensors.append((f"blk.{layer}.{NAMES[module]}.weight", kind, shape))
        for name in ("attn_norm", "ffn_norm"):
            tensors.append((f"blk.{layer}.{name}.weight", "F32", (hidden,)))
    tensors.append(("output_norm.weight", "F32", (hidden,)))
    tensors.append(("output.weight", type_of(mix, "head", 1), (config["vocab_size"], hidden)))
    for name, kind, shape in tensors:
        number = gguf.GGMLQuantizationType[kind]
        values = torch.ones(shape) if kind == "F32" else blocks(kind, shape, cache)
        writer.add_tensor(name, values.numpy(), raw_dtype=number)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path.with_suffix(".part").rename(path), config


def of_attention(adapter: Path) -> Path:
    """The same adapter without its feed-forward parts."""
    out = adapter.with_name(adapter.name + "-attention")
    if not out.exists():
        part = common.fresh(out.with_name(out.name + ".part"))
        tensors = load_file(adapter / "adapter_model.safetensors")
        kept = {key: value for key, value in tensors.items() if "self_attn" in key}
        save_file(kept, part / "adapter_model.safetensors", metadata={"format": "pt"})
        text = (adapter / "adapter_config.json").read_text()
        for name in ("gate_proj", "up_proj", "down_proj"):
            text = text.replace(f',\n    "{name}"', "")
        (part / "adapter_config.json").write_text(text)
        part.rename(out)
    return out


def measure(
    model: Path,
    adapters: dict[str, Path],
    work: Path,
    repeat: int,
    name: str = "merged.gguf",
    hashes: Sequence[str] = HASHES,
) -> dict:
    """Seconds and memory of each competitor, in turn."""
    out = work / "out" / name
    steps = {"cp": [sys.executable, "-c", COPY, str(model), str(out)]}
    for name, adapter in adapters.items():
        for hash in hashes:
            words = [sys.executable, "-c", MERGE, str(model), str(adapter), str(out), hash]
            steps[f"{name}, {hash}"] = words
    timings: dict[str, list[common.Timing]] = {name: [] for name in steps}
    for _ in range(repeat):
        for step, words in steps.items():
            common.fresh(out.parent)
            common.warm(model.parent, *adapters.values())
            timings[step].append(common.time_process(words))
    return {
        name: {
            "seconds": median(one.wall for one in each),
            "in_process": median(one.reported or one.wall for one in each),
            "processor": median(one.processor or 0.0 for one in each),
            "memory_mb": max(one.peak for one in each) / 1e6,
        }
        for name, each in timings.items()
    }


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--sizes", default="1,4")
    parser.add_argument("--types", default="Q4_K_M,Q8_0")
    parser.add_argument("--hashes", default=",".join(HASHES))
    args = parser.parse_args()
    report = common.environment("adapterkit", "torch", "transformers", "gguf")
    report |= {"repeat": args.repeat, "models": {}}
    args.work.mkdir(parents=True, exist_ok=True)
    with common.alone(args.work):
        for size in map(float, args.sizes.split(",")):
            for mix in args.types.split(","):
                folder = args.work / f"gguf-{size:g}GB-{mix}"
                folder.mkdir(exist_ok=True)
                model, config = make_model(folder / "model.gguf", size, mix)
                layers = config["num_hidden_layers"]
                adapter = common.make_adapter(
                    args.work / f"gguf-adapter-{layers}-{config['hidden_size']}", config, "float32"
                )
                adapters = {"attention": of_attention(adapter), "all layers": adapter}
                rows = measure(
                    model, adapters, args.work, args.repeat, hashes=args.hashes.split(",")
                )
                name = f"{model.stat().st_size / common.GB:.2f} GB {mix}, {layers} layers"
                report["models"][name] = rows
                common.print_rows(name, rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
