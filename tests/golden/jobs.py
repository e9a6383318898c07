"""The golden jobs: small jobs of each verb, run through Python and the command line, and what they
give as JSON.

Only public names of the package are used, so that records can be made with any commit.
"""

import hashlib
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from safetensors.torch import load_file

import adapterkit
from adapterkit.cli import main as command_line

from .inputs import create_inputs

RECEIPT = "adapterkit.json"


@dataclass(frozen=True)
class Job:
    """A call of a verb; a source that names another job reads that job's output.

    `exact`: all output bytes are the same on every processor; else the output comes from LAPACK, or
    from sums whose order depends on the processor, and golden numbers of it are kept instead of
    hashes.
    """

    name: str
    verb: str
    sources: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True


def job(name: str, *sources: str, exact: bool = True, **options: Any) -> Job:
    """The verb is the first word of the name."""
    return Job(name, name.partition("-")[0], sources, options, exact)


# Jobs whose outputs others read come first.
WRITING = (
    job("quantize-nf4", "base", to="nf4"),
    job(
        "quantize-nf4-double",
        "base",
        to="nf4",
        double_quant=True,
        skip=".*layers.0[.]mlp.*",
        exact=False,
    ),
    job("quantize-w8a16", "base", to="w8a16"),
    job("quantize-w4a16", "base", to="w4a16", block_size=32),
    job("quantize-int8", "base", to="int8"),
    job("quantize-mxfp4", "base", to="mxfp4"),
    job("dequantize-nf4", "quantize-nf4", dtype="fp32"),
    job("dequantize-w8a16", "quantize-w8a16", max_shard_size="40KB"),
    job("merge-plain", "base", "style"),
    job("merge-several", "base", "style=0.75", "rslora", "dora", verify=True, exact=False),
    job("merge-head", "base32", "head", dtype="bf16", max_shard_size="40KB", exclude="k_proj"),
    job("merge-stochastic", "base", "rslora=-0.5", rounding="stochastic", seed=3),
    job("merge-peft", "base", "style", "skill=0.5", compat="peft", tokenizer="base"),
    job("merge-ties", "base", "style", "skill=0.5", method="ties", density=0.5),
    job("merge-nf4", "quantize-nf4", "style"),
    job("merge-nf4-dequantized", "quantize-nf4", "style", dequantize=True),
    job("merge-w8a16", "quantize-w8a16", "style", hash="none"),
    job("merge-pipeline", "pipeline", "unet-text.safetensors=0.5", lbw=['{"unet": 2}']),
    job("merge-file", "wan.safetensors", "motion.safetensors=-0.5", dtype="bf16"),
    job("convert-same", "skill", to="peft"),
    job("edit-words", "skill", title="Skill", trigger="skl", tag=["lora", "skill"], alpha=8),
    job("convert-kohya", "kohya.safetensors", to="diffusers"),
    job("combine-linear", "style", "skill=0.5", "rslora=-0.25", method="linear"),
    job("combine-factors", "law", "medicine=0.25", method="linear", space="factors"),
    job("combine-svd", "law", "medicine=0.5", method="svd", rank=3, exact=False),
    job("combine-ties", "law", "medicine", "english", method="ties", density=0.5, exact=False),
    job("combine-dare", "law", "medicine", method="dare_ties", density=0.5, seed=5, exact=False),
    job("combine-slerp", "law", "medicine", method="slerp", settings={"t": 0.25}, exact=False),
    job("subtract-exact", "law", general=["english", "medicine"]),
    job("subtract-several", "law", "medicine", general=["english"], rank=3, exact=False),
    job("subtract-factors", "law", general=["english"], space="factors", exclude="down_proj"),
    job("arrow-plain", "law", "medicine", top_k=2, temperature=0.5, exact=False),
    job("arrow-peft", "law", "medicine", general=["english"], compat="peft", seed=1, exact=False),
    job("init-pissa", "base32", method="pissa", rank=4, targets="q_proj,v_proj", exact=False),
    job(
        "init-quantized",
        "base",
        method="pissa",
        rank=4,
        alpha=8,
        targets="all-linear",
        quantize="nf4",
        exact=False,
    ),
    job("loftq-nf4", "base", rank=4, exact=False),
    job(
        "loftq-mixed",
        "base",
        rank=4,
        bits_for=[".*mlp.*=8"],
        iterations=2,
        rslora=True,
        exact=False,
    ),
    job("loftq-kept", "base", rank=4, quantized_base="quantize-nf4", exact=False),
    job("loftq-stats", "base", rank=4, stats="covariances.safetensors", iterations=1, exact=False),
    job("extract-rank", "base32", "tuned", rank=3, exact=False),
    job("extract-energy", "base32", "tuned", energy=0.9, rest="drop", dtype="bf16", exact=False),
    job("resize-rank", "law", rank=2, exact=False),
    job("resize-size", "skill", max_size="9KB", alpha="keep", exact=False),
    job("resize-dora", "dora", base="base", rank=4, exact=False),
    job("rebase-exact", "pissa-trained", initial="pissa-initial"),
    job("rebase-rank", "pissa-trained", initial="pissa-initial", rank=4, exact=False),
    job(
        "stats-all",
        "base32",
        data="ids.jsonl",
        what="covariance,mean,gradient",
        batch=2,
        targets="q_proj,v_proj,down_proj",
        exact=False,
    ),
)
READING = (
    job("inspect-base", "base"),
    job("inspect-adapter", "law", base="base", exact=False),
    job("inspect-quantized", "quantize-nf4"),
    job("inspect-file", "style/adapter_model.safetensors"),
    job("check-vllm", "style", program="vllm", base="base"),
    job(
        "diagnose-several", "merge-several", base="base", adapters=["style", "rslora"], exact=False
    ),
    job("diff-models", "base32", "tuned", exact=False),
    job("diff-quantized", "base", "quantize-nf4", exact=False),
    job("diff-adapters", "law", "resize-rank", tolerance=0.001, exact=False),
    job("fit-plan", "base32", "law", data="ids.jsonl", out="w.json", holdout=0.4, dry_run=True),
    job("verify-files", "merge-plain"),
    job("rerun-merge", "merge-plain", inputs="."),
    job("report-two", "law", "medicine", out="report.html", overwrite=True, exact=False),
    job(
        "score-two",
        "base32",
        "tuned",
        data="ids.jsonl",
        adapters=["law"],
        against="base32",
        exact=False,
    ),
    job("verify-rows", "merge-several", base="base", adapters=["style=0.75", "rslora", "dora"]),
)


