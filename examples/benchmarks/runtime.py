"""Compare the runtime with PEFT: training steps, prefill and decoding with one adapter, with mixed
rows and with Arrow; loading many adapters; a large model on the meta device; memory.

    python examples/benchmarks/runtime.py
    python examples/benchmarks/runtime.py --only decode,prefill --repeat 3
    python examples/benchmarks/runtime.py --json runtime.json

A Llama of 4 layers of width 1024 in float32, adapters of rank 16 on all linear layers, in one
process: the sides take turns, run by run. All figures are medians; a ratio is the median of the
ratios of neighboring runs. Memory is the peak of anonymous memory of a process that loads a model
of 1 GB, sampled every 20 ms.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import common
import peft
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adapterkit import LoraConfig
from adapterkit.runtime import Adapters, attach, create_arrow_model, load

RANK, ROWS, TOKENS, STEPS = 16, 8, 128, 16
MANY = 100  # adapters that are loaded
# rows, adapters, tokens a row
SHAPES = (
    (8, 8, 1), (16, 2, 1), (16, 4, 1), (16, 8, 1), (16, 16, 1), (32, 8, 1), (64, 8, 1), (16, 8, 32),
)  # fmt: skip
SIDES = ("adapterkit", "PEFT")
WIDTH = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 4000, "max_position_embeddings": 512,
}  # fmt: skip
SEVEN_BILLION = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "num_hidden_layers": 32,
}  # fmt: skip

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
from adapterkit import LoraConfig
from adapterkit.runtime import attach
if sys.argv[2] == "attach":
    adapters = attach(model, LoraConfig(16, 32, "all-linear", task_type="CAUSAL_LM"))
"""

# the argument's name differs between versions of transformers
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"

