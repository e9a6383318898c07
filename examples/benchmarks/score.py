"""Losses by `adapterkit score`, against a script that loads the model with transformers and runs
the same samples: seconds, memory, and how far the two losses are apart.

    python examples/benchmarks/score.py [--models smollm2,synthetic] [--size GB] [--samples N]
                                        [--length N] [--repeat N] [--work FOLDER] [--json FILE]

`synthetic` is the Llama of common.py, 2 GB in bfloat16, and `smollm2` is SmolLM2-135M. Samples are
random tokens, all of `--length`. Both sides compute in float32 on one sample at a time. The first
row is the command, a process with all that it imports. `in process` is the time of the call, or of
the script, after its imports, so it includes reading the model; `compute` is without reading. The
files are in the page cache. Memory is the peak of anonymous bytes. For 2 GB it takes some 10
minutes on two cores, and 5 GB of memory for transformers.
"""

import json
import random
import re
import statistics
import sys
from pathlib import Path

from common import Timing, alone, environment, make_base, parser_of, time_process, warm

OURS = """
import sys, time
import torch, adapterkit
from transformers import AutoModelForCausalLM
from adapterkit.verbs.score import job
from adapterkit.verbs.stats.model.stored_model import StoredModel
base, data, samples = sys.argv[1:]
reading, load = [0.0], StoredModel.load
def timed(self, *args):
    began = time.perf_counter()
    load(self, *args)
    reading[0] += time.perf_counter() - began
StoredModel.load = timed
started, processor = time.perf_counter(), time.process_time()
document = adapterkit.score([base], data=data, samples=int(samples))
seconds, processor = time.perf_counter() - started, time.process_time() - processor
print("loss", document["rows"][0]["loss"]["value"])
print("compute", seconds - reading[0])
print(f"processor={processor}")
print(f"seconds={seconds}")
"""
THEIRS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
base, data, samples = sys.argv[1:]
started, processor = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
loaded, total, count = time.perf_counter(), 0.0, 0
with torch.inference_mode():
    for line in open(data):
        ids = torch.tensor([json.loads(line)["input_ids"]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
ended = time.perf_counter()
print("loss", total / count)
print("compute", ended - loaded)
print(f"processor={time.process_time() - processor}")
print(f"seconds={ended - started}")
"""
COMMAND = "-m adapterkit score {base} --data {data} --samples {samples} --json"


def main() -> None:
    words = parser_of(__doc__)
    words.add_argument("--models", default="smollm2,synthetic")
    words.add_argument("--size", type=float, default=2.0, help="GB of the synthetic model (2)")
    words.add_argument("--samples", type=int, default=16)
    words.add_argument("--length", type=int, default=512, help="tokens of a sample (512)")
    options = words.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = {}
    with alone(options.work):
        for name in options.models.split(","):
            base = base_of(name, options.work, options.size)
            data = texts(base, options.work / f"{name}.jsonl", options.samples, options.length)
            warm(base)
            rows[name] = measure(base, data, options.samples, options.repeat)
            show(name, rows[name])
    if options.json:
        about = environment("adapterkit", "torch", "transformers")
        options.json.write_text(json.dumps({"about": about, "score": rows}, indent=1) + "\n")


def base_of(name: str, work: Path, size: float) -> Path:
    if name == "synthetic":
        return make_base(work / f"llama-{size:g}gb", size, shard=5.0)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import realmodel

    return realmodel.smollm2()


def texts(base: Path, out: Path, samples: int, length: int) -> Path:
    """Samples of random tokens."""
    draw, size = random.Random(0), json.loads((base / "config.json").read_text())["vocab_size"]
    rows = [{"input_ids": draw.choices(range(3, size), k=length)} for _ in range(samples)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def measure(base: Path, data: Path, samples: int, repeat: int) -> dict:
    """Medians over the rounds, in which both sides take turns."""
    given = {"base": base, "data": data, "samples": samples}
    lines = {
        "adapterkit score": COMMAND.format(**given).split(),
        "adapterkit": ["-c", OURS, *map(str, given.values())],
        "transformers": ["-c", THEIRS, *map(str, given.values())],
    }
    found: dict[str, list[Timing]] = {name: [] for name in lines}
    for _ in range(repeat):
        for name, line in lines.items():
            found[name].append(time_process([sys.executable, *line]))
    rows = {name: summary(timings) for name, timings in found.items()}
    ours, theirs = rows["adapterkit"], rows["transformers"]
    ratios = {
        "whole process": rows["adapterkit score"]["seconds"] / theirs["seconds"],
        "in process": ours["in_process"] / theirs["in_process"],
        "compute": ours["compute"] / theirs["compute"],
        "memory": rows["adapterkit score"]["peak_mb"] / theirs["peak_mb"],
        "losses apart": abs(ours["loss"] - theirs["loss"]),
    }
    return {"rows": rows, "ratios": ratios}


def summary(timings: list[Timing]) -> dict[str, float]:
    """Medians of the rounds of one side."""
    middle = lambda values: statistics.median(values)
    row = {"seconds": middle(one.wall for one in timings)}
    row["peak_mb"] = middle(one.peak / 1e6 for one in timings)
    if timings[0].reported is not None:
        row["in_process"] = middle(one.reported or 0.0 for one in timings)
        row["processor"] = middle(one.processor or 0.0 for one in timings)
        for name in ("loss", "compute"):
            said = [re.search(rf"^{name} (\S+)$", one.out, re.MULTILINE) for one in timings]
            row[name] = middle(float(found[1]) for found in said if found)
    return row


def show(name: str, found: dict) -> None:
    print(f"{name}\n| | whole process, s | in process, s | compute, s | peak MB | loss |")
    print("|---|---|---|---|---|---|")
    for side, row in found["rows"].items():
        columns = ("seconds", "in_process", "compute", "peak_mb", "loss")
        cells = [f"{row[key]:.6g}" if key in row else "" for key in columns]
        print(f"| {side} | {' | '.join(cells)} |")
    ratios = (f"{what} {value:.3g}" for what, value in found["ratios"].items())
    print(f"adapterkit / transformers: {', '.join(ratios)}\n", flush=True)


if __name__ == "__main__":
    main()
