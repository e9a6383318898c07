"""compare: each thing that a server can do with an adapter is told from the others."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.cli import main
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.sources import open_source
from adapterkit.verbs.score.compare import Guess, divergence, guesses, judged
from tests.support import oracle, served
from tests.support.ggml import HAS_WHEELS, quantize
from tests.support.gguf_files import TOKENS, gguf, llama, write
from tests.support.texts import save_tokenizer, write_rows

RANK, ALPHA = 8, 24  # a scale of 3, whose root and inverse are no 2 or 1/2
KINDS = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
SIDES, HALF = "without the deltas of embed_tokens, lm_head", "with half its weight"
# what is served -> its nearest variant, and whether it is the adapter
SERVED = {
    "style": ("the adapter", True),
    "ignored": ("the base", False),
    "half": (HALF, False),
    "rooted": ("with alpha / sqrt(r) for alpha / r", False),
    "unscaled": ("with scale 1 for 3", False),
    "headless": (SIDES, False),
    "attention": ("without the deltas of down_proj, embed_tokens, lm_head", False),
    "other": (None, False),
}


def save_adapter(model: Any, out: Path, seed: int = 0, **changes: object) -> Path:
    """An adapter with random factors; `changes` of its config."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=KINDS, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    peft: Any = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    peft.save_pretrained(str(out), save_embedding_layers=False)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


def without(adapter: Path, out: Path, kinds: list[str]) -> Path:
    """The adapter as one that drops some kinds of modules loads it."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    off = lambda key: any(kind in key for kind in kinds) and "_B" in key
    kept = {key: value * (not off(key)) for key, value in tensors.items()}
    save_file(kept, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as safetensors and GGUF, samples, and an adapter as each server loads it."""
    home = tmp_path_factory.mktemp("served")
    model: Any
    model, message, tensors = llama()
    tokens = [*TOKENS[:90], "Ã", *TOKENS[91:]]  # the first byte of a letter of two
    write(home / "base.gguf", "llama", message, tensors, tokens)
    packed = {
        name: (gguf.GGMLQuantizationType.Q4_0, quantize("Q4_0", torch.from_numpy(value)).numpy())
        if value.ndim == 2
        else value
        for name, value in tensors.items()
    }
    write(home / "q4_0.gguf", "llama", message, packed, tokens)
    model.save_pretrained(home / "base")
    load = lambda: AutoModelForCausalLM.from_pretrained(home / "base")
    save_adapter(load(), home / "style")
    save_adapter(load(), home / "half", lora_alpha=ALPHA / 2)
    save_adapter(load(), home / "rooted", use_rslora=True)
    save_adapter(load(), home / "unscaled", lora_alpha=RANK)
    save_adapter(load(), home / "other", seed=1)
    without(home / "style", home / "ignored", KINDS)
    without(home / "style", home / "headless", KINDS[3:])
    without(home / "style", home / "attention", KINDS[2:])
    numbers = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 90, (12,), generator=numbers).tolist() for _ in range(4)]
    rows[0][5] = 90
    write_rows(home / "ids.jsonl", *({"input_ids": row} for row in rows))
    return home


def adapters(home: Path) -> dict[str, Path]:
    return {name: home / name for name in SERVED}


def compared(home: Path, url: str, name: str, **more: Any) -> dict:
    given: dict[str, Any] = {"adapter": home / "style", "data": home / "ids.jsonl"} | more
    return adapterkit.compare(url, home / "base", served=name, **given)


@pytest.fixture(scope="module")
def engines(home: Path) -> Iterator[dict[str, served.Server]]:
    """A server of each protocol, with all adapters."""
    exact = served.Models(home / "base", adapters(home))
    rounded = served.Models(home / "base", adapters(home), torch.bfloat16)
    with served.vllm(exact) as one, served.sglang(exact) as two, served.vllm(rounded) as three:
        yield {"vllm": one, "sglang": two, "vllm in bf16": three}


FEW = ("style", "ignored", "headless", "other")


@pytest.mark.parametrize(
    "engine, name",
    [("vllm", name) for name in SERVED]
    + [(engine, name) for engine in ("sglang", "vllm in bf16") for name in FEW],
)
def test_what_a_server_does_with_an_adapter_is_named(
    engine: str, name: str, home: Path, engines: dict[str, served.Server]
):
    found = compared(home, engines[engine].url, name)
    nearest, same = SERVED[name]
    assert (found["nearest"], found["same"]) == (nearest, same), found
    assert found["acts"] == (name != "ignored") and found["base"] == "base"
    assert found["drops"] == (
        nearest.rpartition(" of ")[2].split(", ") if "of " in (nearest or "") else []
    )
    assert found["kl"]["noise"] < (1e-3 if "bf16" in engine else 1e-9) < found["kl"]["effect"] / 50


def test_fewer_tokens_and_a_server_s_own_limit(home: Path, engines: dict[str, served.Server]):
    url = engines["vllm"].url
    few, many = (compared(home, url, "half", top=top) for top in (2, 20))
    assert few["nearest"] == many["nearest"] == HALF
    assert few["kl"]["file"] < many["kl"]["file"] and few["top"] == 2
    with pytest.raises(Refused, match="answers 400: .*greater than max allowed: 20") as caught:
        compared(home, url, "half", top=21)
    assert caught.value.code == "AK910"


