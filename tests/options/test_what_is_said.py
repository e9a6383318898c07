"""Notes and refusals that name what the matter is, once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

import adapterkit
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused, did_you_mean
from tests.support import oracle
from tests.support.forks import command
from tests.support.texts import save_tokenizer, write_rows

GOLDEN = Path(__file__).parents[1] / "formats" / "golden" / "peft"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    oracle.save_base(oracle.llama(), folder / "base", "fp32")
    for seed, name in enumerate("ab"):
        oracle.train(oracle.llama(), folder / name, seed=seed, target_modules=["q_proj", "v_proj"])
    return folder


def weights(folder, name, modules=None, default=(0, 0)):
    table = {"schema": 1, "adapters": ["a", "b"], "default": [*default], "per": "module"}
    path = folder / name
    path.write_text(json.dumps(table | {"modules": modules or {}}))
    return path


def test_dropped_parameters_are_one_note(folder, tmp_path):
    tuned = oracle.llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    oracle.save_base(tuned, tmp_path / "tuned", "fp32")
    plan = adapterkit.extract(
        folder / "base", tmp_path / "tuned", rest="drop", rank=2, out="x", dry_run=True
    )
    notes = [note for note in plan.notes if "--rest drop" in note]
    assert len(notes) == 1 and notes[0].startswith("6 parameters that differ are dropped")
    assert notes[0].endswith("and 3 more") and len(plan.decisions["left_out"]) == 6


def test_weights_of_zero_are_refused_or_noted(folder, tmp_path):
    base, adapters = folder / "base", [folder / "a", folder / "b"]
    with pytest.raises(Refused, match="nothing to merge: every weight is 0"):
        adapterkit.merge(base, adapters, weights=weights(folder, "zero.json"), out=tmp_path / "m")
    with pytest.raises(Refused, match="no module is selected"):
        adapterkit.merge(base, adapters, exclude=".*", out=tmp_path / "m")


def test_a_name_is_not_suggested_for_itself(tmp_path, monkeypatch):
    """A link that leads nowhere is there, and says where it leads."""
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", "dangling")
    with pytest.raises(Refused) as error:
        adapterkit.inspect("dangling")
    assert error.value.hint == "it is a link to nowhere, which is not there"
    assert did_you_mean(["dangling"], ["dangling", "dangler"]) == "did you mean 'dangler'?"
    assert did_you_mean(["dangling"], ["dangling"]) == ""


def test_an_adapter_given_twice_is_noted(folder, tmp_path):
    """By another path, too; weights add up, and other adapters are none."""
    one, other = folder / "a", folder / "b" / ".." / "a"
    for made in (
        lambda adapters, out: adapterkit.merge(folder / "base", adapters, out=out, dry_run=True),
        lambda adapters, out: adapterkit.combine(adapters, out=out, dry_run=True),
    ):
        notes = made([one, other, folder / "b"], tmp_path / "x").notes
        assert [note for note in notes if "given 2 times: its weights add up" in note]
        assert not [note for note in made([one, folder / "b"], tmp_path / "x").notes
                    if "add up" in note]  # fmt: skip


def test_files_of_one_folder_are_no_copies(folder, tmp_path):
    files = [tmp_path / f"{name}.gguf" for name in "ab"]
    for file in files:
        adapterkit.convert(folder / file.stem, to="gguf", base=folder / "base", out=file)
    notes = adapterkit.merge(folder / "base", files, out=tmp_path / "x", dry_run=True).notes
    assert not [note for note in notes if "add up" in note]


def test_a_part_of_a_format_without_parts(folder, tmp_path):
    with pytest.raises(Refused) as error:
        adapterkit.convert(
            folder / "a", to="training-state", component="transformer", out=tmp_path / "x"
        )
    assert error.value.expected.startswith("modules of no component, which ")
    assert "leave out --component" in error.value.hint


def test_steps_in_yaml_are_a_pipeline_of_toml(tmp_path):
    steps = tmp_path / "steps.yaml"
    steps.write_text("step:\n- verb: merge\n")
    done = command("run", steps)
    assert done.returncode and "[[step]] of a .toml file" in done.stderr, done.stderr


def test_a_file_of_weights_that_names_experts_asks_for_the_base(tmp_path):
    """Without it the factors of a module's parameters are the module's."""
    adapters = [tmp_path / "a", tmp_path / "b"]
    for adapter in adapters:
        shutil.copytree(GOLDEN / "qwen3_moe", adapter)
    file = weights(tmp_path, "w.json", {f"{EXPERTS}.down_proj": [1, 0]}, (1, 1))
    with pytest.raises(AdapterkitError) as error:
        adapterkit.combine(adapters, weights=file, out=tmp_path / "x")
    assert "give --base" in str(error.value) and "did you mean" not in str(error.value)
    base = GOLDEN / "qwen3_moe" / "base"
    adapterkit.combine(adapters, base=base, weights=file, out=tmp_path / "x")


def test_statistics_of_layers_that_take_no_factors(tmp_path):
    """Their inputs are seen where the code calls them: Mamba's x_proj, which PEFT passes by."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2,
                         time_step_rank=4)  # fmt: skip
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    data = write_rows(tmp_path / "d.jsonl", {"text": "who is that?"}, {"text": "me too"})
    out = tmp_path / "s.safetensors"
    adapterkit.stats(tmp_path / "base", data=data, targets="x_proj", out=out)
    with safe_open(out, "pt") as file:
        names = [f"backbone.layers.{n}.mixer.x_proj.covariance" for n in range(2)]
        assert sorted(file.keys()) == names
    out = tmp_path / "t.safetensors"
    with pytest.raises(AdapterkitError, match="dt_proj is read by .*, and not called"):
        adapterkit.stats(
            tmp_path / "base", data=data, targets="dt_proj", out=tmp_path / "t.safetensors"
        )


