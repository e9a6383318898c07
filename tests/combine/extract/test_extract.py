"""extract: the adapter between two checkpoints, merged back or laid on the base by PEFT."""

import warnings

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused
from tests.support import architectures, oracle
from tests.support.deltas import truncated
from tests.support.extraction import (
    BUILDS,
    MODEL,
    check_both_ways,
    config_of,
    everything,
    linear,
    logits,
    low_rank,
    tuned,
)
from tests.support.usual import usual


@pytest.mark.parametrize("name", BUILDS)
def test_base_plus_extracted_adapter_equals_the_fine_tune(name, saved, tmp_path):
    base = saved(name)
    after = tuned(
        base, BUILDS[name], tmp_path / "tuned", low_rank(3, linear), max_shard_size="40KB"
    )
    adapterkit.extract(base, after, out=tmp_path / "adapter", rank=3)
    adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "back")
    expected, actual = (
        oracle.load(BUILDS[name], folder).state_dict() for folder in (after, tmp_path / "back")
    )
    for key, tensor in expected.items():
        assert torch.allclose(actual[key], tensor, atol=2e-6), key
    with oracle.quiet():
        theirs = oracle.peft_merged(oracle.load(BUILDS[name], base), tmp_path / "adapter")
    for key, tensor in expected.items():
        assert torch.allclose(theirs[key], tensor, atol=2e-6), key


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_smaller_rank_is_the_best_approximation_and_reports_its_error(dtype, saved, tmp_path):
    base = saved("llama", dtype)
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(20))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=4)
    before, later, actual = (
        oracle.stored(base),
        oracle.stored(after),
        load_file(tmp_path / "out" / MODEL),
    )
    for module, metric in receipt.data["parameters"].items():
        if "rank" not in metric:
            continue
        delta = later[module + ".weight"].double() - before[module + ".weight"].double()
        a, b = (actual[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        best = truncated(delta, 4)
        assert float((b @ a - best).norm() / delta.norm()) < 1e-4, module
        assert metric["error"] == pytest.approx(
            float((delta - best).norm() / delta.norm()), abs=1e-4
        )


def test_an_energy_finds_the_rank(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(5))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", energy=0.9999)
    ranks = {metric["rank"] for metric in receipt.data["parameters"].values() if "rank" in metric}
    assert ranks and max(ranks) <= 5
    for module, metric in receipt.data["parameters"].items():
        if "rank" in metric:
            assert metric["energy"] >= 0.9999 - 1e-6, module


def test_a_size_is_kept(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(12))
    adapterkit.extract(base, after, out=tmp_path / "out", max_size="30KB")
    assert 24_000 < (tmp_path / "out" / MODEL).stat().st_size <= 30_000
    assert len(set(config_of(tmp_path / "out")["rank_pattern"].values())) > 1
    with pytest.raises(Refused, match="too small: rank 1 of 15 modules takes"):
        adapterkit.extract(base, after, out=tmp_path / "no", max_size="3KB")


def test_unchanged_layers_have_no_factors(saved, tmp_path):
    base = saved("llama")
    after = tuned(
        base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "q_proj" in name)
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["target_modules"] == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert len(load_file(tmp_path / "out" / MODEL)) == 4


def test_a_difference_of_rounding_is_none(saved, tmp_path):
    """A bfloat16 copy of a float32 base, one layer of it changed."""
    base = saved("llama")
    after = tuned(
        base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "down_proj" in name)
    )
    tensors = {
        key: tensor.bfloat16() for key, tensor in load_file(after / "model.safetensors").items()
    }
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    for name, sides in (("there", (base, after)), ("back", (after, base))):
        adapterkit.extract(*sides, out=tmp_path / name, rank=2, rest="refuse")
        assert all("down_proj" in module for module in config_of(tmp_path / name)["target_modules"])


def test_norms_embeddings_and_heads_are_saved_left_out_or_refused(saved, tmp_path):
    base = saved("llama")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor + 0.1 if "norm.weight" in name or "embed" in name else low_rank(2)(name, tensor)
        )

    after = tuned(base, oracle.llama, tmp_path / "tuned", change)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    saved_modules = config_of(tmp_path / "out")["modules_to_save"]
    assert "model.norm" in saved_modules and "model.embed_tokens" in saved_modules
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, actual = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(actual[key], tensor, atol=2e-6) for key, tensor in expected.items())
    whole = r"values saved in full take (?s:.*)or --rest drop"
    with pytest.raises(Refused, match=whole):
        adapterkit.extract(base, after, out=tmp_path / "no", max_size="3KB")
    receipt = adapterkit.extract(base, after, out=tmp_path / "dropped", rank=2, rest="drop")
    assert (
        "model.norm.weight" in receipt.data["left_out"]
        and config_of(tmp_path / "dropped")["modules_to_save"] is None
    )
    with pytest.raises(
        Refused, match=r"6 weights do not match\n  model\.embed_tokens\.weight differs"
    ):
        adapterkit.extract(base, after, out=tmp_path / "no", rank=2, rest="refuse")
    adapterkit.extract(
        base, after, out=tmp_path / "attention", rank=2, rest="refuse", include=".*self_attn.*"
    )


