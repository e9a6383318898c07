"""merge --choose: each way is measured as it would be written, and the best one is published."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle, quantized_llama, texts
from tests.support.forks import command
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
    base: Path, adapter: Any, data: Path, tmp_path: Path, *entries: str, **more: Any
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


def test_losses_of_a_method_for_two_adapters(
    llama: Path, lora: Path, other_lora: Path, data: Path, tmp_path: Path
):
    base = tmp_path / "base"
    adapterkit.quantize(llama, to="nf4", out=base)
    how = {"method": "dare_linear", "density": 0.5, "seed": 3}
    two: Any = [(lora, 0.7), other_lora]
    check_choice(base, two, data, tmp_path, "nearest", "stochastic", **how)


# -- what is written, printed and kept -------------------------------------------------------------


def test_a_dry_run_names_the_ways_and_measures_nothing(llama: Path, lora: Path, data: Path):
    words = ["--choose", "nearest,stochastic", "--data", data, "--out", "out", "--dry-run"]
    done = command("merge", llama, lora, *words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "note: the figures are those of nearest; the run measures nearest (" in done.stdout
    assert "), and writes the best\n" in done.stdout
    document = json.loads(command("merge", llama, lora, *words, "--json").stdout)
    plain = json.loads(command("merge", llama, lora, *words[4:], "--json").stdout)
    assert document.pop("notes") and plain.pop("notes") == [] and document == plain


def test_a_dry_run_loads_no_torch(llama: Path, lora: Path, data: Path, tmp_path: Path):
    ways = f"choose='nearest,stochastic', data={str(data)!r}, out={str(tmp_path / 'out')!r}"
    call = f"adapterkit.merge({str(llama)!r}, {str(lora)!r}, {ways}, dry_run=True)"
    script = f"import sys, adapterkit; {call}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_table_is_printed_and_in_the_report(
    llama: Path, lora: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "out"
    words = ["--choose", "nearest,stochastic", "--data", data, "--out", out]
    done = command("merge", llama, lora, *words)
    assert done.returncode == 0, done.stderr
    choices = json.loads((out / "adapterkit.json").read_text())["choices"]
    best, other = choices["rows"]
    assert re.search(rf"^{best['model']} +{best['loss']['value']:.4f}  ± ", done.stderr, re.M)
    more = f"{other['more']['value']:+.4f}, within noise"
    assert re.search(rf"^{other['model']} .* {re.escape(more)}$", done.stderr, re.M)
    assert f"note: {best['model']}: the least loss of 2, on " in done.stderr
    assert f"; {other['model']} within noise; measured in " in done.stderr
    page = tmp_path / "report.html"
    done = command("report", lora, "--result", out, "--out", page)
    assert done.returncode == 0, done.stderr
    assert "the ways that were measured" in page.read_text("utf-8")
    assert command("rerun", out, "--inputs", llama, "--inputs", lora).returncode == 0
    assert command("verify", out, "--base", llama, "--adapter", lora).returncode == 0


@pytest.fixture
def without_measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a model runs")

    monkeypatch.setattr("adapterkit.verbs.score.job.run", refused)
    yield


def test_a_resumed_choice_measures_nothing_again(
    llama: Path, lora: Path, data: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    def stopped(done: int) -> None:
        if done > 1:  # a layer of a sample is 1, and bytes are more
            raise KeyboardInterrupt

    how: dict[str, Any] = {"choose": "nearest,stochastic", "data": data, "out": tmp_path / "out"}
    with pytest.raises(AdapterkitError, match="run the same command with --resume"):
        adapterkit.merge(llama, lora, **how, progress=stopped)
    assert not (tmp_path / "out").exists()
    request.getfixturevalue("without_measuring")
    with pytest.raises(AdapterkitError, match="nothing measured|resume"):
        adapterkit.merge(llama, lora, **how)
    receipt = adapterkit.merge(llama, lora, **how, resume=True)
    assert len(receipt.data["choices"]["rows"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out"}


def test_a_resumed_choice_with_another_seed_measures_again(
    llama: Path, lora: Path, data: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """What is kept is of the very same edits."""

    def stopped(done: int) -> None:
        if done > 1:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"choose": "nearest,stochastic", "data": data, "out": tmp_path / "out"}
    with pytest.raises(AdapterkitError, match="--resume"):
        adapterkit.merge(llama, lora, **how, progress=stopped)
    request.getfixturevalue("without_measuring")
    shutil.rmtree(tmp_path / ".out.adapterkit")
    with pytest.raises(AssertionError, match="a model runs"):
        adapterkit.merge(llama, lora, **how, seed=1, resume=True)


@pytest.mark.usefixtures("without_measuring")
def test_an_output_in_the_way_is_refused_before_measuring(
    llama: Path, lora: Path, data: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(Refused, match="the output folder holds mine"):
        adapterkit.merge(llama, lora, choose="nearest,stochastic", data=data, out=tmp_path / "out")


# -- refusals --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown words": (
        {"choose": "nearst, touched-as=q8"},
        [
            "--choose 'nearst'\n",
            "did you mean 'nearest'?",
            "--choose 'touched-as=q8'\n",
            "did you mean 'touched-as=q8_0'?",
        ],
    ),
    "one entry": ({"choose": ["nearest", "nearest"]}, ["--choose: one entry", "two or more"]),
    "an empty list": ({"choose": ","}, ["--choose ''"]),
    "without data": ({"data": ()}, ["--choose is given without --data"]),
    "data alone": ({"choose": ()}, ["--data is given without --choose"]),
    "with rounding": ({"rounding": "stochastic"}, ["--choose and --rounding are given"]),
    "with a type": ({"changed_type": "q8_0"}, ["--choose and --changed-type are given"]),
    "needs of entries": (
        {"choose": "nearest,compensated,base16,touched-as=q8_0"},
        [
            "--choose compensated: --rounding compensated needs --stats",
            "adapterkit stats ",
            "--choose base16 needs --original",
            "--choose touched-as=q8_0: --changed-type with this base",
        ],
    ),
    "unused sources": (
        {"stats": "stats.safetensors", "original": "model"},
        [
            "--stats is given, and --choose has no compensated",
            "--original is given, and --choose has no base16",
        ],
    ),
    "fail below": (
        {"choose": "nearest,compensated", "stats": "s", "fail_below": 0.5},
        ["--choose compensated: --fail-below and --rounding compensated are given"],
    ),
    "peft": (
        {"compat": "peft"},
        ["--choose stochastic: --compat is given without --rounding nearest"],
    ),
    "no such data": ({"data": "absent.jsonl"}, ["absent.jsonl: no such file"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_choices_that_cannot_be_are_refused_together(
    name: str, llama: Path, lora: Path, data: Path, tmp_path: Path
):
    given, expected = REFUSED[name]
    how = {"choose": "nearest,stochastic", "data": data, "out": tmp_path / "out"} | given
    with pytest.raises(Refused) as refused:
        adapterkit.merge(llama, lora, **how)
    text = str(refused.value)
    assert [part for part in expected if part not in text] == [], text
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_problem_of_all_ways_is_named_once(llama: Path, data: Path, tmp_path: Path):
    adapter = tmp_path / "a"
    oracle.train(oracle.llama(hidden_size=64), adapter, target_modules=["q_proj"])
    how: dict[str, Any] = {"choose": "nearest,stochastic", "data": data}
    texts_of = []
    for options in (how, {}):
        with pytest.raises(Refused) as refused:
            adapterkit.merge(llama, adapter, out=tmp_path / "out", **options)
        texts_of.append(str(refused.value))
    assert texts_of[0] == texts_of[1]


def test_a_pipeline_and_an_image_model_are_refused(lora: Path, data: Path, tmp_path: Path):
    from tests.support import one_file

    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    family = next(iter(one_file.FAMILIES))
    image = one_file.write_family(family, tmp_path / "image.safetensors")
    for base in (tmp_path / "pipeline", image):
        with pytest.raises(Refused, match="--choose with this base\n.*a model of texts"):
            adapterkit.merge(
                base, lora, choose="nearest,stochastic", data=data, out=tmp_path / "out"
            )


def test_files_of_calls_hold_no_choice(llama: Path, lora: Path, data: Path, tmp_path: Path):
    words = ["--choose", "nearest,stochastic", "--data", data, "--out", tmp_path / "out"]
    done = command("merge", llama, lora, *words, "--plan", tmp_path / "plan.json")
    assert done.returncode == 1 and "--choose is given with --plan" in done.stderr
    steps = tmp_path / "steps.toml"
    arguments = f'base = "{llama}"\nadapters = ["{lora}"]\nout = "{tmp_path / "out"}"\n'
    steps.write_text(f'[[step]]\nverb = "merge"\n{arguments}choose = "nearest,stochastic"\n')
    done = command("run", steps)
    assert done.returncode and "choose is unknown" in done.stderr, done.stderr


# -- a real model ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_losses_of_a_real_model_in_nf4(tmp_path: Path):
    """SmolLM2-135M with an adapter of German texts: rounding to nearest loses it, the other ways
    keep most of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import languages
    import realmodel

    original = realmodel.smollm2()
    lines = languages.messages()["german"]
    held_out = texts.write_rows(tmp_path / "data.jsonl", *({"text": t} for t in lines[:96:4]))
    training = [line for number, line in enumerate(lines) if number % 4]
    tokens = languages.blocks(AutoTokenizer.from_pretrained(original), training)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    languages.train(model, {"german": tokens}, tmp_path)
    base = tmp_path / "nf4"
    adapterkit.quantize(original, to="nf4", double_quant=True, out=base)
    sample = texts.write_rows(tmp_path / "sample.jsonl", *({"text": t} for t in training[:40]))
    stats = covariances(original, sample, tmp_path / "stats.safetensors")
    more: dict[str, Any] = {"stats": stats, "original": original}
    ways = (*ROUNDINGS, "base16")
    receipt = check_choice(base, tmp_path / "german", held_out, tmp_path, *ways, **more)
    losses = {row["model"]: row["loss"]["value"] for row in receipt["choices"]["rows"]}
    (without,) = adapterkit.score(base, data=held_out)["rows"]
    assert losses["nearest"] > without["loss"]["value"] - 0.1
    assert max(losses["stochastic"], losses["compensated"]) < losses["nearest"] - 0.3
    assert receipt["choices"]["written"] == "base16"