LOUD = """
import sys, warnings, logging
from adapterkit import cli
def main(**_):
    import torch
    warnings.warn("of a library")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("of a library")
    print("ours", file=sys.stderr)
cli.main = main
cli.process()
"""


def test_libraries_do_not_warn_before_our_lines(folder, tmp_path):
    """Warnings and logs of torch and of libraries without handlers; extract imports torchao where
    it is installed."""
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "ours\n", done.stderr
    done = command(
        "extract", folder / "base", folder / "base", "--rank", 2, "--out", tmp_path / "x"
    )
    assert done.returncode == 1 and done.stderr.startswith("Error: "), done.stderr


def test_all_bad_paths_of_a_command_are_listed(folder):
    with pytest.raises(MultipleErrors) as error:
        adapterkit.merge("bsae", ["lroa=0.5", folder / "a", "none"], out="x")
    text = str(error.value)
    assert all(f"no such path: {name}" in text for name in ("bsae", "lroa", "none")), text
    assert [one.code for one in error.value.errors] == ["AK201"] * 3


@pytest.fixture
def odd(folder, tmp_path):
    """Copies of an adapter, each with one mistake of its files."""
    for name in ("lfs", "pickle", "prompt", "config"):
        shutil.copytree(folder / "a", tmp_path / name)
    (tmp_path / "lfs" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha")
    (tmp_path / "pickle" / WEIGHTS).unlink()
    torch.save(load_file(folder / "a" / WEIGHTS), tmp_path / "pickle" / "adapter_model.bin")
    (tmp_path / "prompt" / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    (tmp_path / "config" / CONFIG).unlink()
    return tmp_path


OF_FILES = {
    "lfs": ("this is a Git LFS pointer, not the weights", "run `git lfs pull`"),
    "pickle": (
        "no adapter_model.safetensors, but adapter_model.bin, a pickle",
        "adapterkit convert {} --to peft --allow-pickle --out converted",
    ),
    "prompt": ("it changes no weights and cannot be merged", "use it with PEFT"),
    "config": ("no adapter_config.json", "copy adapter_config.json there"),
}


@pytest.mark.parametrize("name", OF_FILES)
def test_a_mistake_of_an_adapters_files_has_its_remedy(folder, odd, name):
    problem, remedy = OF_FILES[name]
    with pytest.raises(AdapterkitError) as error:
        adapterkit.merge(folder / "base", odd / name, out=odd / "out")
    assert problem in error.value.problem and remedy.format(odd / name) in error.value.hint


def test_the_printed_command_converts_a_pickle(odd, monkeypatch):
    monkeypatch.chdir(odd)
    with pytest.raises(AdapterkitError) as error:
        adapterkit.resize("pickle", rank=1, out="x")
    assert error.value.code == "AK205"
    words = error.value.hint.splitlines()[1].split()
    assert command(*words[1:], cwd=odd).returncode == 0
    adapterkit.resize("converted", rank=1, out="x")


OF_OPTIONS = {
    ("check", "a", "--for", "vlm"): ("--for 'vlm'", "vllm, vllm-omni", "'vllm'"),
    ("combine", "a", "b", "--method", "ties", "--out", "x"): (
        "ties needs --density", "the share of elements to keep, 0 to 1", "--density 0.2",
    ),
    ("combine", "a", "b", "--method", "linear", "--density", "0.2", "--out", "x"): (
        "linear does not read --density", "della, gta, knots, ", "remove it, or give one of these",
    ),
    ("merge", "base", "a", "--method", "mean", "--majority", "total", "--out", "x"): (
        "mean does not read --majority", " or ties", "remove it, or give one of these",
    ),
    ("combine", "a", "b", "--method", "ties", "--density", "2", "--out", "x"): (
        "--density 2", "a share, 0 to 1", "for example 0.2",
    ),
    ("resize", "a", "--rank", "0", "--out", "x"): ("--rank 0", "1 to", "for example 8"),
    ("combine", "a", "b", "--method", "tie", "--out", "x"): (
        "--method 'tie'", "ties, ties_svd, dare_ties or one of", "did you mean 'ties'?",
    ),
    ("explain", "AK999"): ("no code AK999", "AK101 to AK910", "\n  adapterkit explain"),
    ("merge", "base", "a", "--device", "cuda:9", "--out", "x"): (
        "'cuda:9'; torch finds", "cpu, cuda or cuda:i", "use cpu, or ",
    ),
    ("convert", "a", "--to", "kohya", "--out", "x"): (
        "kohya sd-scripts is for image models", "an image model", "--to peft, vllm, mlx or gguf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", OF_OPTIONS, ids=" ".join)
def test_a_wrong_option_has_values_that_work(folder, words):
    done = command(*words, cwd=folder)
    problem, expected, hint = OF_OPTIONS[words]
    first, second, third = done.stderr.split("\n  ", 2)
    # an adapter for which the format is not, and a machine without that GPU
    status = 1 if words[0] == "convert" or "cuda:9" in words else 2
    assert done.returncode == status and first.startswith("Error: "), done.stderr
    assert problem in first and expected in second and hint in f"\n  {third}", done.stderr


def test_an_empty_recipe_is_called_empty(tmp_path):
    (tmp_path / "empty.yml").write_text("merge_method: linear\nmodels: []\n")
    done = command("run", "empty.yml", "--out", "x", cwd=tmp_path)
    assert done.stderr.startswith("Error: empty.yml: models is empty [AK113]"), done.stderr


def test_a_rank_that_changes_nothing_is_noted(folder, tmp_path):
    notes = lambda rank: (
        adapterkit.resize(folder / "a", rank=rank, out=tmp_path, dry_run=True).notes
    )
    largest = json.loads((folder / "a" / CONFIG).read_text())["r"]
    assert f"--rank 99 lowers no rank: the largest is {largest} already" in notes(99)
    assert not any("lowers no rank" in note for note in notes(largest - 1))


def test_a_rank_that_is_too_large_is_noted(folder, tmp_path):
    how: Any = {"out": tmp_path / "x", "dry_run": True}
    both, base = [folder / "a", folder / "b"], folder / "base"
    most = sum(json.loads((one / CONFIG).read_text())["r"] for one in both)
    said = lambda plan: [note for note in plan.notes if note.startswith("--rank")]
    combined = adapterkit.combine(both, method="linear", rank=99, **how)
    (note,) = said(combined)
    assert note.startswith("--rank 99 is too large for all ") and f": {most} at most is" in note
    assert not said(adapterkit.combine(both, method="linear", rank=most, **how))
    adapterkit.merge(base, both, out=tmp_path / "tuned")
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    (note,) = said(adapterkit.extract(base, tmp_path / "tuned", rank=width + 1, **how))
    assert f"--rank {width + 1} is too large for" in note and f": {width} at most is" in note
    assert not said(adapterkit.extract(base, tmp_path / "tuned", rank=1, **how))


def test_models_of_two_sizes_are_three_examples_and_a_count(folder, tmp_path):
    oracle.save_base(oracle.llama(hidden_size=64), tmp_path / "wide", "fp32")
    with pytest.raises(AdapterkitError) as error:
        adapterkit.extract(folder / "base", tmp_path / "wide", rank=2, out=tmp_path / "x")
    first, *examples, rest, _, _ = str(error.value).splitlines()
    count = int(first.removeprefix("wide: ").partition(" ")[0])
    assert first == f"wide: {count} weights do not match" and len(examples) == 3
    assert rest == f"  ... and {count - 3} more"
