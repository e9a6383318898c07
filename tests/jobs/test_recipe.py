"""Recipes of mergekit: what mergekit writes, and refusals by name."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import adapterkit
from adapterkit.cli import main as cli
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused
from tests.jobs.mergekit.inputs import RECIPES, recipe, sampled, write_inputs

GOLDEN = json.loads(Path(__file__).with_name("mergekit").joinpath("golden.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_inputs(folder)
    return folder


def run(text: str, out: Path, **options) -> dict[str, torch.Tensor]:
    file = out.with_suffix(".yml")
    file.write_text(text)
    adapterkit.run(file, out=out, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_mergekit(name: str, home: Path, tmp_path: Path) -> None:
    """Of methods that draw at density 1: then the draws of both do not matter."""
    ours = run(recipe(name, home), tmp_path / "out")
    base = load_file(home / "base/model.safetensors")
    changed = [key for key in base if not torch.equal(base[key], ours[key].to(base[key]))]
    assert ours.keys() == base.keys() and len(changed) >= 6
    bits = 8 if name == "della" else 21  # written in bfloat16
    for key, numbers in GOLDEN[name].items():
        given = torch.tensor(sampled(ours)[key])
        torch.testing.assert_close(
            given, torch.tensor(numbers), rtol=2.0**-bits, atol=2e-6, msg=f"{key}: {given}"
        )


def test_random_methods_have_mergekits_distribution(home: Path, tmp_path: Path) -> None:
    """dare keeps half of the elements, della more of the larger ones; what stays has one factor,
    which gives the delta its former L1 norm."""
    base = load_file(home / "base/model.safetensors")
    text = "merge_method: {}\nbase_model: {base}\nmodels:\n  - model: {base}+{a}\n    parameters: "
    text += "{{weight: 1, density: 0.5{}}}\n"
    paths = {"base": home / "base", "a": home / "a"}
    plain = text.format("task_arithmetic", "", **paths).replace(", density: 0.5", "")
    whole = run(plain, tmp_path / "whole")
    shares: dict[str, list[tuple[float, float]]] = {}
    for method, more in (("dare_linear", ""), ("della_linear", ", epsilon: 0.3")):
        ours = run(text.format(method, more, **paths), tmp_path / method)
        for key in (key for key in base if "q_proj" in key or "down_proj" in key):
            delta, drawn = ((one[key] - base[key]).double() for one in (whole, ours))
            kept = drawn.abs() > 1e-6
            factors = (drawn / delta)[kept & (delta.abs() > 1e-2)]
            assert float(factors.std() / factors.mean()) < 1e-3
            assert float(drawn.abs().sum() / delta.abs().sum()) == pytest.approx(1, abs=1e-4)
            large = delta.abs() > delta.abs().median(dim=1, keepdim=True).values
            shares.setdefault(method, []).append(
                (float(kept[large].float().mean()), float(kept[~large].float().mean()))
            )
    dare, della = (torch.tensor(shares[name]).mean(0) for name in shares)
    torch.testing.assert_close(dare, torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(della, torch.tensor([0.65, 0.35]), atol=0.06, rtol=0)


TWO = "base_model: {base}\nmodels:\n  - model: {base}+{a}\n  - model: {base}+{b}\n"
WITH = TWO.replace("}+{a}\n", "}+{a}\n    parameters: {{weight: 1}}\n").replace(
    "}+{b}\n", "}+{b}\n    parameters: {{weight: 0.5}}\n"
)
BAD = {
    "unknown method": ("merge_method: tise\n" + WITH, ["merge_method tise", "did you mean 'ties'"]),
    "whole weights": ("merge_method: slerp\n" + WITH, ["works on full weights", "nuslerp"]),
    "stacks": (
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{{model: '{base}+{a}', layer_range: [0, 2]}}]\n"
        "  - sources: [{{model: '{base}+{b}', layer_range: [1, 3]}}]\n",
        ["stacks layers", "several slices"],
    ),
    "some layers": (
        "merge_method: ties\nbase_model: {base}\nslices:\n"
        "  - sources: [{{model: '{base}+{a}', layer_range: [0, 2], parameters: {{weight: 1}}}}]\n",
        ["layer_range [0, 2]", "[0, 3]"],
    ),
    "two bases": (
        "merge_method: linear\nmodels:\n  - model: {base}+{a}\n  - model: {b}+{c}\n", ["2 bases"],
    ),
    "no weight": ("merge_method: ties\n" + TWO, ["weight of", "is missing"]),
    "no parameter of it": (
        "merge_method: ties\nparameters: {{gamma: 0.1, select_topk: 1}}\n" + WITH,
        ["parameter gamma of ties", "parameter select_topk of ties"],
    ),
    "shared ones by layer": (
        "merge_method: ties\nparameters: {{normalize: [true, false]}}\n" + WITH,
        ["normalize: ", "one value for all tensors"],
    ),
    "a word": (
        "merge_method: ties\n" + WITH.replace("0.5", "much"), ["weight of", "'much'"],
    ),
    "tokenizers": (
        "merge_method: ties\ntokenizer_source: union\nchat_template: chatml\n" + WITH,
        ["tokenizer_source union", "chat_template"],
    ),
    "a dtype": ("merge_method: ties\ndtype: int8\n" + WITH, ["dtype int8", "bfloat16"]),
    "a key": ("merge_method: ties\nlora_rank: 3\n" + WITH, ["lora_rank is unknown"]),
    "a base that is scaled": (
        "merge_method: linear\nparameters: {{normalize: false}}\n"
        + WITH.replace("base_model: {base}\n", ""),
        ["add up to 1.5", "the base itself is scaled"],
    ),
    "other modules": (
        "merge_method: nuslerp\n" + WITH.replace("{b}", "{c}"), ["only some of the adapters have"],
    ),
    "three on an arc": (
        "merge_method: nuslerp\n" + WITH + "  - model: {base}+{c}\n", ["3 adapters"],
    ),
    "the same twice": ("merge_method: ties\n" + WITH.replace("{b}", "{a}"), ["twice"]),
    "a full model": (
        "merge_method: ties\n" + WITH.replace("{base}+{b}", "{full}"), ["adapter"],
    ),
    "no table": ("- merge_method\n", ["a YAML list"]),
    "an alias": ("merge_method: &m ties\nbase_model: *m\n", ["an alias"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_unsupported_recipes_are_refused(case: str, home: Path, tmp_path: Path) -> None:
    text, said = BAD[case]
    paths = {one: home / one for one in ("base", "a", "b", "c")} | {"full": f"{home}/./base"}
    with pytest.raises((AdapterkitError, MultipleErrors)) as error:
        run(text.format(**paths) if "{" in text else text, tmp_path / "out")
    assert [word for word in said if word not in str(error.value)] == []
    assert not (tmp_path / "out").exists()


def test_missing_and_wrong_options_are_refused(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("gradients", home))
    with pytest.raises(Refused, match="no --out"):
        adapterkit.run(file)
    with pytest.raises(Refused, match="--worker does not apply to a recipe"):
        adapterkit.run(file, out=tmp_path / "out", worker="0/2")
    with pytest.raises(Refused, match="no such file"):
        adapterkit.run(tmp_path / "none.yml", out=tmp_path / "out")
    result = CliRunner().invoke(cli, ["run", str(file), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert receipt["recipe"]["options"]["method"] == "gta"
    assert receipt["call"]["verb" if "verb" in receipt["call"] else "method"]
    adapterkit.verify(tmp_path / "out", base=home / "base", adapters=[home / "a", home / "b"])
    planned = CliRunner().invoke(cli, ["run", str(file), "--out", str(tmp_path / "o"), "--dry-run"])
    assert planned.exit_code == 0 and not (tmp_path / "o").exists()
    toml = CliRunner().invoke(cli, ["run", "steps.toml", "--out", "out"])
    assert toml.exit_code == 2 and "--out does not apply to a pipeline" in toml.stderr


def test_an_input_may_be_the_adapter_alone(home: Path, tmp_path: Path) -> None:
    text = recipe("ties", home)
    ours = run(text, tmp_path / "one")
    other = run(text.replace(f"{home / 'base'}+", ""), tmp_path / "two")
    assert all(torch.equal(ours[key], other[key]) for key in ours)
