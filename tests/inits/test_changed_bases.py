"""Adapters of a base that `init` or `loftq` changed, trained by PEFT or here: they merge into this
base without a word, and every other base is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.runtime import load as load_live
from tests.support import initialized, oracle
from tests.support.input_statistics import linear_modules, save_statistics
from tests.support.inspections import inspect, problems_of

IDS = torch.arange(80).view(4, 20)
BATCH = {"input_ids": IDS, "labels": IDS}
LLAMA, TARGETS = type(oracle.llama()), "q_proj,v_proj"
# block sizes of these formats divide the rows of this model
QUANTIZED = {"pissa to nf4": {"method": "pissa", "quantize": "nf4"}, "loftq": {}}
JOBS = [*initialized.methods(changes_base=True), *QUANTIZED]
WORDS = "has no mark of that change"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    """A base, and statistics of its inputs."""
    folder, model = tmp_path_factory.mktemp("start"), oracle.llama(hidden_size=64)
    stats = save_statistics(
        model, linear_modules(model, TARGETS.split(",")), [BATCH], folder / "stats.safetensors"
    )
    oracle.save_base(model, folder / "original", "fp32")
    return folder / "original", stats


def begin(job: str, start: tuple[Path, Path], out: Path, **options) -> Path:
    """The folder of a changed base and its adapter."""
    base, stats = start
    more = {"rank": 4, "targets": TARGETS, "out": out} | QUANTIZED.get(job, {}) | options
    if job == "loftq":
        adapterkit.loftq(base, **more)
        return out
    method = more.pop("method", job)
    given = {"stats": stats} if initialized.needs_statistics(method) else {}
    adapterkit.init(base, method=method, **given, **more)
    return out


def floats_of(folder: Path) -> Path:
    """The changed base, decoded if it is quantized."""
    if "quantization_config" not in (folder / "base/config.json").read_text():
        return folder / "base"
    if not (out := folder / "floats").exists():
        adapterkit.dequantize(folder / "base", out=out, dtype="fp32")
    return out


def train_with_peft(base: Path, adapter: Path, out: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Save the adapter after one step on `ids`, and return the logits of the trained model."""
    model: Any = initialized.load(LLAMA, base, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(out)
    return logits(model)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def words(base: Path, adapter: Path) -> list[str]:
    """Each warning and note of a merge."""
    plan = adapterkit.merge(base, [adapter], out="planned", dry_run=True)
    return [*plan.warnings, *plan.notes]


@pytest.fixture(scope="module", params=JOBS)
def trained(request, start, tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """The changed base in floats, its adapter after PEFT's training, and their logits."""
    folder = begin(request.param, start, tmp_path_factory.mktemp("trained") / "out")
    base = floats_of(folder)
    return base, folder / "saved", train_with_peft(base, folder / "adapter", folder / "saved")


def test_peft_trained_into_the_original_is_refused(trained, start, tmp_path):
    _, adapter, _ = trained
    with pytest.raises(Refused, match=WORDS) as caught:
        adapterkit.merge(start[0], [adapter], out=tmp_path / "out")
    assert caught.value.code == "AK304" and "--base-is-residual" in caught.value.hint
    assert not (tmp_path / "out").exists()
    [problem] = problems_of(inspect(adapter, base=start[0]))
    assert problem == caught.value.problem


def test_peft_trained_into_its_base_is_silent_and_what_peft_computes(trained, tmp_path):
    base, adapter, expected = trained
    assert words(base, adapter) == [] == problems_of(inspect(adapter, base=base))
    adapterkit.merge(base, [adapter], out=tmp_path / "out")
    merged = logits(initialized.load(LLAMA, tmp_path / "out"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_the_base_of_another_init_is_refused(start, tmp_path):
    """Each option and the seed make another base; the same ones make the same."""
    one = begin("pissa", start, tmp_path / "one") / "adapter"
    assert words(begin("pissa", start, tmp_path / "again") / "base", one) == []
    for name, job, options in [("method", "milora", {}), ("rank", "pissa", {"rank": 3})]:
        other = begin(job, start, tmp_path / name, **options) / "base"
        with pytest.raises(Refused, match=WORDS):
            words(other, one)


def test_a_copy_without_the_mark_needs_an_option(start, tmp_path):
    folder = begin("pissa", start, tmp_path / "out")
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=WORDS):
        words(copy, folder / "adapter")
    adapterkit.merge(copy, [folder / "adapter"], base_is_residual=True, out=tmp_path / "merged")
    adapterkit.merge(folder / "base", [folder / "adapter"], out=tmp_path / "expected")
    expected = load_file(tmp_path / "expected/model.safetensors")
    for key, value in load_file(tmp_path / "merged/model.safetensors").items():
        assert torch.equal(value, expected[key])


def test_a_live_model_warns_of_another_base_and_saves_the_mark(start, tmp_path):
    folder, adapters = begin("pissa", start, tmp_path / "out"), {}
    for name, base in [("right", folder / "base"), ("wrong", start[0])]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            adapters[name] = load_live(initialized.load(LLAMA, base), folder / "adapter")
        texts = [str(one.message) for one in caught if WORDS in str(one.message)]
        assert [str(base) in text for text in texts] == ([True] if name == "wrong" else [])
    adapters["right"].save(tmp_path / "saved")
    assert words(folder / "base", tmp_path / "saved") == []
    with pytest.raises(Refused, match=WORDS):
        words(start[0], tmp_path / "saved")


def test_verbs_keep_the_mark_and_rebase_takes_it_off(start, tmp_path):
    folder = begin("pissa", start, tmp_path / "out")
    adapter = folder / "adapter"
    adapterkit.combine([f"{adapter}=0.5"] * 2, method="linear", out=tmp_path / "combined")
    adapterkit.resize(adapter, rank=2, out=tmp_path / "resized")
    adapterkit.convert(adapter, to="peft", out=tmp_path / "converted")
    for name in ("combined", "resized", "converted"):
        assert words(folder / "base", tmp_path / name) == []
        with pytest.raises(Refused, match=WORDS):
            words(start[0], tmp_path / name)
    plan = adapterkit.rebase(adapter, initial=adapter, out=tmp_path / "plain", dry_run=True)
    assert not any("assumes" in note for note in plan.notes)
    adapterkit.rebase(adapter, initial=adapter, out=tmp_path / "plain")
    assert words(start[0], tmp_path / "plain") == []


def test_adapters_of_different_bases_are_noted(start, tmp_path):
    marked = begin("pissa", start, tmp_path / "pissa") / "adapter"
    adapterkit.init(start[0], method="orthogonal", rank=4, targets=TARGETS, out=tmp_path / "plain")
    both = [marked, tmp_path / "plain/adapter"]
    plan = adapterkit.combine(both, method="linear", out=tmp_path / "out", dry_run=True)
    [note] = [note for note in plan.notes if "different bases" in note]
    assert "init-" in note


def test_rebase_of_loftq_is_refused(start, tmp_path):
    """Its base lost by rounding; the difference of factors does not lead back."""
    adapter = begin("loftq", start, tmp_path / "out") / "adapter"
    with pytest.raises(Refused, match="its base is quantized"):
        adapterkit.rebase(adapter, initial=adapter, out=tmp_path / "plain")


@pytest.mark.parametrize("job", ["pissa", "loftq"])
def test_the_config_names_the_change_and_not_the_original(job, start, tmp_path):
    """PEFT and transformers would load the original by its name."""
    folder = begin(job, start, tmp_path / "out")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    verb = "loftq" if job == "loftq" else "init"
    assert config["revision"].startswith(f"changed-by-{verb}-")
    assert config["base_model_name_or_path"] is None
    train_with_peft(floats_of(folder), folder / "adapter", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert saved["revision"] == config["revision"]
    assert saved["base_model_name_or_path"] == str(floats_of(folder))