def test_a_merged_model_is_compared_alone(home: Path, tmp_path: Path):
    merged = tmp_path / "merged"
    adapterkit.merge(home / "base", home / "style", out=merged)
    with served.vllm(served.Models(merged, {})) as server:
        ask = lambda model: adapterkit.compare(
            server.url, model, served="base", data=home / "ids.jsonl"
        )
        same, other = ask(merged), ask(home / "base")
    assert (same["same"], other["same"]) == (True, False)
    assert same["acts"] is None and same["kl"].keys() == {"file"}
    assert same["kl"]["file"] < 1e-9 < 1e-2 < other["kl"]["file"]


def test_a_model_with_fewer_tokens_is_refused(home: Path, engines: dict, tmp_path: Path):
    small = tmp_path / "small"
    oracle.save_base(oracle.llama(), small, "fp32")
    data = write_rows(tmp_path / "ids.jsonl", {"input_ids": list(range(12))})
    with pytest.raises(Refused, match=r"the server lists token id (8|9)\d") as caught:
        adapterkit.compare(engines["sglang"].url, small, served="base", data=data)
    assert caught.value.expected == "ids from 0 to 79, the vocabulary of small"


def test_a_model_with_an_encoder_is_refused(engines: dict, tmp_path: Path):
    model: Any = oracle.t5()
    model.config.decoder_start_token_id = 0
    oracle.save_base(model, tmp_path / "t5", "fp32")
    data = write_rows(tmp_path / "ids.jsonl", {"input_ids": [4, 5, 6], "labels": [7, 8, 9]})
    with pytest.raises(Refused, match="t5 has an encoder"):
        adapterkit.compare(engines["vllm"].url, tmp_path / "t5", served="base", data=data)


def test_another_base_cannot_be_decided(home: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0) * 3)
    model.save_pretrained(tmp_path / "changed")
    weak = save_adapter(model, tmp_path / "weak", lora_alpha=0.5)
    with served.vllm(served.Models(tmp_path / "changed", {"weak": weak})) as server:
        found = compared(home, server.url, "weak", adapter=weak)
    assert (
        found["same"] is None and "cannot be decided, because the served base" in found["verdict"]
    )


def test_an_adapter_without_effect_cannot_be_decided(home: Path, engines: dict):
    found = compared(home, engines["vllm"].url, "ignored", adapter=home / "ignored")
    assert found["same"] is None and not found["acts"]
    assert "the adapter changes nothing on these texts" in found["verdict"]


def test_without_data_built_in_texts_are_compared(
    home: Path, engines: dict[str, served.Server], llama_cpp: str, tmp_path: Path
):
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    save_tokenizer(base)
    for url, positions in {engines["vllm"].url: 8 * 62, llama_cpp: 64}.items():
        found = adapterkit.compare(url, base, served="style", adapter=home / "style")
        assert found["same"] and (found["texts"], found["positions"]) == (8, positions), found
        builtin, cut = found["notes"]
        assert "built-in texts" in builtin and cut == "7 of 8 samples are cut to 63 tokens"


def test_divergence_is_kl_of_all_tokens_and_less_of_some():
    torch.manual_seed(0)
    p, q = (torch.randn(5, 40).double().log_softmax(-1) for _ in range(2))
    exact = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    lists = lambda rows, count: [
        {int(i): float(row[i]) for i in best.topk(count).indices}
        for row, best in zip(rows, p, strict=True)
    ]
    assert divergence(lists(p, 40), lists(q, 40)) == pytest.approx(exact, rel=1e-9)
    values = [divergence(lists(p, count), lists(q, 40)) for count in (1, 5, 20, 40)]
    assert values == sorted(values) and 0 < values[0] < exact
    first, other = (rows.gather(1, p.argmax(1, keepdim=True)).exp() for rows in (p, q))
    two = first * (first / other).log() + (1 - first) * ((1 - first) / (1 - other)).log()
    assert values[0] == pytest.approx(float(two.mean()), rel=1e-9)
    assert divergence(lists(p, 7), lists(p, 40)) == 0


def test_guesses_are_of_the_adapter(home: Path):
    found = guesses(read_adapter(open_source(home / "style")))
    weights = {one.words: one.weight for one in found if not one.drops}
    assert weights == {
        HALF: 0.5,
        "with twice its weight": 2.0,
        "with alpha / sqrt(r) for alpha / r": round(8**0.5, 6),
        "with scale 1 for 3": round(1 / 3, 6),
    }
    left = [set(KINDS) - {*one.drops} for one in found if one.drops]
    attention, mlp = {"q_proj", "v_proj"}, {"down_proj"}
    assert left[:3] == [{*attention, *mlp}, attention, mlp]
    assert sorted(map(sorted, left[3:])) == sorted(sorted({*KINDS} - {kind}) for kind in KINDS)


KL = {"file": 1e-4, "base": 0.3, "served_base": 0.3, "noise": 1e-4, "effect": 0.3}


