"""extract: the adapter between two checkpoints, merged back or laid on the base by PEFT."""

import json
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from shared import truncated

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import Refused

BUILDS = {"llama": oracle.llama, "gpt2": oracle.gpt2, "bert": oracle.bert, "vit": oracle.vit, "t5": oracle.t5, "neox": oracle.neox}
MODEL = "adapter_model.safetensors"
NOT_LINEAR = ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def saved(made):
    """The tiny model of that name as a base."""

    def make(name: str, dtype: str = "fp32") -> Path:
        return made(f"extract-{name}-{dtype}", lambda folder: oracle.save_base(BUILDS[name](), folder, dtype))

    return make


def tuned(base: Path, build, out: Path, change, **saving) -> Path:
    """A copy of the base whose parameters went through `change(name, tensor)`."""
    model = oracle.load(build, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter.detach().clone()))
    with oracle.quiet():
        model.save_pretrained(out, **saving)
    return out


def low_rank(rank: int, where=lambda name, t: t.dim() == 2 and "embed" not in name):
    """A change of that rank on every matrix that is no embedding."""
    generator = torch.Generator().manual_seed(7)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not where(name, tensor):
            return tensor
        left, right = (torch.randn(*shape, generator=generator) for shape in ((tensor.shape[0], rank), (rank, tensor[0].numel())))
        return tensor + 0.05 * (left @ right).view_as(tensor).to(tensor.dtype)

    return change


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and not any(
        word in name for word in ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")
    )


@pytest.mark.parametrize("name", BUILDS)
def test_what_was_extracted_leads_back_to_the_fine_tune(name, saved, tmp_path):
    base = saved(name)
    after = tuned(base, BUILDS[name], tmp_path / "tuned", low_rank(3, linear), max_shard_size="40KB")
    adapterkit.extract(base, after, out=tmp_path / "adapter", rank=3)
    adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "back")
    expected, found = (oracle.load(BUILDS[name], folder).state_dict() for folder in (after, tmp_path / "back"))
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=2e-6), key
    with oracle.quiet():
        theirs = oracle.peft_merged(oracle.load(BUILDS[name], base), tmp_path / "adapter")
    for key, tensor in expected.items():
        assert torch.allclose(theirs[key], tensor, atol=2e-6), key


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_smaller_rank_is_the_best_approximation_and_says_its_error(dtype, saved, tmp_path):
    base = saved("llama", dtype)
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(20))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=4)
    before, later, found = oracle.stored(base), oracle.stored(after), load_file(tmp_path / "out" / MODEL)
    for module, fact in receipt.data["parameters"].items():
        if "rank" not in fact:
            continue
        delta = later[module + ".weight"].double() - before[module + ".weight"].double()
        a, b = (found[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        best = truncated(delta, 4)
        assert float((b @ a - best).norm() / delta.norm()) < 1e-4, module
        assert fact["error"] == pytest.approx(float((delta - best).norm() / delta.norm()), abs=1e-4)


def test_an_energy_finds_the_rank(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(5))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", energy=0.9999)
    ranks = {fact["rank"] for fact in receipt.data["parameters"].values() if "rank" in fact}
    assert ranks and max(ranks) <= 5
    for module, fact in receipt.data["parameters"].items():
        if "rank" in fact:
            assert fact["energy"] >= 0.9999 - 1e-6, module


def test_a_size_is_kept(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(12))
    adapterkit.extract(base, after, out=tmp_path / "out", max_size="30KB")
    assert 24_000 < (tmp_path / "out" / MODEL).stat().st_size <= 30_000
    assert len(set(config_of(tmp_path / "out")["rank_pattern"].values())) > 1
    with pytest.raises(Refused, match="rank 1 for each"):
        adapterkit.extract(base, after, out=tmp_path / "no", max_size="3KB")


def test_unchanged_layers_have_no_factors(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "q_proj" in name))
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert len(load_file(tmp_path / "out" / MODEL)) == 4


def test_a_difference_of_rounding_is_none(saved, tmp_path):
    """A bfloat16 copy of a float32 base, one layer of it changed."""
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "down_proj" in name))
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(after / "model.safetensors").items()}
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    for name, sides in (("there", (base, after)), ("back", (after, base))):
        adapterkit.extract(*sides, out=tmp_path / name, rank=2, rest="refuse")
        assert all("down_proj" in module for module in config_of(tmp_path / name)["target_modules"])


def test_norms_embeddings_and_heads_are_saved_left_out_or_refused(saved, tmp_path):
    base = saved("llama")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.1 if "norm.weight" in name or "embed" in name else low_rank(2)(name, tensor)

    after = tuned(base, oracle.llama, tmp_path / "tuned", change)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    saved_modules = config_of(tmp_path / "out")["modules_to_save"]
    assert "model.norm" in saved_modules and "model.embed_tokens" in saved_modules
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, found = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(found[key], tensor, atol=2e-6) for key, tensor in expected.items())
    receipt = adapterkit.extract(base, after, out=tmp_path / "dropped", rank=2, rest="drop")
    assert "model.norm.weight" in receipt.data["left_out"] and config_of(tmp_path / "dropped")["modules_to_save"] is None
    with pytest.raises(Refused, match=r"model\.norm\.weight"):
        adapterkit.extract(base, after, out=tmp_path / "no", rank=2, rest="refuse")
    adapterkit.extract(base, after, out=tmp_path / "attention", rank=2, rest="refuse", include="self_attn")


def test_biases_go_with_their_layers(saved, tmp_path):
    base = saved("bert")
    after = tuned(
        base, oracle.bert, tmp_path / "tuned", lambda n, t: t + 0.1 if n.endswith("query.bias") else low_rank(2, linear)(n, t)
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["bias"] == "lora_only"
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, found = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(found[key], tensor, atol=2e-6) for key, tensor in expected.items())


def test_what_cannot_be_extracted_is_refused(saved, tmp_path):
    base = saved("llama")
    with pytest.raises(Refused, match="nothing to extract"):
        adapterkit.extract(base, base, out=tmp_path / "out", rank=2, include="nowhere")
    with pytest.raises(Refused, match="alone"):
        adapterkit.extract(base, saved("gpt2"), out=tmp_path / "out", rank=2)
    with pytest.raises(Refused, match="rank"):
        adapterkit.extract(base, base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(3))
    argv = ["extract", str(base), str(after), "--rank", "3", "--dtype", "bf16", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, [*argv, "--dry-run"]).exit_code == 0 and not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    adapterkit.verify(tmp_path / "out")
