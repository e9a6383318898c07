"""Planning at real size: the headers of the largest open checkpoints, their data left out, and
merges over stacks of experts.

    python examples/benchmarks/plan.py                            all plans and merges, two tables
    python examples/benchmarks/plan.py --only DeepSeek            cases whose name holds one of
                                                                  these, comma-separated
    python examples/benchmarks/plan.py --experts 8,32,128 --size 0.3
    python examples/benchmarks/plan.py --json plan.json

Each base has the published names, shapes, dtypes and number of files; the files are holes, so five
checkpoints of 3 TB take some MB on disk. Where a published file begins is not copied: tensors lie
in the model's order, in files of one size. Each plan is a process of its own; first it plans a
two-layer model of the same kind, so that imports (torch, transformers, the model's code) are paid,
then `CPU s` (user + system) and `wall s` are measured for the real one. `peak MB` is the whole
process, imports included. `requests` is what planning would ask a remote folder for: ranges of its
files. Merges are over random values, through `target_parameters`, by the size of all experts,
whatever their number.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import common

Tensors = Iterator[tuple[str, str, tuple[int, ...]]]  # key, dtype, shape
BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
BLOCK = 128  # of fp8
RANK = 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LINEAR = common.TARGETS
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

PLAN = """
import gc, json, re, sys, time
from pathlib import Path
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.planning.merge.job import Options
from adapterkit.planning.merge.plan import plan_merge

class Remote:
    "A folder whose ranges are counted, as one that is not here."
    def __init__(self, path):
        self.folder, self.requests = LocalFolder(path), 0
        self.name, self.label = self.folder.name, self.folder.label
        self.origin, self.hashes = self.folder.origin, self.folder.hashes
    def files(self): return self.folder.files()
    def path(self, name): return self.folder.path(name)
    def prefetch(self, names): pass
    def read(self, name, start, stop):
        self.requests += 1
        return self.folder.read(name, start, stop)

gc.set_threshold(100_000, 50, 50)  # as the command does; half as much again with Python's own
small, small_adapter, base, adapter, remote = sys.argv[1:]
plan_merge(LocalFolder(small), [(LocalFolder(small_adapter), 1.0)], Options())
folder = Remote(base) if remote == "1" else LocalFolder(base)
wall, cpu = time.perf_counter(), time.process_time()
plan = plan_merge(folder, [(LocalFolder(adapter), 1.0)], Options())
totals = plan.totals()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
requests = getattr(folder, "requests", None)
times = {"cpu": cpu, "wall": wall, "peak": peak}
print(json.dumps({**times, "requests": requests, "totals": totals}))
"""

MERGE = """
import json, sys, time, torch
from adapterkit import merge
base, adapter, out, workers = sys.argv[1:]
merge(base, [adapter], out=out, dry_run=True)
wall, cpu = time.perf_counter(), time.process_time()
receipt = merge(base, [adapter], out=out)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"cpu": cpu, "wall": wall, "totals": receipt.data["totals"]}))
"""


# --- the five shapes ------------------------------------------------------------------------------


def llama(layers: int = 126, hidden: int = 16384, inner: int = 53248) -> tuple[dict, Tensors]:
    config = common.config_for(2) | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}

    def tensors() -> Tensors:
        for key, shape in common.model_shapes(config):
            yield key, "BF16", shape

    return config, tensors()


def deepseek(
    layers: int = 61,
    experts: int = 256,
    dense: int = 3,
    heads: int = 128,
    vocab: int = 129280,
    predicts: int = 1,
) -> tuple[dict, Tensors]:
    """DeepSeek-V3: latent attention, experts one by one, fp8 with a scale for each block of
    128 x 128; `predicts` MTP layers."""
    hidden, inner, wide, q_rank, kv_rank, nope, rope = 7168, 2048, 18432, 1536, 512, 128, 64
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": predicts,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }

    def linear(name: str, out: int, width: int) -> Tensors:
        yield f"{name}.weight", "F8_E4M3", (out, width)
        yield f"{name}.weight_scale_inv", "F32", (math.ceil(out / BLOCK), math.ceil(width / BLOCK))

    def mlp(name: str, width: int) -> Tensors:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    def layer(n: int) -> Tensors:
        at = f"model.layers.{n}"
        yield from linear(f"{at}.self_attn.q_a_proj", q_rank, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (q_rank,)
        yield from linear(f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        yield from linear(f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (kv_rank,)
        yield from linear(f"{at}.self_attn.kv_b_proj", heads * (nope + 128), kv_rank)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * 128)
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        if n < dense:
            yield from mlp(f"{at}.mlp", wide)
            return
        yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from mlp(f"{at}.mlp.shared_experts", inner)
        for expert in range(experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", inner)

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            yield from layer(n)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)
        for n in range(layers, layers + predicts):
            at = f"model.layers.{n}"
            yield f"{at}.embed_tokens.weight", "BF16", (vocab, hidden)
            yield f"{at}.enorm.weight", "BF16", (hidden,)
            yield f"{at}.hnorm.weight", "BF16", (hidden,)
            yield f"{at}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield from layer(n)
            yield f"{at}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{at}.shared_head.head.weight", "BF16", (vocab, hidden)

    return config, tensors()


def kimi(layers: int = 61, experts: int = 384) -> tuple[dict, Tensors]:
    return deepseek(layers, experts, dense=1, heads=64, vocab=163840, predicts=0)


def qwen(
    layers: int = 94,
    experts: int = 128,
    hidden: int = 4096,
    inner: int = 1536,
    heads: int = 64,
    vocab: int = 151936,
) -> tuple[dict, Tensors]:
    """Qwen3-MoE, experts one by one."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            at = f"model.layers.{n}"
            yield f"{at}.self_attn.q_proj.weight", "BF16", (heads * 128, hidden)
            yield f"{at}.self_attn.k_proj.weight", "BF16", (512, hidden)
            yield f"{at}.self_attn.v_proj.weight", "BF16", (512, hidden)
            yield f"{at}.self_attn.o_proj.weight", "BF16", (hidden, heads * 128)
            yield f"{at}.self_attn.q_norm.weight", "BF16", (128,)
            yield f"{at}.self_attn.k_norm.weight", "BF16", (128,)
            yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
            for expert in range(experts):
                yield f"{at}.mlp.experts.{expert}.gate_proj.weight", "BF16", (inner, hidden)
                yield f"{at}.mlp.experts.{expert}.up_proj.weight", "BF16", (inner, hidden)
                yield f"{at}.mlp.experts.{expert}.down_proj.weight", "BF16", (hidden, inner)
            yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)

    return config, tensors()


