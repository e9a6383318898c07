"""Every kind of layer in every kind of model: against PEFT's merge_and_unload and against float64.

The default mode sums in float32 and rounds once. PEFT rounds once too for linear and convolution
layers, so there the two agree; for embeddings and attention PEFT rounds the delta first.
`compat="peft"` follows PEFT bit for bit everywhere.
"""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import oracle
from tests.support.oracle import (
    DTYPES,
    LINEAR,
    assert_all_rounded,
    assert_as_peft,
    assert_rounded,
    assert_same,
    exact,
    load,
    merged,
    peft_merged,
    peft_model,
    stored,
)

NET = ["line", "image", "tall", "point", "square", "volume", "fit", "narrow"]
CASES = {
    "llama": (oracle.llama, {"target_modules": LINEAR}),
    "llama-head": (oracle.llama, {"target_modules": ["lm_head", "q_proj"]}),
    "llama-embedding": (oracle.llama, {"target_modules": ["embed_tokens", "down_proj"]}),
    "gemma": (oracle.gemma, {"target_modules": LINEAR}),
    # the config says fan_in_fan_out false, as for a model of plain linear layers; c_proj of the
    # attention is square
    "gpt2": (
        oracle.gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": False},
    ),
    "gpt2-said": (oracle.gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "gpt2-embedding": (oracle.gpt2, {"target_modules": ["wpe", "c_attn"]}),
    "neox": (
        oracle.neox,
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
    "opt": (
        oracle.opt,
        {"target_modules": ["q_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"]},
    ),
    "bert": (oracle.bert, {"target_modules": ["query", "value", "dense", "word_embeddings"]}),
    "t5": (oracle.t5, {"target_modules": ["q", "v", "o", "wi", "wo"]}),
    "vit": (oracle.vit, {"target_modules": r".*(projection|q_proj|query|o_proj|dense|fc1|fc2)"}),
    "clip": (
        oracle.clip,
        {
            "target_modules": [
                "patch_embedding",
                "q_proj",
                "fc1",
                "text_projection",
                "token_embedding",
            ]
        },
    ),
    "net": (oracle.net, {"target_modules": NET}),
    "net-embedding": (oracle.net, {"target_modules": ["embed"]}),
    "net-rank-1": (oracle.net, {"target_modules": NET, "r": 1}),
    "net-full-rank": (oracle.net, {"target_modules": ["fit", "narrow", "image"], "r": 16}),
}


@pytest.fixture(scope="session")
def made_case(cached_folder):
    def make(name: str, dtype: str):
        build, config = CASES[name]
        base = cached_folder(
            f"base-{name}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
        )
        adapter = cached_folder(
            f"adapter-{name}-{dtype}",
            lambda folder: oracle.train(load(build, base), folder, **config),
        )
        return build, base, adapter

    return make


def as_stored(state, dtype):
    """Some models (T5's wo) keep a float16 weight in float32 when loaded; the file has it in
    float16."""
    return {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(CASES, "llama", "net"))
def test_is_the_rounded_float64_value(name, dtype, made_case, tmp_path):
    build, base, adapter = made_case(name, dtype)
    oracle.merge(base, adapter, out=tmp_path / "out")
    untouched = as_stored(load(build, base).state_dict(), dtype)
    expected = exact(peft_model(load(build, base), adapter))
    assert_all_rounded(as_stored(merged(tmp_path / "out", build), dtype), expected, untouched)
    assert set(stored(tmp_path / "out")) == set(stored(base))


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(CASES, "llama", "net"))
def test_compat_is_peft_bit_for_bit(name, dtype, made_case, tmp_path):
    build, base, adapter = made_case(name, dtype)
    oracle.merge(base, adapter, out=tmp_path / "out", compat="peft")
    actual, expected = merged(tmp_path / "out", build), peft_merged(load(build, base), adapter)
    assert_as_peft(as_stored(actual, dtype), as_stored(expected, dtype))


@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gets_each_delta_once(dtype, compat, cached_folder, tmp_path):
    """PEFT 0.21 adds out_proj's delta twice (peft.md 1.21, its pull request 3774); in_proj's
    once."""
    base = cached_folder(
        f"base-net-{dtype}", lambda folder: oracle.save_base(oracle.net(), folder, dtype)
    )
    config = {"target_modules": ["attention", "fit"]}
    adapter = cached_folder(
        f"attention-{dtype}", lambda folder: oracle.train(load(oracle.net, base), folder, **config)
    )
    oracle.merge(base, adapter, out=tmp_path / "out", compat=compat)
    before, after = stored(base), stored(tmp_path / "out")
    expected = exact(peft_model(load(oracle.net, base), adapter))
    assert set(expected) == {"attention.in_proj_weight", "attention.out_proj.weight", "fit.weight"}
    if compat is None:
        assert_all_rounded(after, expected, before)
        return
    theirs = peft_merged(load(oracle.net, base), adapter)
    twice = theirs.pop("attention.out_proj.weight")
    factors, key = (
        load_file(adapter / "adapter_model.safetensors"),
        "base_model.model.attention.base_layer.out_proj.lora_",
    )
    delta = (factors[key + "B.weight"] @ factors[key + "A.weight"] * 1.5).to(DTYPES[dtype])
    once = after.pop("attention.out_proj.weight")
    assert_as_peft(after, theirs)
    assert torch.equal(once, before["attention.out_proj.weight"] + delta)
    assert not torch.equal(once, twice), "PEFT adds it once now: compare with its result"


BIASES = {
    "all": (oracle.bert, {"target_modules": ["query", "dense"], "bias": "all"}),
    "lora-only": (oracle.gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "lora-bias": (oracle.bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "lora-bias-conv1d": (
        oracle.gpt2,
        {"target_modules": ["c_attn", "c_proj"], "lora_bias": True, "use_rslora": True},
    ),
    "lora-bias-conv": (
        oracle.net,
        {"target_modules": ["image", "point", "line"], "lora_bias": True},
    ),
    "all-with-head": (
        oracle.bert_classifier,
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "all-net": (oracle.net, {"target_modules": ["fit", "image"], "bias": "all"}),
    "all-attention": (
        oracle.net,
        {"target_modules": ["fit"], "bias": "all", "modules_to_save": ["attention"]},
    ),
}


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(BIASES, "all"))
def test_merged_biases_equal_peft(name, dtype, cached_folder, tmp_path):
    build, config = BIASES[name]
    base = cached_folder(
        f"biased-{build.__name__}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
    )
    oracle.train(load(build, base), tmp_path / "adapter", **config)
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", compat="peft")
    theirs = peft_merged(load(build, base), tmp_path / "adapter")
    assert_as_peft(merged(tmp_path / "out", build), theirs)
    before = load(build, base).state_dict()
    biases = [n for n in theirs if n.endswith("bias") and not torch.equal(theirs[n], before[n])]
    assert biases, "the adapter changes no bias"
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "plain")
    plain = merged(tmp_path / "plain", build)
    expected = exact(peft_model(load(build, base), tmp_path / "adapter"))
    for bias in biases:
        if bias in expected:
            assert_rounded(plain[bias], expected[bias], bias)
        else:
            assert torch.equal(plain[bias], theirs[bias])


# class that wrote the base, class the adapter was trained on
PREFIXES = [
    ("BertModel", "BertForSequenceClassification", oracle.bert),
    ("BertForMaskedLM", "BertModel", oracle.bert),
    ("GPT2LMHeadModel", "GPT2Model", oracle.gpt2),
    ("GPT2Model", "GPT2LMHeadModel", oracle.gpt2),
    ("LlamaForCausalLM", "LlamaModel", oracle.llama),
    ("LlamaModel", "LlamaForCausalLM", oracle.llama),
]


@pytest.mark.parametrize(
    ("wrote", "trained", "build"), PREFIXES, ids=lambda p: p if isinstance(p, str) else ""
)
def test_names_with_and_without_the_models_prefix(wrote, trained, build, cached_folder, tmp_path):
    """The base's keys and the adapter's names differ by `bert.`, `transformer.` or `model.`; the
    output has the base's keys."""
    base = cached_folder(
        f"wrote-{wrote}", lambda folder: oracle.save_base(build(cls=wrote), folder, "bf16")
    )
    targets = {
        "bert": ["query", "intermediate.dense"],
        "gpt2": ["c_attn", "c_proj"],
        "llama": LINEAR,
    }[build.__name__]
    with oracle.quiet():
        cls = getattr(oracle.transformers, trained)
        model = cls.from_pretrained(base, dtype="auto")
    oracle.train(copy.deepcopy(model), tmp_path / "adapter", target_modules=targets)
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    with oracle.quiet():
        after = cls.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    expected = exact(peft_model(copy.deepcopy(model), tmp_path / "adapter"))
    # what the base may lack is drawn at random at each loading
    drawn = ("classifier", "lm_head", "pooler")
    assert_all_rounded(
        after,
        expected,
        {k: v for k, v in model.state_dict().items() if not any(d in k for d in drawn)},
    )
    assert list(stored(tmp_path / "out")) == list(stored(base))


RENAMED = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "adapter name": lambda key: key.replace("_A.weight", "_A.default.weight").replace(
        "_B.weight", "_B.default.weight"
    ),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "data parallel": lambda key: key.replace("base_model.model.", "base_model.model.module."),
}


@pytest.mark.parametrize("how", RENAMED)
def test_keys_as_other_tools_save_them(how, llama, lora, tmp_path):
    """PEFT takes such a file without a word and applies nothing."""
    odd = oracle.edit_config(lora, tmp_path / "odd")
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({RENAMED[how](k): v for k, v in tensors.items()}, odd / "adapter_model.safetensors")
    oracle.merge(llama, odd, out=tmp_path / "out")
    oracle.merge(llama, lora, out=tmp_path / "plain")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "plain"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_factors_in_16_bits(dtype, llama, lora, tmp_path):
    """Factors saved in 16 bits are taken exactly, as PEFT takes them."""
    half = oracle.edit_config(lora, tmp_path / "half")
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(
        {k: v.to(DTYPES[dtype]) for k, v in tensors.items()}, half / "adapter_model.safetensors"
    )
    oracle.merge(llama, half, out=tmp_path / "out")
    expected = exact(peft_model(load(oracle.llama, llama), half))
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama), expected, load(oracle.llama, llama).state_dict()
    )
    oracle.merge(llama, half, out=tmp_path / "peft", compat="peft")
    assert_same(
        merged(tmp_path / "peft", oracle.llama), peft_merged(load(oracle.llama, llama), half)
    )


