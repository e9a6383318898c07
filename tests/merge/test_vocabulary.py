"""Trained token rows and resized vocabularies; copies of embeddings beside an adapter."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    DTYPES,
    assert_all_rounded,
    assert_same,
    exact,
    load,
    load_checked,
    merged,
    peft_merged,
    peft_model,
    stored,
)
from tests.support.usual import usual
from tests.support.vocabularies import COPY, _copies, _tokens, _two


@pytest.mark.parametrize("dtype", usual(DTYPES, {"bf16"}))
@pytest.mark.parametrize(
    ("build", "config"),
    [
        (oracle.llama, {}),
        (oracle.llama, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7, 0]}}),
        (oracle.gpt2, {"trainable_token_indices": {"wte": [2, 1]}, "target_modules": ["c_attn"]}),
        (
            oracle.bert,
            {"trainable_token_indices": {"word_embeddings": [8, 4]}, "target_modules": ["query"]},
        ),
        (
            oracle.bert,
            {"trainable_token_indices": {"d_embeddings": [8, 4]}, "target_modules": ["query"]},
        ),  # the end of a name
    ],
    ids=["llama", "llama-both", "gpt2", "bert", "bert-end"],
)
def test_trained_token_rows(build, config, dtype, cached_folder, tmp_path):
    """The rows replace the base's, in the order of the config's list."""
    base = cached_folder(
        f"saved-{build.__name__}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
    )
    _tokens(base, tmp_path / "adapter", build, **config)
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", compat="peft")
    assert_same(
        merged(tmp_path / "out", build), peft_merged(load(build, base), tmp_path / "adapter")
    )
    before, after = stored(base), stored(tmp_path / "out")
    key = next(
        k
        for k in before
        if k.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    )
    rows = (before[key] != after[key]).any(1).nonzero().flatten().tolist()
    asked = config.get("trainable_token_indices", [79, 3, 40])
    assert rows == sorted(asked if isinstance(asked, list) else next(iter(asked.values())))


@pytest.mark.parametrize("size", [90, 64])
def test_a_resized_vocabulary_merges_as_in_peft(size, llama, resized, tmp_path):
    adapter, theirs = resized(size=size)
    oracle.merge(llama, adapter, out=tmp_path / "out", compat="peft")
    model = load_checked(transformers.LlamaForCausalLM, tmp_path / "out")
    assert model.config.vocab_size == size and model.get_input_embeddings().weight.shape[0] == size
    assert_same(model.state_dict(), theirs.state_dict())


def test_resized_vocabulary_with_the_embedding_adapted(llama, resized, tmp_path):
    """`base_layer.weight` is the embedding that the factors are added to."""
    adapter, theirs = resized(target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored(adapter)
    oracle.merge(llama, adapter, out=tmp_path / "out", compat="peft")
    model = load_checked(transformers.LlamaForCausalLM, tmp_path / "out")
    assert model.config.vocab_size == 90
    assert_same(model.state_dict(), theirs.state_dict())


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -1.0)])
def test_copies_of_the_base_change_nothing(weights, llama, tmp_path):
    """Several adapters with copies of one base, in any weights."""
    adapters = _two(llama, tmp_path)
    oracle.merge(
        llama,
        *(f"{a}={w}" for a, w in zip(adapters, weights, strict=True)),
        out=tmp_path / "out",
        dtype="fp32",
    )
    before = load(oracle.llama, llama).state_dict()
    expected = exact(peft_model(load(oracle.llama, llama), *adapters), weights)
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama), expected, {k: v.float() for k, v in before.items()}
    )


def test_a_copy_of_another_base(llama, tmp_path):
    """A second adapter, merged into the result of a first: its copies would take the first one's
    delta away again."""
    first, second = _two(llama, tmp_path)
    oracle.merge(llama, first, out=tmp_path / "merged", dtype="fp32")
    oracle.merge(tmp_path / "merged", second, out=tmp_path / "told", dtype="fp32")
    (tmp_path / "merged" / "adapterkit.json").unlink()
    with pytest.raises(
        Refused,
        match=(
            r"embed_tokens.base_layer.weight \(80 of 80 rows "
            r"differ\).*\n.*\n.*--embedding-copies ignore"
        ),
    ):
        oracle.merge(tmp_path / "merged", second, out=tmp_path / "out")
    oracle.merge(
        tmp_path / "merged", second, out=tmp_path / "out", embedding_copies="ignore", verify=True
    )
    assert adapterkit.verify(tmp_path / "out", base=tmp_path / "merged", adapters=[second])["rows"]
    assert_same(stored(tmp_path / "told"), stored(tmp_path / "out"))  # the receipt explains them
    both = exact(peft_model(load(oracle.llama, llama), first, second))
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(
            stored(tmp_path / "out")[name].double(), both[name].value, rtol=0, atol=1e-6
        )
    oracle.merge(
        tmp_path / "merged",
        second,
        out=tmp_path / "copies",
        embedding_copies="adapter",
        compat="peft",
    )
    theirs = peft_merged(load(oracle.llama, tmp_path / "merged"), second)
    assert_same(merged(tmp_path / "copies", oracle.llama), theirs)
    alone = exact(peft_model(load(oracle.llama, llama), second))
    torch.testing.assert_close(
        theirs[EMBEDDING].double(), alone[EMBEDDING].value, rtol=0, atol=1e-6
    )


def test_unmerging_an_adapter_with_copies(llama, tmp_path):
    """What was merged says the receipt; copies of yet another base are refused as before."""
    first, _ = _two(llama, tmp_path)
    oracle.merge(llama, first, out=tmp_path / "merged", dtype="fp32")
    receipt = oracle.merge(tmp_path / "merged", f"{first}=-1", out=tmp_path / "back")
    assert any("before the merges in its receipt" in note for note in receipt.data["notes"])
    before = {k: v.float() for k, v in stored(llama).items()}
    for name, value in stored(tmp_path / "back").items():
        torch.testing.assert_close(value.float(), before[name], rtol=0, atol=1e-6)
    model = load(oracle.llama, llama)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    oracle.train(model, tmp_path / "other", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(Refused, match="copies of another base"):
        oracle.merge(tmp_path / "merged", tmp_path / "other", out=tmp_path / "out")


def test_a_copy_that_differs_in_a_row(llama, tmp_path):
    model = load(oracle.llama, llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    oracle.train(model, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(Refused, match=r"\(1 of 80 rows differ\)"):
        oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out", embedding_copies="adapter")
    wrapped = peft_model(load(oracle.llama, llama), tmp_path / "adapter")
    before = load(oracle.llama, llama).state_dict()
    assert_all_rounded(merged(tmp_path / "out", oracle.llama), exact(wrapped), before)


@pytest.mark.parametrize(
    "dtypes", [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")], ids="-".join
)
def test_a_copy_in_another_dtype(dtypes, cached_folder, tmp_path):
    """An adapter trained on the base loaded in another dtype: equal once the wider is rounded."""
    base = cached_folder(
        f"copies-{dtypes[0]}", lambda folder: oracle.save_base(oracle.llama(), folder, dtypes[0])
    )
    model = load(oracle.llama, base).to(DTYPES[dtypes[1]])
    oracle.train(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert stored(tmp_path / "adapter")[COPY].dtype == DTYPES[dtypes[1]]
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "ignored", embedding_copies="ignore")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "ignored"))


@pytest.mark.parametrize(
    "copy",
    [
        torch.zeros(80, 32, dtype=torch.uint8),
        torch.zeros(80, 31),
        torch.zeros(()),
        torch.zeros(0, 32),
    ],
)
def test_copies_that_are_none(copy, llama, tmp_path):
    """A copy of a quantized base, of another width, of nothing."""
    _copies(llama, tmp_path / "adapter")
    save_file(
        stored(tmp_path / "adapter") | {COPY: copy}, tmp_path / "adapter/adapter_model.safetensors"
    )
    with pytest.raises(Refused, match=r"is U8|shape \(4, 80\), with|embed_tokens.weight: shape"):
        oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out")


def test_an_adapter_loads_without_its_copies(llama, tmp_path):
    adapter, _ = _two(llama, tmp_path)
    before = peft_model(load(oracle.llama, llama), adapter)
    tensors = {k: v for k, v in stored(adapter).items() if ".base_layer." not in k}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(8)[None]
    assert torch.equal(
        before(ids).logits, peft_model(load(oracle.llama, llama), adapter)(ids).logits
    )


def test_trained_rows_of_a_resized_vocabulary(llama, resized, tmp_path):
    """Tokens beyond the base's vocabulary: the file then holds the resized embeddings beside the
    rows."""
    adapter, theirs = resized(trainable_token_indices=[85, 2])
    tensors = stored(adapter)
    assert "base_model.model.model.embed_tokens.token_adapter.base_layer.weight" in tensors
    oracle.merge(llama, adapter, out=tmp_path / "out", compat="peft")
    model = load_checked(transformers.LlamaForCausalLM, tmp_path / "out")
    assert_same(model.state_dict(), theirs.state_dict())
    save_file(
        {k: v for k, v in tensors.items() if "layers" in k or "trainable_tokens" in k},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(Refused, match=r"rows \[85\]"):
        oracle.merge(llama, adapter, out=tmp_path / "out2")


def test_only_one_of_two_embeddings_resized_is_refused(llama, resized, tmp_path):
    adapter, _ = resized()
    tensors = {k: v for k, v in stored(adapter).items() if "lm_head" not in k}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(Refused, match="lm_head.weight stays at 80"):
        oracle.merge(llama, adapter, out=tmp_path / "out")


def test_vocabulary_of_a_nested_config(tmp_path):
    """A vision-language model keeps vocab_size in text_config."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.LlavaConfig(
        vision_config={
            **tower,
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        text_config={**tower, "model_type": "llama", "vocab_size": 80, "num_key_value_heads": 2},
        image_token_index=79,
    )
    torch.manual_seed(0)
    with oracle.quiet():
        model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "base")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "base", dtype="auto"
        )
        model.resize_token_embeddings(88, mean_resizing=False)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj")
        )
        oracle.perturb(wrapped, 1)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        theirs = wrapped.merge_and_unload().state_dict()
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    text = json.loads((tmp_path / "out/config.json").read_text())
    assert text["text_config"]["vocab_size"] == 88
    assert_same(
        load_checked(transformers.LlavaForConditionalGeneration, tmp_path / "out").state_dict(),
        theirs,
    )


