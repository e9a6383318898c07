"""What cannot be done is refused before anything is written, and says what to do; statistics of
another model are refused by those who read them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core import execute
from adapterkit.core.errors import AdapterkitError, Damaged, Refused, Unrecoverable
from adapterkit.verbs.shared.statistics_file import METADATA
from tests.support import oracle
from tests.support.texts import save_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def left(folder: Path) -> dict[str, bytes | None]:
    """Every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# -- what `stats` refuses --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A change to a right call: of the data, of the base's files, of an option."""

    words: str
    data: bytes | dict | None = None
    change: Callable[[Path], object] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"


def config(**changes: Any) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(*names: str) -> Callable[[Path], object]:
    return lambda base: [(base / name).unlink() for name in names]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PAIR = {"prompt": "who", "completion": "me"}
CASES = {
    "no line": Case("there is no usable line", b"\n\n"),
    "an empty file": Case("there is no usable line", b""),
    "empty texts": Case("there is no usable line", {"text": " "}),
    "not UTF-8": Case("line 1: not UTF-8: byte 13", b'{"text": "gr\xfc\xdf"}\n'),
    "broken JSON": Case("line 2: not JSON", b'{"text": "who"}\n{"text": "who\n'),
    "unknown field": Case("fields content", {"content": "who"}),
    "ids beyond": Case("token id 80.*\n.*ids from 0 to 79", {"input_ids": [4, 80]}),
    "a negative id": Case("token id -1", {"input_ids": [-1]}),
    "nothing counts": Case("no token of 1 samples counts", {"input_ids": [4], "labels": [-100]}),
    "no file": Case("no such file", options={"data": "nowhere.jsonl"}),
    "no data": Case("--data", options={"data": []}),
    "another type": Case("files of type .csv", options={"data": "data.csv"}),
    "length 0": Case("--length 0", options={"length": 0}),
    "more than the positions": Case("--length 65.*\n.*at most 64", options={"length": 65}),
    "samples 0": Case("--samples 0", options={"samples": 0}),
    "batch 0": Case("--batch 0", options={"batch": 0}),
    "unknown what": Case("--what 'men'.*\n.*\n.*'mean'", options={"what": "mean,men"}),
    "nothing asked for": Case("--what", options={"what": []}),
    "another compat": Case("--compat", options={"compat": "corda"}),
    "pca as PEFT": Case("pca cannot be combined", options={"what": "pca", "compat": "peft"}),
    "unknown targets": Case("'q_prof' matches none", options={"targets": "q_prof"}),
    "a norm": Case("input_layernorm is a LlamaRMS", options={"targets": "input_layernorm"}),
    "another device": Case("--device", options={"device": "tpu"}),
    "no such GPU": Case("CUDA devices here", options={"device": "cuda:99"}),
    "no tokenizer": Case("no tokenizer", change=without(*TOKENIZER)),
    "broken tokenizer": Case(
        "cannot load the tokenizer", change=lambda b: (b / "tokenizer.json").write_text("{}")
    ),
    "no template": Case(
        "has no chat template",
        {"messages": [{"role": "user", "content": "who"}]},
        change=lambda base: save_tokenizer(base, template=None),
    ),
    "unknown model": Case("no model of type conjured", change=config(model_type="conjured")),
    "no config": Case("no model of type", change=without("config.json")),
    "a layer is missing": Case("no model.layers.2", change=config(num_hidden_layers=3)),
    "another width": Case("expected", change=config(intermediate_size=64)),
    "images": Case("reads pixel_values, no text", model="vit"),
    "texts for a translator": Case("an encoder-decoder takes no text", {"text": "who"}, model="t5"),
    "no start": Case(
        "no decoder_start_token_id", PAIR, config(decoder_start_token_id=None), model="t5"
    ),
    "gradients of an encoder": Case(
        "predicts no tokens", PAIR, model="bert", options={"what": "gradient"}
    ),
    "gradients of tokens that are seen": Case(
        "plain text has no masked tokens that BertForMaskedLM could predict", model="masked_bert",
        options={"what": "gradient"},
    ),
    "an adapter": Case("adapter", change=lambda base: as_adapter(base)),
    "no model at all": Case("no such path", options={"base": "./nowhere/at/all"}),
}  # fmt: skip