def test_peft_rounds_float32_factors_with_low_cpu_mem_usage(llama, lora, tmp_path):
    """peft.md 0.4: that flag rounds the factors to the base's dtype. The file's float32 factors are
    what is meant."""
    with oracle.quiet():
        wrapped = peft.PeftModel.from_pretrained(
            load(oracle.llama, llama), lora, low_cpu_mem_usage=True
        )
        theirs = wrapped.merge_and_unload().state_dict()
    oracle.merge(llama, lora, out=tmp_path / "out")
    ours, expected = stored(tmp_path / "out"), exact(peft_model(load(oracle.llama, llama), lora))
    misrounded = sum(int((theirs[n] != e.value.bfloat16()).sum()) for n, e in expected.items())
    count = sum(e.value.numel() for e in expected.values())
    assert misrounded > 0.01 * count, "PEFT rounds right now: drop this test"
    for name, value in expected.items():
        assert_rounded(ours[name], value, name)


def test_adding_the_delta_in_bf16_would_show(llama, lora, tmp_path):
    """What safe_merge and most peers do, rounding the delta first, misrounds many elements: the
    check above sees it."""
    with oracle.quiet():
        theirs = (
            peft_model(load(oracle.llama, llama), lora)
            .merge_and_unload(safe_merge=True)
            .state_dict()
        )
    expected = exact(peft_model(load(oracle.llama, llama), lora))
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(AssertionError):
        assert_rounded(theirs[name], expected[name], name)