def test_biases_go_with_their_layers(saved, tmp_path):
    base = saved("bert")
    after = tuned(
        base,
        oracle.bert,
        tmp_path / "tuned",
        lambda n, t: t + 0.1 if n.endswith("query.bias") else low_rank(2, linear)(n, t),
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["bias"] == "lora_only"
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, actual = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(actual[key], tensor, atol=2e-6) for key, tensor in expected.items())


def test_large_weights_are_read_in_blocks(saved, tmp_path, monkeypatch):
    from adapterkit.core.engine.reader import LocalReader

    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(3, linear))
    adapterkit.extract(base, after, out=tmp_path / "whole", rank=3)
    monkeypatch.setattr("adapterkit.verbs.combine.tasks.difference.BLOCK", 100)
    sizes, tensor = [], LocalReader.tensor
    monkeypatch.setattr(
        LocalReader, "tensor", lambda self, spec: sizes.append(spec.shape) or tensor(self, spec)
    )
    adapterkit.extract(base, after, out=tmp_path / "blocks", rank=3)
    assert sizes and all(shape[0] <= 3 for shape in sizes if len(shape) == 2)
    assert (tmp_path / "whole" / MODEL).read_bytes() == (tmp_path / "blocks" / MODEL).read_bytes()


def test_extract_refuses_unsupported_pairs(saved, tmp_path):
    base = saved("llama")
    with pytest.raises(Refused, match="nothing to extract"):
        adapterkit.extract(base, base, out=tmp_path / "out", rank=2, exclude=".*")
    with pytest.raises(Refused, match="--include 'nowhere' matches none"):
        adapterkit.extract(base, base, out=tmp_path / "out", rank=2, include="nowhere")
    with pytest.raises(Refused, match="alone"):
        adapterkit.extract(base, saved("gpt2"), out=tmp_path / "out", rank=2)
    with pytest.raises(Refused, match="rank"):
        adapterkit.extract(base, base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_extract_command_writes_a_verified_adapter(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(3))
    argv = [
        "extract",
        str(base),
        str(after),
        "--rank",
        "3",
        "--dtype",
        "bf16",
        "--out",
        str(tmp_path / "out"),
    ]
    assert (
        CliRunner().invoke(main, [*argv, "--dry-run"]).exit_code == 0
        and not (tmp_path / "out").exists()
    )
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    adapterkit.verify(tmp_path / "out")


# with layers as others have them
ALIKE = ("clip", "blip2", "sam", "falcon_mamba", "qwen3_moe", "jina")


@pytest.mark.parametrize("name", usual(architectures.BUILDS, lambda name: name not in ALIKE))
def test_a_full_fine_tune_answers_as_it_does_itself(name, cached_folder, tmp_path):
    """Every parameter has changed, bare ones beside modules too: at full rank PEFT's model and the
    merged one give the fine-tune's answers."""
    build = architectures.BUILDS[name]
    base = cached_folder(
        f"architectures-{name}", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    after = tuned(base, build, tmp_path / "tuned", everything)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    held = load_file(tmp_path / "out" / MODEL)
    assert (
        receipt.data["totals"]["tensors"] == receipt.data["totals"]["tensors_changed"] == len(held)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*adapter keys")
        theirs = peft.PeftModel.from_pretrained(oracle.load(build, base), tmp_path / "out").eval()
        left = peft.set_peft_model_state_dict(theirs, held).unexpected_keys
    assert not left
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, before = (
        architectures.answers(name, oracle.load(build, folder)) for folder in (after, base)
    )
    assert all(
        float((a - b).abs().max()) > 0.05 * float(a.abs().max())
        for a, b in zip(expected, before, strict=True)
    )
    for model in (theirs, oracle.load(build, tmp_path / "back")):
        for actual, answer in zip(architectures.answers(name, model), expected, strict=True):
            torch.testing.assert_close(
                actual, answer, rtol=0, atol=2e-5 * float(answer.abs().max())
            )


def test_other_widths_are_refused_all_together(cached_folder, tmp_path):
    build = lambda width: (
        lambda folder: oracle.save_base(oracle.llama(intermediate_size=width), folder)
    )
    bases = [cached_folder(f"extract-width-{width}", build(width)) for width in (48, 64)]
    with pytest.raises(MultipleErrors, match="shapes that differ") as caught:
        adapterkit.extract(*bases, out=tmp_path / "out", rank=2)
    text = "\n".join(map(str, caught.value.errors))
    assert str(caught.value).count("expected") == 1 and not (tmp_path / "out").exists()
    assert all(
        f"layers.{i}.mlp.{leaf}_proj.weight" in text
        for i in (0, 1)
        for leaf in ("gate", "up", "down")
    )
    assert "(48, 32) and (64, 32)" in text
    adapterkit.extract(*bases, out=tmp_path / "out", rank=2, exclude=".*mlp.*")


def test_a_grown_vocabulary_is_fully_saved(saved, tmp_path):
    base = saved("llama")
    model = oracle.load(oracle.llama, base)
    with oracle.quiet():
        model.resize_token_embeddings(88)
        model.save_pretrained(tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned", out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, actual = oracle.stored(tmp_path / "tuned"), oracle.stored(tmp_path / "back")
    assert actual.keys() == expected.keys() and all(
        torch.equal(actual[key], expected[key]) for key in expected
    )
    with oracle.quiet():
        grown = oracle.load(oracle.llama, base)
        grown.resize_token_embeddings(88)
        theirs = oracle.peft_model(grown, tmp_path / "out")
    assert torch.equal(logits(theirs), logits(oracle.load("LlamaForCausalLM", tmp_path / "tuned")))


def test_values_alone_make_an_adapter_without_factors(saved, tmp_path):
    """Norms and biases changed, no matrix did: no factors of zeros, and PEFT reads it."""
    base = saved("bert")
    change = lambda name, t: (
        t + 0.1 if "LayerNorm" in name or name.endswith("layer.1.attention.self.key.bias") else t
    )
    after = tuned(base, oracle.bert, tmp_path / "tuned", change)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert held and not any("lora" in key for key in held)
    assert receipt.data["totals"]["tensors_changed"] == len(held)
    check_both_ways(base, tmp_path / "out", after, oracle.bert, tmp_path)


def test_biases_of_unchanged_layers_are_not_written(saved, tmp_path):
    base = saved("bert")
    change = lambda name, t: (
        t + 0.1 if name.endswith(("layer.0.attention.self.query.weight", "self.query.bias")) else t
    )
    after = tuned(base, oracle.bert, tmp_path / "tuned", change)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    query = "base_model.model.encoder.layer.{}.attention.self.query"
    factors = {
        f"{query.format(0)}.{leaf}"
        for leaf in ("lora_A.weight", "lora_B.weight", "base_layer.bias")
    }
    assert load_file(tmp_path / "out" / MODEL).keys() == factors | {f"{query.format(1)}.bias"}
    assert receipt.data["totals"]["tensors_changed"] == receipt.data["totals"]["tensors"] == 4
    check_both_ways(base, tmp_path / "out", after, oracle.bert, tmp_path)


def test_two_equal_models_have_no_difference(saved, tmp_path):
    with pytest.raises(AdapterkitError, match="no weight differs"):
        adapterkit.extract(saved("llama"), saved("llama"), out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_cannot_be_read_back_is_not_published(saved, tmp_path, monkeypatch):
    """As if the config did not mention fully trained modules."""
    base = saved("vit")
    after = tuned(base, oracle.vit, tmp_path / "tuned", everything)
    monkeypatch.setattr(
        "adapterkit.verbs.combine.planning.extract.Extraction.settings", lambda self: {}
    )
    with pytest.raises(AdapterkitError, match="which the config does not mention"):
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