def as_adapter(base: Path) -> None:
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_written(
    name: str, dry_run: bool, base, tmp_path: Path, monkeypatch
) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(base(case.model), tmp_path / "base")
    data = tmp_path / "data.jsonl"
    if isinstance(case.data, bytes):
        data.write_bytes(case.data)
    else:
        write_rows(data, case.data or {"text": "who is that?"})
    (tmp_path / "data.csv").write_text("text\n")
    if case.change:
        case.change(folder)
    before = left(tmp_path)
    call = {"base": folder, "data": data, "out": tmp_path / "s.safetensors"} | case.options
    with pytest.raises((Refused, Damaged), match=case.words) as caught:
        adapterkit.stats(**call, dry_run=dry_run)
    assert caught.value.hint or all(error.hint for error in caught.value.errors)
    assert left(tmp_path) == before


OUTPUTS = {
    "a file": ("s.safetensors", "adapterkit did not write"),
    "a folder": ("folder.safetensors", "a link or a folder of that name"),
    "a link": ("link.safetensors", "is a link"),
    "in the model": ("base/s.safetensors", "is inside the input"),
    "below a file": ("s.safetensors/x.safetensors", "is a file, so no folder"),
    "another suffix": ("s.pt", "a file of type .pt"),
    "no suffix": ("s", "a file of type unknown"),
    "a long name": ("x" * 250 + ".safetensors", "the name is too long"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be(name: str, overwrite, base, texts, tmp_path, monkeypatch) -> None:
    out, words = OUTPUTS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base(), "base")
    Path("s.safetensors").write_text("mine")
    Path("folder.safetensors").mkdir()
    Path("link.safetensors").symlink_to("s.safetensors")
    before = left(tmp_path)
    with pytest.raises(Refused, match=words) as caught:
        adapterkit.stats("base", data=texts, out=out, overwrite=overwrite)
    assert caught.value.hint and left(tmp_path) == before


def test_too_little_space(base, texts, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(execute, "free_bytes", lambda path: 1000)
    before = left(tmp_path)
    with pytest.raises(Refused, match="1,000 bytes free") as caught:
        adapterkit.stats(base(), data=texts, out=tmp_path / "s.safetensors")
    assert "another disk" in caught.value.hint and left(tmp_path) == before


def test_code_of_a_model_or_tokenizer_is_not_run(base, texts, tmp_path) -> None:
    folder = shutil.copytree(base(), tmp_path / "base")
    config(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})(
        folder
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    adapterkit.stats(folder, data=texts, out=tmp_path / "s.safetensors", samples=2)
    assert not (tmp_path / "run").exists()


# -- what their readers refuse ---------------------------------------------------------------------

Tensors = dict[str, Tensor]
KEY = "model.layers.0.self_attn.q_proj.covariance"


def first(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    return tensors | {KEY: change(tensors[KEY])}


def spoilt(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    value[1, 2] = value[2, 1] = number
    return value


def lopsided(value: Tensor) -> Tensor:
    value = value.clone()
    value[1, 2] += value.diagonal().mean()
    return value


DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors], type[AdapterkitError], str]] = {
    "a module is missing": (lambda t: {k: v for k, v in t.items() if k != KEY}, Refused,
                            "no model.layers.0.self_attn.q_proj.covariance"),
    "another width": (lambda t: first(t, lambda v: v[1:, 1:].clone()), Damaged, r"\(31, 31\)"),
    "no matrix": (lambda t: first(t, lambda v: v[0].contiguous()), Damaged, r"\(32,\)"),
    "integers": (lambda t: first(t, lambda v: v.long()), Damaged, "I64"),
    "NaN": (lambda t: first(t, lambda v: spoilt(v, float("nan"))), Unrecoverable, "finite"),
    "infinity": (lambda t: first(t, lambda v: spoilt(v, float("inf"))), Unrecoverable, "finite"),
    "not symmetric": (lambda t: first(t, lopsided), Unrecoverable, "symmetric"),
    "negative": (lambda t: first(t, lambda v: -v), Unrecoverable, "negative|positive|eigenvalue"),
    "zero": (lambda t: first(t, lambda v: v * 0), Unrecoverable, "zero"),
    "of another model": (lambda t: {k.replace("layers", "h"): v for k, v in t.items()}, Refused,
                         "no model.layers"),
    "empty": (lambda t: {"x": torch.zeros(1)}, Refused, "no model.layers"),
}  # fmt: skip


@pytest.fixture
def stats(cached_folder, base) -> Path:
    """Statistics of the Llama, each module with its own."""

    def build(folder: Path) -> None:
        data = write_rows(folder / "texts.jsonl", *({"text": word * 9} for word in "abcdefgh"))
        adapterkit.stats(base(), data=data, out=folder / "shared.safetensors")
        tensors, about = read(folder / "shared.safetensors")
        for module, owner in about["shared"].items():
            tensors[f"{module}.covariance"] = tensors[f"{owner}.covariance"].clone()
        save_file(tensors, folder / "s.safetensors", {"format": "pt"})

    return cached_folder("hostile-stats", build) / "s.safetensors"


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()[METADATA])