def run(task: Job) -> dict[str, Any]:
    """The record of a job, run in the current folder.

    Of a writing verb: `plan`, what `--dry-run --json` prints; `receipt`; `returned`, what the
    receipt in Python has besides; `files`, name -> [bytes, sha256]; `cards`, the texts of the model
    cards; `summary` where the job is not exact. Of a reading verb: `exit`, its exit status, and
    `result`.
    """
    if task in READING:
        result = call(task)
        status, printed = _command(task)
        document = json.loads(printed)
        assert document == json.loads(json.dumps(result)), f"{task.name}: --json is another result"
        return {"exit": status, "result": document}
    out = output_of(task)
    receipt = call(task, out=out)  # first: a command that is refused ends the process
    status, printed = _command(task, out=f"planned-{out}", dry_run=True)
    assert status == 0 and not Path(f"planned-{out}").exists(), printed
    files, cards = {}, {}
    is_file = out.is_file()
    root = out.parent if is_file else out
    for path in sorted(p for p in ([out] if is_file else out.rglob("*")) if p.is_file()):
        name, data = path.relative_to(root).as_posix(), path.read_bytes()
        if path.suffix == ".md":
            cards[name] = data.decode()
        elif name != RECEIPT:
            files[name] = [len(data), hashlib.sha256(data).hexdigest()]
    stored = json.loads(json.dumps(receipt.data) if is_file else (out / RECEIPT).read_bytes())
    record = {
        "plan": json.loads(printed),
        "receipt": stored,
        "returned": {k: v for k, v in receipt.data.items() if k not in stored or v != stored[k]},
        "files": files,
        "cards": cards,
    }
    if not task.exact:
        weights = [name for name in files if name.endswith(".safetensors")]
        record["summary"] = {name: summary(root / name) for name in weights}
    return record


def summary(path: Path) -> dict[str, list[float]]:
    """Numbers of a file of weights that do not depend on the signs of singular vectors: [sum of
    squares, first element, last element] of b@a for each pair of factors and of each other floating
    tensor, in float64."""
    tensors = {key: w for key, w in load_file(path).items() if w.is_floating_point()}
    for key in list(tensors):
        for a, b in (("lora_A.weight", "lora_B.weight"), (".a", ".b")):
            if key.endswith(a):
                pair = tensors.pop(key).double(), tensors.pop(key.removesuffix(a) + b).double()
                tensors[key.removesuffix(a) + "delta"] = pair[1] @ pair[0]
    values = {key: tensor.double().flatten() for key, tensor in tensors.items()}
    return {
        key: [float(f"{x:.8g}") for x in (float(v @ v), float(v[0]), float(v[-1]))]
        for key, v in sorted(values.items())
    }


def output_of(task: Job) -> Path:
    """What a job writes: a folder, or a file of statistics or an image model."""
    is_file = task.verb == "stats" or task.sources[0] == "wan.safetensors"
    return Path(f"{task.name}.safetensors" if is_file else task.name)


def call(task: Job, **more: Any) -> Any:
    """The verb in Python; those whose adapters are a list get one."""
    sources: list[Any] = list(task.sources)
    if task.verb in ("merge", "fit"):
        sources = [sources[0], sources[1:]]
    elif task.verb in ("combine", "subtract", "arrow", "report", "score"):
        sources = [sources]
    return getattr(adapterkit, task.verb)(*sources, **task.options, **more)


def _command(task: Job, **more: Any) -> tuple[int, str]:
    """The exit status and stdout of the same job's command with --json."""
    words = [task.verb, *task.sources, "--json"]
    for name, value in (task.options | more).items():
        flag = "--" + {"adapters": "adapter", "settings": "set", "program": "for"}.get(
            name, name
        ).replace("_", "-")
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        for item in value if isinstance(value, list) else [value]:
            words += [flag] if item is True else [flag, str(item)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = CliRunner().invoke(command_line, words, catch_exceptions=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return result.exit_code, result.stdout


def run_all(folder: Path) -> dict[str, Any]:
    """{job: record} of all jobs, run in `folder`, which is empty."""
    before = Path.cwd()
    os.chdir(folder)  # so that no path of this machine gets into a record
    try:
        create_inputs(Path())
        return {task.name: run(task) for task in (*WRITING, *READING)}
    finally:
        os.chdir(before)
