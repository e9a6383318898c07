"""merge --choose: each way is measured as it would be written, and the best one is published."""

import json
import random
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle, quantized_llama, texts
from tests.support.quantized_llama import FORMS, LINEAR, few

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDINGS = ("nearest", "stochastic", "compensated")
WEIGHTS = (".safetensors", ".gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Samples of token ids below 80, which need no tokenizer."""
    draw = random.Random(0)
    rows = ([draw.randrange(80) for _ in range(draw.randrange(5, 30))] for _ in range(8))
    return texts.write_rows(tmp_path / "data.jsonl", *({"input_ids": row} for row in rows))


def options_of(entry: str, more: dict[str, Any]) -> dict[str, Any]:
    """The options of a merge that an entry of --choose stands for."""
    plain = {name: value for name, value in more.items() if name not in ("stats", "original")}
    if entry == "base16":
        return plain | {"original": more["original"]}
    if entry.startswith("touched-as="):
        return plain | {"changed_type": entry.removeprefix("touched-as=")}
    own = {"stats": more["stats"]} if entry == "compensated" else {}
    return plain | {"rounding": entry} | own


def hashes(out: Path) -> set[str]:
    """Those of the files of weights of an output."""
    files = [out] if out.is_file() else [p for p in out.iterdir() if p.suffix in WEIGHTS]
    return {sha256(path.read_bytes()).hexdigest() for path in files}


def check_choice(
    base: Path, adapter: Path, data: Path, tmp_path: Path, *entries: str, **more: Any
) -> dict[str, Any]:
    """Choose, and compare each measured loss with that of the merge that is really written, bit for
    bit; return the receipt."""
    out = lambda name: tmp_path / f"{name}{base.suffix}"
    receipt: Any = adapterkit.merge(
        base, adapter, out=out("chosen"), choose=entries, data=data, verify=True, **more
    )
    table = receipt.data["choices"]
    written = {}
    for entry in entries:
        place = tmp_path / "base16" if entry == "base16" else out(entry)
        adapterkit.merge(base, adapter, out=place, **options_of(entry, more))
        (row,) = adapterkit.score(place, data=data)["rows"]
        written[entry] = row["loss"], row["perplexity"]
    measured = {row["model"]: (row["loss"], row["perplexity"]) for row in table["rows"]}
    assert measured == written
    losses = [row["loss"]["value"] for row in table["rows"]]
    assert losses == sorted(losses) and table["written"] == table["rows"][0]["model"]
    best = table["written"]
    assert hashes(out("chosen")) == hashes(tmp_path / best if best == "base16" else out(best))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    return receipt.data


def covariances(base: Path, data: Path, out: Path) -> Path:
    adapterkit.stats(base, data=data, out=out)
    return out


# -- each loss is that of the written merge --------------------------------------------------------


@pytest.mark.parametrize("name", few(name for name, form in FORMS.items() if form.writable))
def test_losses_of_all_roundings_are_those_of_the_written_merges(
    name: str, data: Path, tmp_path: Path
):
    base = tmp_path / "base"
    quantized_llama.base(FORMS[name], base)
    oracle.train(quantized_llama.llama(), tmp_path / "a", target_modules=list(LINEAR))
    plain = tmp_path / "plain"
    quantized_llama.llama().save_pretrained(plain)
    stats = covariances(plain, data, tmp_path / "stats.safetensors")
    check_choice(base, tmp_path / "a", data, tmp_path, *ROUNDINGS, stats=stats)


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_losses_of_bfloat16(dtype, llama: Path, lora: Path, data: Path, tmp_path: Path):
    stats = covariances(llama, data, tmp_path / "stats.safetensors")
    receipt = check_choice(llama, lora, data, tmp_path, *ROUNDINGS, stats=stats, dtype=dtype)
    assert receipt["choices"]["data"]["samples"] == 8
    assert not {"choose", "data"} & receipt["call"].keys()
    note = next(note for note in receipt["notes"] if note.startswith(receipt["choices"]["written"]))
    assert ": the least loss of 3, on " in note and "; measured in " in note


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_losses_of_bitsandbytes_and_of_its_16_bit_original(
    to: str, llama: Path, lora: Path, data: Path, tmp_path: Path
):
    base = tmp_path / "base"
    adapterkit.quantize(llama, to=to, out=base)
    ways = ("nearest", "stochastic", "base16")
    check_choice(base, lora, data, tmp_path, *ways, original=llama)


def test_losses_of_decoded_weights(llama: Path, lora: Path, data: Path, tmp_path: Path):
    base = tmp_path / "base"
    adapterkit.quantize(llama, to="nf4", out=base)
    check_choice(base, lora, data, tmp_path, "nearest", "stochastic", dequantize=True)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", ["untie", "fold"])
def test_losses_of_tied_embeddings(side: str, tied: str, data: Path, tmp_path: Path):
    base = tmp_path / "base"
    oracle.save_base(oracle.tied_llama(), base)
    model = oracle.load(oracle.tied_llama, base)
    oracle.train(model, tmp_path / "a", target_modules=[side, "q_proj"])
    check_choice(base, tmp_path / "a", data, tmp_path, "nearest", "stochastic", tied=tied)


def test_losses_of_a_grown_vocabulary(llama: Path, tmp_path: Path):
    model = oracle.load(oracle.llama, llama)
    model.resize_token_embeddings(88)  # type: ignore[attr-defined]
    whole = ["embed_tokens", "lm_head"]
    oracle.train(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=whole)
    rows = ({"input_ids": [5, 80 + n, 3, 87, 20]} for n in range(4))
    data = texts.write_rows(tmp_path / "data.jsonl", *rows)
    check_choice(llama, tmp_path / "a", data, tmp_path, "nearest", "stochastic")


def test_losses_in_the_tokens_of_the_adapters_tokenizer(llama: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    base, adapter = tmp_path / "base", tmp_path / "a"
    oracle.save_base(oracle.llama(), base)
    texts.save_tokenizer(base)
    oracle.train(oracle.load(oracle.llama, llama), adapter, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["he"])
    tokenizer.save_pretrained(adapter)
    data = tmp_path / "data.txt"
    data.write_text("he sat there.\nthe hen\n")
    receipt = check_choice(base, adapter, data, tmp_path, "nearest", "stochastic")
    assert receipt["choices"]["data"]["tokens"] == 14


def test_losses_of_repeated_layers(llama: Path, data: Path, tmp_path: Path):
    how = {"layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_proj"]}
    oracle.train(oracle.load(oracle.llama, llama), tmp_path / "a", **how)
    check_choice(llama, tmp_path / "a", data, tmp_path, "nearest", "stochastic")


@pytest.fixture
def gguf_base(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A GGUF file in one type of blocks, and an adapter of it."""
    from tests.quantized.gguf.test_merges import train
    from tests.support import gguf_files

    def make(kind: str, targets: list[str] | None = None, **how: Any) -> tuple[Path, Path]:
        model, message, tensors = gguf_files.llama(**how)
        number = gguf_files.gguf.GGMLQuantizationType[kind]
        for name, value in tensors.items():
            if value.ndim == 2 and value.shape[-1] % gguf_files.SIZES[number][0] == 0:
                tensors[name] = (number, gguf_files.gguf.quantize(value, number))
        path = gguf_files.write(tmp_path / "base.gguf", "llama", message, tensors)
        train(model, tmp_path / "a", target_modules=targets or ["q_proj", "v_proj", "down_proj"])
        return path, tmp_path / "a"

    return make


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "F16"])
def test_losses_of_types_of_gguf(kind: str, gguf_base, data: Path, tmp_path: Path):
    base, adapter = gguf_base(kind)
    ways = ("nearest", "stochastic", "touched-as=q8_0", "touched-as=q5_0", "touched-as=f32")
    if kind == "F16":
        ways = ("nearest", "stochastic")
    receipt = check_choice(base, adapter, data, tmp_path, *ways)
    assert kind == "F16" or receipt["choices"]["rows"][-1]["model"] != "touched-as=f32"


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_losses_of_tied_embeddings_in_gguf(side: str, gguf_base, data: Path, tmp_path: Path):
    base, adapter = gguf_base("Q8_0", [side, "q_proj"], tie_word_embeddings=True)
    check_choice(base, adapter, data, tmp_path, "nearest", "touched-as=f32")