@pytest.mark.parametrize("name", DAMAGES)
def test_statistics_that_do_not_fit_are_refused(name: str, stats, base, tmp_path) -> None:
    change, kind, words = DAMAGES[name]
    save_file(change(load_file(stats)), tmp_path / "s.safetensors")
    before = left(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        adapterkit.loftq(
            base(), rank=2, stats=tmp_path / "s.safetensors", out=tmp_path / "out", iterations=1
        )
    assert caught.value.hint or all(error.hint for error in caught.value.errors)
    assert left(tmp_path) == before


def test_a_file_that_is_cut_short(stats, base, tmp_path) -> None:
    data = stats.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "s.safetensors").write_bytes(data[:size])
        before = left(tmp_path)
        with pytest.raises(AdapterkitError) as caught:
            adapterkit.loftq(base(), rank=2, stats=tmp_path / "s.safetensors", out=tmp_path / "out")
        assert "s.safetensors" in str(caught.value) and left(tmp_path) == before


K_PROJ = "model.layers.0.self_attn.k_proj"
SHARED: dict[str, str] = {
    "no object": "[]",
    "no JSON": "{",
    "a list": '{"shared": []}',
    **{
        f"to {owner!r}": json.dumps({"shared": {K_PROJ: owner}})
        for owner in ("nothing", 3, ["x"], K_PROJ, "model.layers.0.mlp.down_proj")
    },
}


@pytest.mark.parametrize("name", SHARED)
def test_contradictory_metadata_is_refused(name: str, stats, base, tmp_path) -> None:
    tensors = load_file(stats)
    del tensors[f"{K_PROJ}.covariance"]
    save_file(tensors, tmp_path / "s.safetensors", {METADATA: SHARED[name]})
    with pytest.raises((Refused, Damaged)) as caught:
        adapterkit.loftq(base(), rank=2, stats=tmp_path / "s.safetensors", out=tmp_path / "out")
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_statistics_of_a_conv1d_are_not_those_of_its_transpose(base, texts, tmp_path) -> None:
    """GPT-2's mlp.c_proj has (4·in, in) stored: its inputs are 4·in wide."""
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base("gpt2"), data=texts, out=out, what="covariance,gradient")
    tensors, about = read(out)
    model = oracle.load(oracle.gpt2, base("gpt2"))
    weight = model.get_submodule("transformer.h.0.mlp.c_proj").weight
    assert tensors["transformer.h.0.mlp.c_proj.covariance"].shape == (len(weight), len(weight))
    assert tensors["transformer.h.0.mlp.c_proj.gradient"].shape == weight.T.shape
    assert about["model"] == "GPT2LMHeadModel"