def test_tokenizer_comes_from_the_adapter(llama, resized, tmp_path):
    adapter, _ = resized()
    base = oracle.edit_config(llama, tmp_path / "base", vocab_size=80)
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "merges.txt").write_text("base")
    (adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    (adapter / "chat_template.jinja").write_text("{{ adapter }}")
    oracle.merge(base, adapter, out=tmp_path / "out")
    read = lambda name: (tmp_path / "out" / name).read_text()
    assert (
        "adapter" in read("tokenizer.json")
        and "adapter" in read("chat_template.jinja")
        and read("merges.txt") == "base"
    )
    oracle.merge(base, adapter, out=tmp_path / "kept", tokenizer="base")
    assert (
        "base" in (tmp_path / "kept/tokenizer.json").read_text()
        and not (tmp_path / "kept/chat_template.jinja").exists()
    )


def test_two_adapters_training_one_row_are_refused(llama, tmp_path):
    for seed in (1, 2):
        _tokens(llama, tmp_path / f"a{seed}", seed=seed, trainable_token_indices=[4, seed])
    with pytest.raises(Refused, match="a token row trained by two adapters"):
        oracle.merge(llama, tmp_path / "a1", tmp_path / "a2", out=tmp_path / "out")


def test_two_adapters_training_different_rows(llama, tmp_path):
    """PEFT has one adapter's rows active at a time; here they go in together."""
    for seed in (1, 2):
        _tokens(llama, tmp_path / f"a{seed}", seed=seed, trainable_token_indices=[seed, 10 + seed])
    oracle.merge(llama, tmp_path / "a1", tmp_path / "a2", out=tmp_path / "out")
    right, key = (
        stored(llama)["model.embed_tokens.weight"],
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    )
    for seed in (1, 2):
        right[[seed, 10 + seed]] = stored(tmp_path / f"a{seed}")[key].bfloat16()
    assert torch.equal(stored(tmp_path / "out")["model.embed_tokens.weight"], right)


@pytest.mark.parametrize(
    "indices", [[3], [3, 4, 5, 6], [3, 3, 4], [3, 4, 99], [3, -1, 4], None, {"lm_head": [1, 2, 3]}]
)
def test_wrong_indices_are_refused(indices, llama, tmp_path):
    _tokens(llama, tmp_path / "adapter")
    wrong = oracle.edit_config(
        tmp_path / "adapter", tmp_path / "wrong", trainable_token_indices=indices
    )
    with pytest.raises(Refused, match=r"trainable_token_indices|rows \[99\]"):
        oracle.merge(llama, wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_combine_of_copies(llama, tmp_path):
    """One copy of one base, the widest, whatever the weights; of two bases none."""
    first, second = _copies(llama, tmp_path / "a1"), _copies(llama, tmp_path / "a2", "fp32", seed=2)
    adapterkit.combine([f"{first}=0.5", f"{second}=-1"], method="linear", out=tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")[COPY], stored(second)[COPY])
    oracle.merge(llama, tmp_path / "out", out=tmp_path / "merged", dtype="fp32")
    oracle.merge(llama, f"{first}=0.5", f"{second}=-1", out=tmp_path / "both", dtype="fp32")
    torch.testing.assert_close(
        stored(tmp_path / "merged")[EMBEDDING],
        stored(tmp_path / "both")[EMBEDDING],
        rtol=1e-6,
        atol=1e-6,
    )
    other = _copies(llama, tmp_path / "other", change=1.0, seed=3)
    with pytest.raises(Refused, match="copies of two bases in a1 and other"):
        adapterkit.combine([first, other], method="linear", out=tmp_path / "refused")


def test_rebase_leaves_out_the_changed_base(llama, tmp_path):
    """The copy beside PiSSA's factors is W - s·b₀@a₀: beside plain factors PEFT would put it in
    place of W."""
    base = tmp_path / "base"
    oracle.save_base(load(oracle.llama, llama), base, "fp32")
    with oracle.quiet():
        config = peft.LoraConfig(
            r=4, init_lora_weights="pissa", target_modules=["lm_head", "q_proj"]
        )
        wrapped = peft.get_peft_model(load(oracle.llama, base), config)
        wrapped.save_pretrained(tmp_path / "initial")
        oracle.perturb(wrapped, 1, 0.02)
        wrapped.save_pretrained(tmp_path / "trained")
    adapterkit.rebase(tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "plain")
    assert not any(".base_layer." in key for key in stored(tmp_path / "plain"))
    ids = torch.arange(8)[None]
    right = wrapped.eval()(ids).logits
    torch.testing.assert_close(
        peft_model(load(oracle.llama, base), tmp_path / "plain")(ids).logits,
        right,
        rtol=1e-4,
        atol=1e-4,
    )
    oracle.merge(base, tmp_path / "plain", out=tmp_path / "out")
    torch.testing.assert_close(
        load(oracle.llama, tmp_path / "out")(ids).logits, right, rtol=1e-4, atol=1e-4
    )