@pytest.mark.parametrize(
    "changes, distances, acts, same",
    [
        ({}, (), True, True),
        ({"file": 2e-3}, (3e-3, 0.1), True, True),
        ({"file": 2e-3}, (1e-4, 0.1), True, False),  # drops what has little effect
        ({"file": 2e-3, "noise": 5e-3}, (1e-3, 0.1), True, True),  # less than the server's rounding
        ({"file": 0.3, "base": 0, "served_base": 0}, (0.1, 0.2), False, False),
        ({"file": 0.4, "base": 0.5}, (0.3, 0.2), True, False),
        ({"noise": 0.2, "file": 0.2, "base": 0.25}, (0.15, 0.2), True, None),
    ],
)
def test_numbers_mean(changes: dict, distances: tuple, acts: bool, same: bool | None):
    rows = {Guess(f"guess {n}"): value for n, value in enumerate(distances)}
    found = judged(KL | changes, rows)
    assert (found["acts"], found["same"]) == (acts, same), found


def test_the_command_prints_the_verdict_and_advice(
    home: Path, engines: dict[str, served.Server], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(home)
    url = engines["vllm"].url
    words = ["compare", f"{url}/v1/", "base", "--adapter", "style", "--data", "ids.jsonl", "--name"]
    done = CliRunner().invoke(main, [*words, "style"])
    assert done.exit_code == 0, done.output
    first, noise, about, *_ = done.stdout.splitlines()
    assert first.startswith("served adapter acts: yes; is this adapter: yes (KL ")
    assert first.endswith("from the base); drops: none") and noise.startswith("noise: KL ")
    assert about == f"compared: 44 positions of 4 texts, 20 tokens at each; vLLM at {url}"
    done = CliRunner().invoke(main, [*words, "headless"])
    assert done.exit_code == 1, done.output
    assert f"no, it acts as this one {SIDES}, KL " in done.stdout
    assert "; drops: embed_tokens, lm_head\n" in done.stdout
    assert done.stdout.endswith("\n  adapterkit check style --for vllm --base base\n")
    done = CliRunner().invoke(main, [*words, "headless", "--json"])
    assert json.loads(done.stdout)["drops"] == KINDS[3:] and done.exit_code == 1


# -- llama.cpp's own server ------------------------------------------------------------------------

LLAMA_CPP = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 64, 1, False, 0
parameters.cpuparams.n_threads, parameters.n_gpu_layers, parameters.verbosity = 1, 0, -1
parameters.lora_adapters = [
    xllamacpp.CommonAdapterLoraInfo(*word.rsplit("=", 1)[:1], float(word.rsplit("=", 1)[1]))
    for word in sys.argv[2:]
]
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
import os
os._exit(0)
"""


@pytest.fixture(scope="module")
def llama_cpp(home: Path) -> Iterator[str]:
    """The address of llama.cpp's server: adapters with scale 1, one with scale 1/2, one with 0."""
    if not HAS_WHEELS:
        pytest.importorskip("xllamacpp")
    words = []
    for name, scale in {"style": 1, "headless": 1, "other": 1, "ignored": 1, "weak": 0.5}.items():
        source, out = home / ("style" if name == "weak" else name), home / f"{name}.gguf"
        adapterkit.convert(source, to="gguf", base=home / "base", out=out)
        words.append(f"{out}={scale}")
    words = [sys.executable, "-c", LLAMA_CPP, str(home / "base.gguf"), *words]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    with process, contextlib.closing(process.stdin):
        lines = (line.strip() for line in process.stdout)
        yield next(line for line in lines if line.startswith("http"))


@pytest.mark.parametrize(
    "model, name, nearest, same",
    [
        ("base", "style", "the adapter", True),
        ("base", "headless.gguf", SIDES, False),
        ("base", "other", None, False),
        ("base", "ignored", "the base", False),
        ("base", "weak", HALF, False),
        ("base.gguf", "style", "the adapter", True),
        ("q4_0.gguf", "style", "the adapter", True),
        ("q4_0.gguf", "weak", HALF, False),
    ],
)
def test_llama_cpp_s_server(
    model: str, name: str, nearest: str | None, same: bool, home: Path, llama_cpp: str
):
    given: dict[str, Any] = {"adapter": home / "style", "data": home / "ids.jsonl"}
    found = adapterkit.compare(llama_cpp, home / model, served=name, **given)
    assert (found["server"], found["positions"]) == ("llama.cpp", 44)
    assert (found["nearest"], found["same"]) == (nearest, same), found
    assert found["kl"]["noise"] < (1e-2 if model == "q4_0.gguf" else 1e-4)
    assert found["kl"]["effect"] > 0.1


def test_llama_cpp_s_own_model_is_as_it_is_served(home: Path, llama_cpp: str):
    """All its adapters act together."""
    name = str(home / "base.gguf")
    found = adapterkit.compare(llama_cpp, home / "base", served=name, data=home / "ids.jsonl")
    assert found["same"] is False and found["kl"]["file"] > 0.01
    with pytest.raises(Refused, match="is a model, not an adapter"):
        compared(home, llama_cpp, name)
