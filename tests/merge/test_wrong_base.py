"""A base that is another model's: a few lines where it has other modules, a note where shapes fit,
by the fingerprint in the adapter's file or else by the name."""

import shutil
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import LoraConfig, merge
from adapterkit.core.checkpoint.fingerprint import METADATA, UNKNOWN, difference, fingerprint
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Damaged, MultipleErrors
from adapterkit.runtime import attach, load
from tests.support import oracle
from tests.support.inspections import inspect, problems_of
from tests.support.quantized_llama import change

MODEL, WEIGHTS = "model.safetensors", "adapter_model.safetensors"
VALUES = "made for a base with other values than"
QUERIES = "model.layers.1.self_attn.q_proj.weight"
NEW: dict[str, Any] = {"method": "orthogonal", "rank": 2, "targets": "q_proj,v_proj"}
PISSA: dict[str, Any] = {**NEW, "method": "pissa"}


def test_a_wrong_base_is_a_few_lines(llama, lora, cached_folder, tmp_path):
    other = cached_folder(
        "gpt2-base", lambda folder: oracle.save_base(oracle.gpt2(), folder, "bf16")
    )
    with pytest.raises(MultipleErrors) as caught:
        merge(other, [lora], out=tmp_path / "out")
    modules = len(oracle.LINEAR) * 2
    assert len(caught.value.errors) == modules
    text = str(caught.value)
    assert (
        len(text.splitlines()) <= 7
        and f"{modules} keys do not fit the base" in text
        and text.count("the base has no") == 3
    )


def of_base(folder) -> str:
    return fingerprint(open_checkpoint(LocalFolder(folder)))


def of_adapter(folder) -> Any:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata().get(METADATA)


@pytest.fixture
def made(llama, cached_folder):
    """A trained adapter in whose file the fingerprint of `llama` is, and another base in its
    config."""

    def build(folder):
        adapterkit.init(llama, out=folder / "init", **NEW)
        oracle.edit_config(folder / "init/adapter", folder / "a", base_model_name_or_path="org/x")
        tensors = load_file(folder / "a" / WEIGHTS)
        trained = {key: value + 0.1 for key, value in tensors.items()}
        save_file(trained, folder / "a" / WEIGHTS, {METADATA: of_base(llama)})

    return cached_folder("with-fingerprint", build) / "a"


def changed(base, out, **tensors):
    shutil.copytree(base, out)
    change(out, tensors)
    return out


def notes(base, adapter) -> list[str]:
    plan = merge(base, [adapter], out="planned", dry_run=True)
    texts = [*(f"warning: {text}" for text in plan.warnings), *plan.notes]
    return [text for text in texts if "made for" in text or "trained on" in text]


def test_a_base_is_known_by_any_name_and_in_any_shards(llama, made, tmp_path):
    copy = shutil.copytree(llama, tmp_path / "copy")
    oracle.save_base(oracle.load(oracle.llama, llama), tmp_path / "x", "bf16", max_shard_size="9KB")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 2
    assert of_base(copy) == of_base(tmp_path / "x") == of_base(llama) == of_adapter(made)
    assert notes(copy, made) == notes(tmp_path / "x", made) == []
    assert problems_of(inspect(made, base=copy)) == []


@pytest.mark.parametrize("where", ["one matrix", "a merge"])
def test_other_values_are_a_warning(where, llama, lora, made, tmp_path):
    if where == "a merge":
        merge(llama, [lora], out=tmp_path / "other")
    else:
        value = load_file(llama / MODEL)[QUERIES]
        changed(llama, tmp_path / "other", **{QUERIES: value * 1.01})
    [note] = notes(tmp_path / "other", made)
    assert note.startswith("warning: ") and f"{VALUES} other" in note and of_adapter(made) in note
    [problem] = problems_of(inspect(made, base=tmp_path / "other"))
    assert problem == note.removeprefix("warning: ")
    merge(llama, [made], out=tmp_path / "merged")
    with pytest.raises(Damaged) as caught:
        adapterkit.verify(tmp_path / "merged", base=tmp_path / "other", adapters=made)
    assert caught.value.hint == f"{problem}: give the base of the merge"


def test_a_base_in_another_dtype_is_noted(llama, made, tmp_path):
    """Its values are not compared: they are rounded otherwise."""
    halves = {key: value.half() for key, value in load_file(llama / MODEL).items()}
    half = changed(llama, tmp_path / "half", **halves)
    named = f"a was trained on org/x; the base here is {half.name}"
    assert notes(half, made) == ["a was made for a base with other dtypes of tensors", named]
    more = changed(llama, tmp_path / "more", **{"model.inv_freq": torch.ones(4)})
    assert notes(more, made)[0] == "a was made for a base with other names or shapes of tensors"
    assert problems_of(inspect(made, base=half)) == []


