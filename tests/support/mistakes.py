"""A folder of sources with one mistake each, and what provokes each code of an error on them.

Most codes have a `command` in errors.toml. The others have a program here: Python, in which `cli`
runs a command, and `llama` makes a model. `python -m tests.support.mistakes` writes what they print
into errors.toml as the examples, or only those of the codes that you name."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.core import errors
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from tests.support import oracle
from tests.support.forks import command, forks, program
from tests.support.hub_client import FILES, TOKEN
from tests.support.hub_server import Hub

Tensors = dict[str, Tensor]
MODEL = "model.safetensors"
COMMIT = "0123456789" * 4
SITE = "https://huggingface.co"
TARGETS = ["q_proj", "v_proj"]
CUT = {"calls": ["rename", "renameat2"], "when": 1, "kill": True}  # before the output is published


def files(folder: Path) -> None:
    """A base, adapters, and copies of them with a mistake each."""
    _models(folder)
    _damaged_models(folder)
    _adapters(folder)
    _damaged_adapters(folder)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, "utf-8")
    _jobs(folder)


def _models(folder: Path) -> None:
    """Models of several kinds."""
    for name, build in MODELS.items():
        torch.manual_seed(0)
        oracle.save_base(build(), folder / name, "fp16" if name == "fp16" else "fp32")


def _mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=80,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config)


MODELS: dict[str, oracle.Build] = {
    "base": oracle.llama,
    "fp16": oracle.llama,
    "tied": oracle.tied_llama,
    "wide": lambda: oracle.llama(hidden_size=64),
    "experts": _mixtral,
    "bert": oracle.bert,
}


def _damaged_models(folder: Path) -> None:
    """Copies of the base."""
    for name in ("no-shard", "no-json", "unknown", "awq", "truncated"):
        shutil.copytree(folder / "base", folder / name)
    (folder / "no-json" / "config.json").write_text("oops")
    _config(folder / "unknown" / "config.json", model_type="newest", architectures=["NewForLM"])
    _config(folder / "awq" / "config.json", quantization_config={"quant_method": "awq"})
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "no-shard" / MODEL).unlink()
    (folder / "no-shard" / f"{MODEL}.index.json").write_text(json.dumps(index))
    data = (folder / "base" / MODEL).read_bytes()
    (folder / "truncated" / MODEL).write_bytes(data[: len(data) // 2])


def _adapters(folder: Path) -> None:
    """Adapters of the base, and of others."""
    for seed, name in enumerate(("style", "skill", "third")):
        oracle.train(oracle.llama(), folder / name, seed=seed, target_modules=TARGETS)
    oracle.train(oracle.llama(hidden_size=64), folder / "of-wide", target_modules=TARGETS)
    oracle.train(oracle.tied_llama(), folder / "embedding", target_modules=["embed_tokens"])
    more: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "trained": {"modules_to_save": ["lm_head"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        "other-tokens": {"trainable_token_indices": {"embed_tokens": [3]}},
    }
    for name, settings in more.items():
        oracle.train(oracle.llama(), folder / name, target_modules=TARGETS, **settings)
    place = "transformer.single_transformer_blocks.0.attn.to_q"
    factors = {f"{place}.lora_A.weight": torch.ones(4, 3072)}
    factors[f"{place}.lora_B.weight"] = torch.ones(3072, 4)
    save_file(factors, folder / "flux.safetensors")
    save_file({"a.b": torch.ones(2, 2)}, folder / "lora.safetensors")


def _damaged_adapters(folder: Path) -> None:
    """Copies of the adapter `style`."""
    for name in (
        "pointer", "pickle", "prompt", "half", "deeper", "rank", "pissa", "nan", "setting",
        "no-config", "cut", "large", "bad-json", "repeated", "touched",
    ):  # fmt: skip
        shutil.copytree(folder / "style", folder / name)
    (folder / "pointer" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    torch.save(load_file(folder / "style" / WEIGHTS), folder / "pickle" / "adapter_model.bin")
    (folder / "pickle" / WEIGHTS).unlink()
    (folder / "no-config" / CONFIG).unlink()
    (folder / "cut" / WEIGHTS).write_bytes((folder / "style" / WEIGHTS).read_bytes()[:4000])
    (folder / "prompt" / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    (folder / "bad-json" / CONFIG).write_text('{"r": 4,')
    _config(folder / "rank" / CONFIG, r=16)
    _config(folder / "pissa" / CONFIG, init_lora_weights="pissa")
    _config(folder / "setting" / CONFIG, use_newest=True)
    _config(folder / "repeated" / CONFIG, layer_replication=[[0, 9]])
    first = "layers.0.self_attn.q_proj.lora_B"
    edits: dict[str, Callable[[Tensors], Tensors]] = {
        "half": lambda all: {k: t for k, t in all.items() if first not in k},
        "deeper": lambda all: {k.replace("layers.1", "layers.7"): t for k, t in all.items()},
        "nan": lambda all: {k: t * torch.nan if first in k else t for k, t in all.items()},
        "large": lambda all: {k: t * 1e4 for k, t in all.items() if "q_proj" in k and ".0." in k},
    }
    for name, edit in edits.items():
        path = folder / name / WEIGHTS
        save_file(edit(load_file(path)), path, {"format": "pt"})
    _config(folder / "large" / CONFIG, target_modules=["q_proj"])


TEXTS = {
    "notes.txt": "hello\n",
    "model.gguf": "PK\x03\x04 not a model",
    "page.safetensors": "<!DOCTYPE html><html>not found</html>",
    "empty.yml": "models: []\nmerge_method: linear\n",
    "recipe.yml": "merge_method: slerp\nbase_model: base\nmodels:\n- model: base+style\n",
    "steps.toml": '[[step]]\nverb = "merge"\ninputs = ["base", "style"]\nout = "hf://org/merged"\n',
    "weights.json": '{"adapters": ["style", "skill"], "default": [1]}',
    "lines.jsonl": "oops\n",
    "ids.jsonl": "".join(f'{{"input_ids": [1, 2, {n}]}}\n' for n in range(8)),
    "more.jsonl": "".join(f'{{"input_ids": [3, 4, {n}]}}\n' for n in range(8)),
    "texts.jsonl": '{"text": "a b c"}\n',
}


def _jobs(folder: Path) -> None:
    """Plan files, an output that was changed, and one that was interrupted."""
    for line in (
        "merge base style --out planned --plan plan.json",
        "merge base style --out changed",
        "convert style --to mlx --out mlx",
    ):
        done = command(*line.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "changed" / "more.safetensors").write_bytes((folder / "base" / MODEL).read_bytes())
    mlx = folder / "mlx" / CONFIG
    config = json.loads(mlx.read_text("utf-8"))
    del config["lora_parameters"]["scale"]
    mlx.write_text(json.dumps(config), "utf-8")
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    (folder / "old.plan.json").write_text(json.dumps(plan | {"version": "0.0.1"}), "utf-8")
    argv = ["merge", "base", "style", "--out", "stopped"]
    forks().wait(forks().start(argv=argv, cwd=str(folder), fault=CUT))


def _config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


START = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from adapterkit import runtime
from adapterkit.cli import main, signals
from adapterkit.core.errors import AdapterkitError
from tests.support.live import llama, tokens

def cli(line):
    sys.argv = ["adapterkit", *line.split()]
    main(args=line.split(), prog_name="adapterkit")

try:
"""
END = """
except AdapterkitError as error:
    signals.fail(error, 1)
"""
OF_PROGRAMS = ("adapterkit.runtime", "transformers.models.llama.modeling_llama")
# code -> a program that ends with the error
PROGRAMS: dict[str, str] = {
    "AK110": """
sys.modules["ray"] = None
cli("merge base style --engine ray --out x")
""",
    "AK209": """
with mock.patch("os.preadv", side_effect=OSError(5, "Input/output error")):
    cli("merge base style --out x")
""",
    "AK210": """
def change(self, done):
    Path("touched", "adapter_model.safetensors").touch()

with mock.patch("adapterkit.cli.output.ProgressBar.__call__", change):
    cli("merge base touched --out x")
""",
    "AK604": """
with mock.patch("adapterkit.core.execute.free_bytes", return_value=1000):
    cli("merge base style --out x")
""",
    "AK605": """
import torch
with mock.patch("torch.linalg.svd", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
    cli("resize style --rank 2 --out x")
""",
    "AK609": """
signs = [signal.SIGINT]

def stop(self, done):
    for sign in signs[:]:
        signs.clear()
        os.kill(os.getpid(), sign)

with mock.patch("adapterkit.cli.output.ProgressBar.__call__", stop):
    cli("merge base style --out x")
""",
    "AK801": """
runtime.attach(llama(), {"target_modules": ["q_proj"], "trainable_token_indices": [999]})
""",
    "AK802": """
adapters = runtime.load(llama(), "style", name="style")
adapters.activate("stile")
""",
    "AK803": """
runtime.load(llama(), "deeper", name="deeper")
""",
    "AK804": """
model = llama()
adapters = runtime.load(model, "style", name="style")
with adapters.rows(["style", None, "style"]):
    model(tokens(rows=4))
""",
    "AK805": """
runtime.LoraFA(runtime.load(llama(), "style", name="style"), lr=1e-3)
""",
    "AK806": """
runtime.load_arrow(llama(), "style")
""",
    "AK903": """
model = llama()
model.model.embed_tokens.weight.data.fill_(float("nan"))
runtime.collect(model, lambda: model(tokens()))
""",
}