Runs = dict[str, Callable[[], float | None]]  # by name; what a run returns are its seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7, help="runs of each side")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help=", ".join(MEASUREMENTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "adapterkit-bench")
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(exist_ok=True)
    report = common.environment("adapterkit", "torch", "peft", "transformers")
    report |= {"threads": arguments.threads, "repeat": arguments.repeat, "rank": RANK}
    with common.alone(arguments.work):
        for name in arguments.only.split(","):
            report[name] = MEASUREMENTS[name](arguments)
            show(name, report[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def show(name: str, figures: dict) -> None:
    print(f"\n{name}")
    for key, value in figures.items():
        print(f"  {key:<44}{value:>12.4g}" if isinstance(value, float) else f"  {key:<44}{value}")
    sys.stdout.flush()


# --- models and adapters --------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **WIDTH)).eval()


def adapter_folders(work: Path, count: int) -> list[Path]:
    """Adapters for that model, no two alike."""
    config = LlamaConfig(num_hidden_layers=4, head_dim=64, **WIDTH).to_dict()
    return [
        common.make_adapter(work / f"runtime-{number}", config, "float32", seed=number + 1)
        for number in range(count)
    ]


def ours(folders: list[Path]) -> Adapters:
    adapters = load(llama(), folders[0], name="0")
    for number, folder in enumerate(folders[1:], 1):
        adapters.load(folder, name=str(number))
    return adapters


def theirs(folders: list[Path]) -> Any:
    model = peft.PeftModel.from_pretrained(llama(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    return model.eval()


# --- measuring ------------------------------------------------------------------------------------


def timed(runs: Runs, repeat: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns; one round before does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            own = run()
            if number:
                seconds[name].append(own or time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]], unit: float = 1.0) -> dict[str, float]:
    return {name: median(values) * unit for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def inference(arguments: argparse.Namespace, call: Callable[..., float | None]) -> dict:
    """Base, one adapter, rows of 8 adapters, and 8 experts of Arrow, on both sides; milliseconds of
    a call."""
    folders = adapter_folders(arguments.work, ROWS)
    ids = torch.randint(0, WIDTH["vocab_size"], (ROWS, TOKENS))
    names = [str(number) for number in range(ROWS)]
    mine, other = ours(folders), theirs(folders)
    routed = create_arrow_model(llama(), folders, top_k=3)
    arrow = peft.create_arrow_model(
        llama(), [str(folder) for folder in folders], peft.ArrowConfig(top_k=3, rng_seed=0)
    ).eval()

    mine.activate("0")
    other.set_adapter("0")

    def base() -> float | None:
        with mine.disabled():
            return call(mine.model, ids)

    def base_of_peft() -> float | None:
        with other.disable_adapter():
            return call(other, ids)

    def rows() -> float | None:
        with mine.rows(names):
            return call(mine.model, ids)

    runs: Runs = {
        "base": base,
        "base in PEFT": base_of_peft,
        "one adapter": lambda: call(mine.model, ids),
        "one adapter in PEFT": lambda: call(other, ids),
        "8 adapters, mixed rows": rows,
        "8 adapters, mixed rows in PEFT": lambda: call(other, ids, adapter_names=names),
        "8 experts, Arrow": lambda: call(routed.model, ids),
        "8 experts, Arrow in PEFT": lambda: call(arrow, ids),
    }
    with torch.inference_mode():
        seconds = timed(runs, arguments.repeat)
    overheads = {
        side: [a - b for a, b in zip(seconds[f"8 experts, Arrow{side}"], seconds[f"base{side}"],
                                     strict=True)]
        for side in ("", " in PEFT")
    }  # fmt: skip
    return medians(seconds, 1e3) | {
        "rows / one adapter": ratio(seconds, "8 adapters, mixed rows", "one adapter"),
        "rows / PEFT's rows": ratio(
            seconds, "8 adapters, mixed rows", "8 adapters, mixed rows in PEFT"
        ),
        "Arrow's overhead / PEFT's": median(overheads[""]) / median(overheads[" in PEFT"]),
    }


def prefill(arguments: argparse.Namespace) -> dict:
    """A batch of 8 x 128 tokens."""

    def call(model: Any, ids: torch.Tensor, **named: Any) -> None:
        model(input_ids=ids, **named)

    return inference(arguments, call)


def decode(arguments: argparse.Namespace) -> dict:
    """16 tokens for each of 8 rows, one at a time, behind a cache of 32."""

    def call(model: Any, ids: torch.Tensor, **named: Any) -> float:
        named[CACHE] = DynamicCache()
        model(input_ids=ids[:, :32], **named)
        start = time.perf_counter()
        for step in range(32, 32 + STEPS):
            model(input_ids=ids[:, step, None], **named)
        return (time.perf_counter() - start) / STEPS

    return inference(arguments, call)


def shapes(arguments: argparse.Namespace) -> dict:
    """Mixed rows over one adapter, by the shape of the batch: processor time of a forward on one
    thread, the adapters in turns among the rows, and in their order."""
    adapters = ours(adapter_folders(arguments.work, max(count for _, count, _ in SHAPES)))
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for rows, count, tokens in SHAPES:
        ids = torch.randint(0, WIDTH["vocab_size"], (rows, tokens))
        turns = [str(row % count) for row in range(rows)]

        def spent(ids: torch.Tensor = ids) -> float:
            start = time.process_time()
            adapters.model(input_ids=ids, use_cache=False)
            return time.process_time() - start

        def mixed(names: list[str]) -> float:
            with adapters.rows(names):
                spent()  # factors are stacked
                return spent()

        runs: Runs = {
            "one": spent,
            "in turns": lambda names=turns, mixed=mixed: mixed(names),
            "in order": lambda names=turns, mixed=mixed: mixed(sorted(names)),
        }
        adapters.activate("0")
        with torch.inference_mode():
            seconds = timed(runs, 3 * arguments.repeat)
        title = f"{rows} rows of {count} adapters, {tokens} tokens"
        figures[f"{title}: one adapter, ms"] = median(seconds["one"]) * 1e3
        for name in ("in turns", "in order"):
            figures[f"{title}: {name}"] = ratio(seconds, name, "one")
    torch.set_num_threads(arguments.threads)
    return figures


def training(arguments: argparse.Namespace) -> dict:
    """Forward, backward and a step of AdamW on 2 x 128 and 1 x 128 tokens; milliseconds."""
    figures: dict[str, float] = {}
    for rows, (method, dora) in itertools.product((2, 1), (("LoRA", False), ("DoRA", True))):
        ids = torch.randint(0, WIDTH["vocab_size"], (rows, TOKENS))
        mine = attach(llama(), LoraConfig(RANK, 32, "all-linear", dora=dora), seed=0).model
        config = peft.LoraConfig(
            r=RANK, lora_alpha=32, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
        )
        other = peft.get_peft_model(llama(), config)
        title = f"{method}, {rows} x {TOKENS}"
        seconds = timed(
            {title: step_of(mine, ids), f"{title} in PEFT": step_of(other, ids)}, arguments.repeat
        )
        figures |= medians(seconds, 1e3)
        figures[f"{title} / PEFT's"] = ratio(seconds, title, f"{title} in PEFT")
    return figures


def step_of(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loading(arguments: argparse.Namespace) -> dict:
    """100 adapters onto one model, one after the other; seconds, once."""
    folders = adapter_folders(arguments.work, MANY)
    common.warm(*folders)
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    adapters = load(llama(), folders[0], name="0")
    other = peft.PeftModel.from_pretrained(llama(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        for side, run in (
            ("adapterkit", lambda f=folder, n=number: adapters.load(f, name=str(n))),
            ("PEFT", lambda f=folder, n=number: other.load_adapter(f, adapter_name=str(n))),
        ):
            start = time.perf_counter()
            run()
            spent[side].append(time.perf_counter() - start)
    figures = {side: sum(values) for side, values in spent.items()}
    tenth = MANY // 10
    slope = {f"last tenth / first tenth, {side}": sum(v[-tenth:]) / sum(v[:tenth])
             for side, v in spent.items()}  # fmt: skip
    return figures | slope | {"PEFT / adapterkit": figures["PEFT"] / figures["adapterkit"]}


def meta(arguments: argparse.Namespace) -> dict:
    """A Llama of 7 billion parameters on the meta device, rank 16 on all linear layers; seconds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SEVEN_BILLION))
    config = LoraConfig(RANK, 32, "all-linear")
    spent: dict[str, list[float]] = {"attach": [], "load": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeat):
            start = time.perf_counter()
            adapters = attach(model, config, seed=0)
            spent["attach"].append(time.perf_counter() - start)
            if not any(Path(folder).iterdir()):
                adapters.save(folder)
            adapters.detach()
            start = time.perf_counter()
            adapters = load(model, folder)
            spent["load"].append(time.perf_counter() - start)
            adapters.detach()
    return medians(spent)


def memory(arguments: argparse.Namespace) -> dict:
    """Peak of a process that loads 1 GB, with and without an adapter attached; bytes."""
    base = common.make_base(arguments.work / "base-1", 1.0, 5.0)
    peaks: dict[str, list[float]] = {"loaded": [], "loaded and attached": []}
    for _ in range(3):
        for name, word in (("loaded", "load"), ("loaded and attached", "attach")):
            timing = common.time_process([sys.executable, "-c", LOAD, str(base), word])
            peaks[name].append(timing.peak)
    figures = medians(peaks)  # the weights themselves are mapped files, and no part of it
    added = figures["loaded and attached"] - figures["loaded"]
    return figures | {"added / the model's size": added / common.GB}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "prefill": prefill,
    "decode": decode,
    "shapes": shapes,
    "training": training,
    "loading": loading,
    "meta": meta,
    "memory": memory,
}

if __name__ == "__main__":
    sys.exit(main())