@pytest.mark.parametrize("text", ["", "2:" + "0" * 50, "1:x", "1" + ":0000000000000000" * 4])
def test_an_invalid_fingerprint_is_ignored(text, llama, made, tmp_path):
    shutil.copytree(made, tmp_path / "a")
    save_file(load_file(made / WEIGHTS), tmp_path / "a" / WEIGHTS, {METADATA: text})
    assert notes(llama, tmp_path / "a") == ["a was trained on org/x; the base here is llama"]


def test_verbs_keep_what_all_of_their_inputs_say(llama, lora, made, tmp_path):
    other = shutil.copytree(made, tmp_path / "other")
    text = of_base(merge(llama, [lora], out=tmp_path / "merged").out)
    save_file(load_file(made / WEIGHTS), other / WEIGHTS, {METADATA: text})
    for name, job in {
        "same": lambda out: adapterkit.combine([made, made], method="linear", out=out),
        "resized": lambda out: adapterkit.resize(made, rank=1, out=out),
        "subtracted": lambda out: adapterkit.subtract([made], general=[made], out=out),
        "converted": lambda out: adapterkit.convert(made, to="peft", out=out),
    }.items():
        job(tmp_path / name)
        assert of_adapter(tmp_path / name) == of_adapter(made), name
    for number, second in enumerate([other, lora]):
        out = tmp_path / f"mixed{number}"
        adapterkit.combine([made, second], method="linear", rank=2, out=out)
        assert of_adapter(out) is None


def test_adapters_made_with_a_base_have_its_fingerprint(llama, lora, tmp_path):
    """Of a base that is written beside the adapter what is known before: the headers."""
    merge(llama, [lora], out=tmp_path / "tuned")
    adapterkit.extract(llama, tmp_path / "tuned", rank=2, out=tmp_path / "extracted")
    adapterkit.quantize(llama, to="nf4", out=tmp_path / "nf4")
    adapterkit.loftq(llama, quantized_base=tmp_path / "nf4", rank=2, out=tmp_path / "kept")
    adapterkit.init(llama, out=tmp_path / "implicit", residual="implicit", **PISSA)
    for name, base in [("extracted", llama), ("kept", tmp_path / "nf4"), ("implicit", llama)]:
        folder = tmp_path / name / "adapter" if name == "implicit" else tmp_path / name
        assert of_adapter(folder) == of_base(base), name
    adapterkit.init(llama, out=tmp_path / "pissa", **PISSA)
    adapterkit.init(llama, out=tmp_path / "qpissa", quantize="nf4", **PISSA)
    adapterkit.loftq(llama, rank=2, out=tmp_path / "loftq")
    for name in ("pissa", "qpissa", "loftq"):
        text = of_adapter(tmp_path / name / "adapter")
        assert (
            text.endswith(UNKNOWN) and difference(text, of_base(tmp_path / name / "base")) is None
        )


def test_rebase_to_the_original_keeps_that_of_the_original_alone(llama, tmp_path):
    for residual, expected in (("write", None), ("implicit", of_base(llama))):
        out = tmp_path / residual
        adapterkit.init(llama, out=out, residual=residual, **PISSA)
        adapterkit.rebase(out / "adapter", initial=out / "adapter", out=out / "rebased")
        assert of_adapter(out / "rebased") == expected


def test_peft_and_live_models(llama, made, tmp_path):
    """PEFT loads the file without a word; a live model's adapters have and keep the fingerprint."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = oracle.load(oracle.llama, llama)
        peft.PeftModel.from_pretrained(model, made)
        model = transformers.LlamaForCausalLM.from_pretrained(llama, dtype="auto")
        adapters = attach(model, LoraConfig(2, 2, ["q_proj"]), name="new")
        adapters.load(made, name="made")
    for name in ("new", "made"):
        adapters.save(tmp_path / name, name=name)
        assert of_adapter(tmp_path / name) == of_base(llama)
        header = (tmp_path / name / WEIGHTS).read_bytes()[8:]
        assert header.startswith(b'{"__metadata__":{"format":"pt","adapterkit_base":"1:')
    value = load_file(llama / MODEL)[QUERIES]
    other = changed(llama, tmp_path / "other", **{QUERIES: value * 1.01})
    model = transformers.LlamaForCausalLM.from_pretrained(other, dtype="auto")
    with pytest.warns(UserWarning, match=VALUES):
        adapters = load(model, made, name="made")
    adapters.save(tmp_path / "again", name="made")
    assert of_adapter(tmp_path / "again") == of_base(llama)