def gpt_oss(layers: int = 36, experts: int = 128) -> tuple[dict, Tensors]:
    """gpt-oss: stacks of experts in mxfp4."""
    hidden, vocab = 2880, 201088
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": vocab,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            at = f"model.layers.{n}"
            for name, out, width in (
                ("q", 4096, hidden),
                ("k", 512, hidden),
                ("v", 512, hidden),
                ("o", hidden, 4096),
            ):
                yield f"{at}.self_attn.{name}_proj.weight", "BF16", (out, width)
                yield f"{at}.self_attn.{name}_proj.bias", "BF16", (out,)
            yield f"{at}.self_attn.sinks", "BF16", (64,)
            yield f"{at}.mlp.router.weight", "BF16", (experts, hidden)
            yield f"{at}.mlp.router.bias", "BF16", (experts,)
            for name, out in (("gate_up", 2 * hidden), ("down", hidden)):
                yield f"{at}.mlp.experts.{name}_proj_blocks", "U8", (experts, out, hidden // 32, 16)
                yield f"{at}.mlp.experts.{name}_proj_scales", "U8", (experts, out, hidden // 32)
                yield f"{at}.mlp.experts.{name}_proj_bias", "BF16", (experts, out)
            yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)

    return config, tensors()


@dataclass(frozen=True)
class Base:
    name: str
    shape: type | object  # called with layers= and perhaps experts=
    shards: int
    modules: tuple[str, ...]  # that the adapter has
    experts: bool  # and an adapter on the experts beside
    small: dict  # sizes of the model that pays the imports


BASES = (
    Base("Llama-3.1-405B", llama, 191, LINEAR, False, {"layers": 2}),
    Base("Qwen3-235B-A22B", qwen, 118, ATTENTION, True, {"layers": 2, "experts": 8}),
    Base("gpt-oss-120b", gpt_oss, 15, ATTENTION, True, {"layers": 2, "experts": 8}),
    Base("DeepSeek-V3", deepseek, 163, LATENT, True, {"layers": 2, "experts": 16, "dense": 1}),
    Base("Kimi-K2-like", kimi, 61, LATENT, False, {"layers": 2, "experts": 16}),
)


# --- files with holes -----------------------------------------------------------------------------


def write_sparse(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """A safetensors file whose data is a hole, read as zeros; its data's bytes."""
    table: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, dtype, shape in tensors:
        stop = at + BYTES[dtype] * math.prod(shape)
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


def make_base(folder: Path, config: dict, tensors: Tensors, shards: int) -> Path:
    if folder.exists():
        return folder
    part = common.fresh(folder.with_name(folder.name + ".part"))
    entries = list(tensors)
    total = sum(BYTES[dtype] * math.prod(shape) for _, dtype, shape in entries)
    groups: list[list] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used >= total * len(groups) / shards:
            groups.append([])
        groups[-1].append(entry)
        used += BYTES[entry[1]] * math.prod(entry[2])
    weight_map = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_sparse(part / name, group)
        weight_map |= {key: name for key, _, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (part / "config.json").write_text(json.dumps(config, indent=2))
    return part.rename(folder)


def make_adapter(
    folder: Path, config: dict, tensors: Tensors, modules: tuple[str, ...], experts: bool
) -> Path:
    """A LoRA of rank 16 in float32 as PEFT writes it: holes for factors."""
    if folder.exists():
        return folder
    part = common.fresh(folder.with_name(folder.name + ".part"))
    layers = config["num_hidden_layers"]
    factors: list[tuple[str, str, tuple[int, ...]]] = []

    def lora(module: str, out: int, width: int, count: int = 1) -> None:
        factors.append((f"base_model.model.{module}.lora_A.weight", "F32", (count * RANK, width)))
        factors.append((f"base_model.model.{module}.lora_B.weight", "F32", (out, count * RANK)))

    stacks = set()
    for key, _, shape in tensors:
        module = key.removesuffix(".weight")
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else layers
        if (
            layer < layers
            and module.rpartition(".")[2] in modules
            and ".experts." not in key
            and key.endswith(".weight")
        ):
            lora(module, shape[0], shape[1])
        if layer < layers and ".mlp.experts." in key:
            stacks.add(layer)
    count = next(
        (
            config[name]
            for name in ("n_routed_experts", "num_experts", "num_local_experts")
            if name in config
        ),
        0,
    )
    hidden, inner = (
        config["hidden_size"],
        config.get("moe_intermediate_size", config["intermediate_size"]),
    )
    for layer in sorted(stacks) if experts else ():
        at = f"model.layers.{layer}.mlp.experts"
        lora(f"{at}.base_layer", 2 * inner, hidden, count)  # gate_up_proj, the inner wrapper
        lora(at, hidden, inner, count)
    write_sparse(part / "adapter_model.safetensors", factors)
    chosen = {
        "target_modules": list(modules),
        "target_parameters": list(STACKS) if experts else None,
    }
    (part / "adapter_config.json").write_text(
        json.dumps({**common.PEFT_CONFIG, "r": RANK, "lora_alpha": 2 * RANK, **chosen}, indent=2)
    )
    return part.rename(folder)


# --- plans ----------------------------------------------------------------------------------------


def child(code: str, *argv: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True
    )
    if done.returncode:
        raise common.ProcessFailed(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def plans(args: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for base in BASES:
        for experts in (False, True)[: 1 + base.experts]:
            name = base.name + (
                ", attention and experts"
                if experts
                else ", all linear"
                if base.modules == LINEAR
                else ", attention"
            )
            if args.only and not any(word in name for word in args.only.split(",")):
                continue
            folders = []
            for word, sizes, shards in (("small", base.small, 1), ("base", {}, base.shards)):
                config, tensors = base.shape(**sizes)
                folders.append(
                    make_base(args.work / f"{base.name}-{word}", config, tensors, shards)
                )
                config, tensors = base.shape(**sizes)
                adapter = (
                    args.work / f"{base.name}-{word}-adapter-{'experts' if experts else 'modules'}"
                )
                folders.append(make_adapter(adapter, config, tensors, base.modules, experts))
            runs = [child(PLAN, *folders, 0) for _ in range(args.repeat)]
            far = child(PLAN, *folders, 1)
            index = json.loads((folders[2] / "model.safetensors.index.json").read_text())
            results[name] = {
                "bytes": index["metadata"]["total_size"],
                "tensors": len(index["weight_map"]),
                "cpu_seconds": [round(run["cpu"], 3) for run in runs],
                "wall_seconds": [round(run["wall"], 3) for run in runs],
                "peak_bytes": [run["peak"] for run in runs],
                "requests": far["requests"],
                "totals": runs[0]["totals"],
            }
            print(f"{name:45} {results[name]['cpu_seconds']} CPU s", file=sys.stderr)
    return results


def plan_table(results: dict[str, dict]) -> None:
    heads = (
        "tensors",
        "CPU s",
        "wall s",
        "peak MB",
        "requests",
        "changed",
        "read GB",
        "written GB",
    )
    print("\n" + "plan".ljust(45), *(head.rjust(10) for head in heads))
    for name, one in results.items():
        totals = one["totals"]
        cells = [
            one["tensors"],
            f"{median(one['cpu_seconds']):.1f}",
            f"{median(one['wall_seconds']):.1f}",
        ]
        cells += [
            f"{median(one['peak_bytes']) / 1e6:.0f}",
            one["requests"],
            totals["tensors_changed"],
        ]
        cells += [f"{totals[key] / common.GB:.1f}" for key in ("bytes_read", "bytes_written")]
        print(name.ljust(45), *(str(cell).rjust(10) for cell in cells))


# --- merges over experts --------------------------------------------------------------------------


def fill(folder: Path) -> None:
    """Small random values in place of the holes of a checkpoint or an adapter."""
    import torch

    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = 8 + int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length - 8))
            generator = torch.Generator().manual_seed(0)
            for entry in (entry for key, entry in table.items() if key != "__metadata__"):
                dtype = torch.bfloat16 if entry["dtype"] == "BF16" else torch.float32
                values = (
                    torch.randn(math.prod(entry["shape"]), generator=generator) * common.STD
                ).to(dtype)
                file.seek(length + entry["data_offsets"][0])
                file.write(values.view(torch.uint8).numpy().data)


def merges(args: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for count in map(int, args.experts.split(",") if args.experts else ()):
        layers, hidden = 4, 1024
        inner = max(8, round(args.size * common.GB / (layers * 6 * hidden * count)))
        sizes = {
            "layers": layers,
            "experts": count,
            "hidden": hidden,
            "inner": inner,
            "heads": 8,
            "vocab": 1000,
        }
        name = f"experts-{count}-{args.size:g}GB"
        folders = [args.work / f"{name}-base", args.work / f"{name}-adapter"]
        if not all(folder.exists() for folder in folders):
            make_base(folders[0], *qwen(**sizes), 2)
            make_adapter(folders[1], *qwen(**sizes), (), True)
            for folder in folders:
                fill(folder)
        runs = []
        for _ in range(args.repeat):
            common.fresh(args.work / "run")
            common.warm(*folders)
            runs.append(child(MERGE, *folders, args.work / "run" / "out", 0))
        results[str(count)] = {
            "bytes": common.folder_bytes(folders[0]),
            "cpu_seconds": [round(run["cpu"], 3) for run in runs],
            "wall_seconds": [round(run["wall"], 3) for run in runs],
            "bytes_read": runs[0]["totals"]["bytes_read"],
        }
        print(
            f"merge over {count} experts {results[str(count)]['cpu_seconds']} CPU s",
            file=sys.stderr,
        )
    return results


def merge_table(results: dict[str, dict]) -> None:
    print(
        "\n" + "merge through target_parameters".ljust(45),
        *(head.rjust(10) for head in ("GB", "CPU s", "wall s", "read GB")),
    )
    for count, one in results.items():
        cells = [f"{one['bytes'] / common.GB:.2f}", f"{median(one['cpu_seconds']):.1f}"]
        cells += [f"{median(one['wall_seconds']):.1f}", f"{one['bytes_read'] / common.GB:.2f}"]
        print(f"{count} experts".ljust(45), *(cell.rjust(10) for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="plans whose names hold one of these words, comma-separated")
    parser.add_argument(
        "--experts",
        default="8,32,128",
        help="numbers of experts to merge over, comma-separated; '' for none",
    )
    parser.add_argument(
        "--size", type=float, default=0.3, help="GB of the experts merged over (0.3)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="rounds (1)")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-benchmark"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = common.alone(args.work)
    report = common.environment("adapterkit", "torch", "transformers") | {
        "repeat": args.repeat,
        "size": args.size,
    }
    report |= {"plans": plans(args), "merges": merges(args)}
    lock.close()
    plan_table(report["plans"])
    merge_table(report["merges"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
