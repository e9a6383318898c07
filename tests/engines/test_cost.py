"""When `--device auto` takes a GPU: jobs of 7B and machines, by what each takes there."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.checkpoint.layout import TensorPlan, laid_out
from adapterkit.core.engine.cost import CONSUMER, H100, PRICES, Machine, Work
from adapterkit.core.engine.placement import least_memory
from adapterkit.core.plan import Effort, Plan

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 4096, 11008, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{i}.{name}": size for i in range(LAYERS) for name, size in LINEAR.items()}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "vocab_size": VOCABULARY, "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "lora_alpha": 16, "target_modules": "all-linear"}
EIGHT = [f"adapter{number}" for number in range(8)]
# bytes a second: a share, one disk, several or the page cache
DISKS = {"share": 0.5e9, "one": 3e9, "fast": 12e9}
MACHINES = {"H100": Machine(16, H100), "4090": Machine(8, CONSUMER), "none": Machine(8)}
DRY = {"out": "out", "dry_run": True}
PLANS: dict[str, Callable[[], Plan]] = {
    "merge": lambda: adapterkit.merge("base", ["adapter0"], **DRY),
    "merge of rank 800": lambda: adapterkit.merge("base", ["wide"], **DRY),
    "extract": lambda: adapterkit.extract("base", "tuned", rank=16, **DRY),
    "pissa": lambda: adapterkit.init("base", method="pissa", rank=16, targets="all-linear", **DRY),
    "loftq": lambda: adapterkit.loftq("base", rank=16, iterations=1, **DRY),
    "nf4": lambda: adapterkit.quantize("base", to="nf4", **DRY),
    "w4a16": lambda: adapterkit.quantize("base", to="w4a16", **DRY),
    "mxfp4": lambda: adapterkit.quantize("base", to="mxfp4", **DRY),
    "compensated": lambda: adapterkit.quantize(
        "base", to="nf4", rounding="compensated", stats="stats.safetensors", **DRY
    ),
    "ties of 8": lambda: adapterkit.combine(EIGHT, method="ties", density=0.2, **DRY),
    "dare of 2": lambda: adapterkit.combine(EIGHT[:2], method="dare_linear", density=0.5, **DRY),
    "linear of 8": lambda: adapterkit.combine(EIGHT, method="linear", **DRY),
    "stats": lambda: adapterkit.stats("base", data="ids.jsonl", **DRY | {"out": "s.safetensors"}),
}


def empty_file(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of holes."""
    layout = laid_out(path.name, [TensorPlan(k, dtype, shape) for k, shape in tensors.items()], {})
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Plan]]:
    """Each job's plan, made of headers."""
    root = tmp_path_factory.mktemp("cost")
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in MODULES.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    weights |= {f"model.layers.{i}.{n}.weight": (HIDDEN,) for i in range(LAYERS) for n in norms}
    weights |= {"model.norm.weight": (HIDDEN,)}
    weights |= dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], (VOCABULARY, HIDDEN))
    for name in ("base", "tuned"):
        empty_file(root / name / "model.safetensors", weights, "BF16")
        (root / name / "config.json").write_text(json.dumps(CONFIG))
    for name, rank in (dict.fromkeys(EIGHT, 16) | {"wide": 800}).items():
        factors: dict[str, tuple[int, ...]] = {}
        for module, (out, width) in MODULES.items():
            key = f"base_model.model.{module}"
            factors |= {f"{key}.lora_A.weight": (rank, width), f"{key}.lora_B.weight": (out, rank)}
        empty_file(root / name / "adapter_model.safetensors", factors, "BF16")
        (root / name / "adapter_config.json").write_text(json.dumps(ADAPTER | {"r": rank}))
    covariances = {f"{name}.covariance": (shape[1],) * 2 for name, shape in MODULES.items()}
    empty_file(root / "stats.safetensors", covariances, "F32")
    rows = [json.dumps({"input_ids": list(range(512))})] * 256
    (root / "ids.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield functools.cache(lambda name: PLANS[name]())


# with which disks each job goes to the GPU of a machine that has one
EXPECTED = {
    "merge": "",  # waits for the disk on both
    "merge of rank 800": "one fast",
    "extract": "one fast",
    "pissa": "fast",
    "loftq": "one fast",
    "nf4": "fast",  # reading decides
    "w4a16": "fast",
    "mxfp4": "fast",
    "compensated": "share one fast",
    "ties of 8": "share one fast",
    "dare of 2": "share one fast",
    "linear of 8": "",  # small factors
    "stats": "share one fast",
}
LAPTOP = 7 << 30  # bytes of a card of 8 GB, beside a desktop


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_given_to_the_expected_gpus(name: str, plans: Callable[[str], Plan]):
    plan = plans(name)
    work = Work.of(plan)
    taken = {
        machine: " ".join(
            disk for disk, rate in DISKS.items() if work.gains(replace(each, disk=rate))
        )
        for machine, each in MACHINES.items()
    }
    assert taken == dict.fromkeys(MACHINES, EXPECTED[name]) | {"none": ""}
    assert (least_memory(plan) < LAPTOP) == (name != "compensated")  # covariances in float64


def test_a_small_job_is_not_worth_starting_a_gpu(plans: Callable[[str], Plan]):
    work, machine = Work.of(plans("nf4")), replace(MACHINES["H100"], disk=DISKS["fast"])
    counts = {name: count / 10 for name, count in work.counts.items()}
    tenth = replace(work, nbytes=work.nbytes / 10, changed=work.changed / 10, counts=counts)
    assert work.gains(machine) and not tenth.gains(machine)


def test_small_weights_are_not_worth_their_launches(plans: Callable[[str], Plan]):
    """As many elements in thirty times as many weights, as experts have."""
    work, machine = Work.of(plans("loftq")), replace(MACHINES["4090"], disk=DISKS["fast"])
    assert work.gains(machine) and not replace(work, launches=30 * work.launches).gains(machine)


def test_every_count_of_an_effort_has_a_price():
    assert PRICES.keys() == vars(Effort()).keys()
