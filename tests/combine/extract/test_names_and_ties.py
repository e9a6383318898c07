"""extract where names end alike, and where parameters are tied or stored twice."""

import functools
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Refused
from adapterkit.core.weights.names import Names
from adapterkit.verbs.combine.planning.factor_targets import FactorTargets
from tests.support import architectures, oracle
from tests.support.extraction import (
    MODEL,
    check_both_ways,
    config_of,
    everything,
    linear,
    logits,
    low_rank,
    tuned,
)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_that_changed(stored, cached_folder, tmp_path):
    """They are saved once: loaded into the model itself, the value is the head's too."""
    base = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    change = lambda name, t: (
        t + 0.1 * torch.randn(t.shape) if "embed" in name else low_rank(2)(name, t)
    )
    after = tuned(base, oracle.tied_llama, tmp_path / "tuned", change)
    tensors = load_file(after / "model.safetensors")
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert [key for key in held if "lora" not in key] == [
        "base_model.model.model.embed_tokens.weight"
    ]
    check_both_ways(base, tmp_path / "out", after, oracle.tied_llama, tmp_path)
    assert oracle.stored(tmp_path / "back").keys() == oracle.stored(base).keys()
    expected = logits(oracle.load(oracle.tied_llama, after))
    theirs = oracle.peft_model(oracle.load(oracle.tied_llama, base), tmp_path / "out")
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    assert torch.allclose(
        logits(oracle.load(oracle.tied_llama, tmp_path / "back")), expected, atol=1e-5
    )


def test_embeddings_that_are_tied_threefold(saved, tmp_path):
    base = saved("t5")
    after = tuned(
        base,
        oracle.t5,
        tmp_path / "tuned",
        lambda n, t: t + 0.1 if "shared" in n else low_rank(2, linear)(n, t),
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert [key for key in load_file(tmp_path / "out" / MODEL) if "lora" not in key] == [
        "base_model.model.shared.weight"
    ]
    check_both_ways(base, tmp_path / "out", after, oracle.t5, tmp_path)


def test_names_that_others_end_with(cached_folder, tmp_path):
    """PEFT goes by the ends of names: the last norm of a bare model would be each layer's norm to
    it."""
    build = functools.partial(oracle.llama, cls="LlamaModel")
    base = cached_folder("extract-bare", lambda folder: oracle.save_base(build(), folder, "fp32"))
    after = tuned(
        base,
        build,
        tmp_path / "tuned",
        lambda name, t: everything(name, t) if "input_layernorm" not in name else t,
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    assert "norm.weight" in config_of(tmp_path / "out")["modules_to_save"]
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


def test_modules_of_an_unknown_model_are_copied_if_complete(tmp_path):
    """A module of which all that the file has is saved."""
    keys = ("norm.weight", "norm.bias", "last.norm.weight", "one.weight")
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    targets = FactorTargets(Names(open_checkpoint(LocalFolder(tmp_path))))
    assert targets.model is None
    assert targets.can_be_copied("one", ["one.weight"])
    assert targets.can_be_copied("last.norm", ["last.norm.weight"])
    assert not targets.can_be_copied("one", [])
    assert not targets.can_be_copied("norm", ["norm.weight", "norm.bias"])  # a name's end


def test_targets_that_others_end_with(tmp_path):
    """A list would mean both towers; the regex means one."""
    from adapterkit.verbs.combine.planning.extract import ExtractedAdapter

    others = frozenset({"layers.0.q", "encoder.layers.0.q", "layers.0", "encoder"})
    output = ExtractedAdapter([], [], {}, {}, "", all_modules=others)
    assert output.target_modules({"encoder.layers.0.q"}) == ["encoder.layers.0.q"]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    model["encoder"] = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])}
    )
    with oracle.quiet():
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=output.target_modules({"layers.0.q"}))
        )
    assert [name for name, _ in wrapped.named_modules() if name.endswith(".lora_A")] == [
        "base_model.model.layers.0.q.lora_A"
    ]


def test_a_part_of_a_fused_bias_is_its_own_slice(cached_folder, tmp_path):
    """The file has one bias for q, k and v, of which k's part changed."""
    build = architectures.BUILDS["gte"]
    base = cached_folder(
        "architectures-gte", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    change = lambda name, t: t + 0.1 if name.endswith("layers.0.self_attn.k_proj.bias") else t
    after = tuned(base, build, tmp_path / "tuned", change)
    fused = [key for key in oracle.stored(after) if "qkv" in key and key.endswith("bias")]
    assert fused
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert [(key.split("layers.")[1], tuple(t.shape)) for key, t in held.items()] == [
        ("0.self_attn.k_proj.bias", (32,))
    ]
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


def test_a_head_that_the_base_lacks(saved, tmp_path):
    """The fine-tune is a classifier; PEFT loads the adapter on the base with a fresh head."""
    base = saved("bert")
    with oracle.quiet():
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    low = low_rank(
        2, lambda name, t: t.dim() == 2 and "embed" not in name and "classifier" not in name
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(low(name, parameter.detach().clone()))
    with oracle.quiet():
        model.save_pretrained(tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned", out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"
    with oracle.quiet():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        fresh = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=3
        ).eval()
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    assert torch.allclose(logits(theirs), logits(model.eval()), atol=1e-5)
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    ours = oracle.load("BertForSequenceClassification", tmp_path / "back")
    assert torch.allclose(logits(ours), logits(model), atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_embedding_stored_twice(equal, cached_folder, tmp_path):
    base = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    after = tuned(
        base,
        oracle.tied_llama,
        tmp_path / "tuned",
        lambda name, t: t + 0.1 if "embed" in name else t,
    )
    tensors = load_file(after / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if equal else 0.1)
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    if equal:
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
        assert list(load_file(tmp_path / "out" / MODEL)) == [
            "base_model.model.model.embed_tokens.weight"
        ]
        return
    with pytest.raises(Refused, match="stored with two values"):
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tie_of_one_side(tied_first, saved, cached_folder, tmp_path):
    tied = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    base, after = (tied, saved("llama")) if tied_first else (saved("llama"), tied)
    builds = (oracle.tied_llama, oracle.llama) if tied_first else (oracle.llama, oracle.tied_llama)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    expected = logits(oracle.load(builds[1], after))
    theirs = oracle.peft_model(oracle.load(builds[0], base), tmp_path / "out")
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    assert torch.allclose(
        logits(oracle.load("LlamaForCausalLM", tmp_path / "back")), expected, atol=1e-5
    )