# code -> a command on the files of a Hub
OF_HUB = {
    "AK701": "merge org/name:gone.safetensors style --out x",
    "AK702": "merge base org/gated:adapter --out x",
    "AK705": "merge base style --out x --push org/name",
}


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Make the mistake of this code, in the folder of `files`."""
    for left in (".x.adapterkit", "x"):
        shutil.rmtree(folder / left, ignore_errors=True)
    line = errors.codes()[code].get("command")
    if line is not None:
        return command(*shlex.split(line), cwd=folder)
    if code in OF_HUB:
        return _of_hub(OF_HUB[code], folder)
    body = "".join(f"    {line}\n" for line in PROGRAMS[code].strip().splitlines())
    return program(START + body + END, folder, imports=OF_PROGRAMS)


def printed(text: str, folder: Path) -> str:
    """The error in a text of stderr, with paths relative to the folder and one id of a commit."""
    text = text[text.index("Error: ") :].replace(f"{folder}{os.sep}", "")
    return re.sub(r"[0-9a-f]{40}", COMMIT, text).strip()


def _of_hub(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    with Hub() as hub, tempfile.TemporaryDirectory() as home:
        hub.commit("org/name", FILES)
        hub.repo("org/gated", gated=True)
        hub.commit("org/gated", FILES)
        variables = os.environ | hub.environment(Path(home)) | {"HF_TOKEN": TOKEN}
        done = command(*shlex.split(line), cwd=folder, env=variables)
        done.stderr = done.stderr.replace(hub.url, SITE)
        return done


def provoked() -> list[str]:
    """The codes whose examples are real."""
    return [
        code
        for code, entry in errors.codes().items()
        if "command" in entry or code in PROGRAMS | OF_HUB
    ]


def write_examples(codes: Iterable[str], folder: Path) -> None:
    """Write what the mistakes of these codes print into errors.toml."""
    path = Path(errors.__file__).with_suffix(".toml")
    text = path.read_text("utf-8")
    files(folder)
    for code in codes:
        example = printed(run(code, folder).stderr, folder).replace("\\", "\\\\")
        block = re.compile(rf'(\[{code}\]\n(?:(?!\n\[).)*?example = """\n).*?("""\n)', re.DOTALL)
        text, count = block.subn(lambda m, new=example: m[1] + new + m[2], text + "\n")
        assert count == 1, code
        text = text.rstrip("\n") + "\n"
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_examples(sys.argv[1:] or provoked(), Path(temporary))