@pytest.fixture(scope="session")
def large(cached_folder):
    """One linear layer of 8 million elements, a rank of 16, and a delta of 1 % of W: several chunks
    and several threads."""

    def build(folder):
        generator = torch.Generator().manual_seed(5)
        w = torch.randn(4096, 2048, generator=generator).bfloat16()
        a, b = (
            torch.randn(16, 2048, generator=generator),
            torch.randn(4096, 16, generator=generator),
        )
        b *= 0.01 / 16**0.5
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        save_file({"fit.weight": w}, folder / "base/model.safetensors")
        prefix = "base_model.model.fit.lora_"
        save_file(
            {prefix + "A.weight": a, prefix + "B.weight": b},
            folder / "adapter/adapter_model.safetensors",
        )
        config = peft.LoraConfig(r=16, lora_alpha=24, target_modules=["fit"])
        config.save_pretrained(folder / "adapter")

    return cached_folder("large", build)


def test_share_of_misrounded_elements(large, tmp_path):
    """At most 1e-5 of the elements differ from the rounded float64 value (plain float32 arithmetic
    gives 8.6e-6)."""
    oracle.merge(large / "base", large / "adapter", out=tmp_path / "out")
    w, actual = (
        load_file(f / "model.safetensors")["fit.weight"] for f in (large / "base", tmp_path / "out")
    )
    factors = load_file(large / "adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.fit.lora_{x}.weight"].double() for x in "AB")
    right = torch.addmm(w.double(), b, a, alpha=1.5).bfloat16()
    assert 0.3 < float((right != w).float().mean()) < 1
    assert float((actual != right).float().mean()) <= 1e-5


def test_compat_over_several_chunks(large, tmp_path):
    """PEFT multiplies the whole weight at once, adapterkit chunk by chunk: the same bits."""
    oracle.merge(large / "base", large / "adapter", out=tmp_path / "out", compat="peft")
    w, actual = (
        load_file(f / "model.safetensors")["fit.weight"] for f in (large / "base", tmp_path / "out")
    )
    layer = torch.nn.Sequential()
    layer.fit = torch.nn.Linear(2048, 4096, bias=False, dtype=torch.bfloat16)
    layer.fit.weight.data = w.clone()
    assert torch.equal(actual, peft_merged(layer, large / "adapter")["fit.weight"])
