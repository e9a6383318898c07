"""Values that replace the base's: modules_to_save, heads that the base lacks, trained token rows,
resized vocabularies."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterkit
from adapterkit.errors import Refused
from tests.support import oracle, tiny
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

SAVED = {
    "head": (oracle.llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "norms-and-embedding": (
        oracle.llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "a-whole-block": (oracle.gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]}),
    "batch-norm": (oracle.net, {"target_modules": ["fit"], "modules_to_save": ["norm", "image"]}),
    "attention": (oracle.net, {"target_modules": ["fit"], "modules_to_save": ["attention"]}),
    "classifier": (
        oracle.bert_classifier,
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    # PEFT matches by the end of the name alone: `head` wraps lm_head
    "by-suffix": (oracle.llama, {"target_modules": ["q_proj"], "modules_to_save": ["head"]}),
    "vit-head": (oracle.vit, {"target_modules": ["fc1"], "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAVED)
def test_modules_to_save(name, dtype, cached_folder, tmp_path):
    build, config = SAVED[name]
    base = cached_folder(
        f"saved-{build.__name__}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
    )
    oracle.train(load(build, base), tmp_path / "adapter", **config)
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", compat="peft")
    theirs = peft_merged(load(build, base), tmp_path / "adapter")
    assert_same(merged(tmp_path / "out", build), theirs)
    before = load(build, base).state_dict()
    changed = [n for n in theirs if not torch.equal(theirs[n], before[n])]
    assert all(any(f"{m}." in n for n in changed) for m in config["modules_to_save"])


# the base is saved without the head that was trained on it
HEADS = {
    "bert-cls": (
        "BertModel",
        "BertForSequenceClassification",
        oracle.bert,
        {"task_type": "SEQ_CLS"},
        {"num_labels": 3},
    ),
    "bert-tokens": (
        "BertModel",
        "BertForTokenClassification",
        oracle.bert,
        {"task_type": "TOKEN_CLS"},
        {"num_labels": 5},
    ),
    "bert-qa": (
        "BertModel",
        "BertForQuestionAnswering",
        oracle.bert,
        {"task_type": "QUESTION_ANS"},
        {},
    ),
    "bert-auto-mapping": (
        "BertModel",
        "BertForSequenceClassification",
        oracle.bert,
        {},
        {"num_labels": 4},
    ),
    # a head for another task: the language model's own head is left out
    "llama-cls": (
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        oracle.llama,
        {"task_type": "SEQ_CLS"},
        {"num_labels": 3},
    ),
    "gpt2-cls": (
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        oracle.gpt2,
        {"task_type": "SEQ_CLS"},
        {"num_labels": 7},
    ),
}
TARGETS = {"bert": ["query"], "llama": ["q_proj"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_the_base_lacks(name, cached_folder, tmp_path):
    """The head is written with the config of the class that has it, so that class loads the folder
    whole."""
    wrote, trained, build, config, labels = HEADS[name]
    base = cached_folder(
        f"headless-{wrote}", lambda folder: oracle.save_base(build(cls=wrote), folder, "bf16")
    )
    cls = getattr(transformers, trained)
    with oracle.quiet():
        model = cls.from_pretrained(base, dtype="auto", **labels)
    head = "qa_outputs" if "Question" in trained else "classifier" if "Bert" in trained else "score"
    config = {"modules_to_save": [head], "target_modules": TARGETS[build.__name__]} | config
    oracle.train(model, tmp_path / "adapter", **config)
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", compat="peft")
    after = load_checked(cls, tmp_path / "out")
    with oracle.quiet():
        theirs = peft_merged(
            cls.from_pretrained(base, dtype="auto", **labels), tmp_path / "adapter"
        )
    assert_same(after.state_dict(), theirs)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architectures"] == [trained]
    assert after.config.num_labels == labels.get("num_labels", 2)


def _headless(cached_folder, wrote="BertModel", **changes):
    return cached_folder(
        f"headless-{wrote}-{sorted(changes)}",
        lambda f: oracle.save_base(oracle.bert(cls=wrote, **changes), f, "bf16"),
    )


@pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS"])
def test_a_head_that_nothing_completes_is_refused(task, cached_folder, tmp_path):
    """A masked language model has no pooler, which the classifier reads; PEFT trains with a random
    one and does not save it."""
    base = _headless(cached_folder, "BertForMaskedLM")
    cls = (
        transformers.BertForSequenceClassification
        if task == "SEQ_CLS"
        else transformers.BertForQuestionAnswering
    )
    with oracle.quiet():
        model = cls.from_pretrained(base, dtype="auto")
    oracle.train(model, tmp_path / "adapter", target_modules=["query"], task_type=task)
    if task == "QUESTION_ANS":  # complete without a pooler
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
        load_checked(cls, tmp_path / "out")
        return
    with pytest.raises(
        Refused,
        match=(
            r"needs bert.pooler.dense.weight, bert.pooler.dense.bias, which "
            r"neither.*(\n.*)*--exclude 'classifier'"
        ),
    ):
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", exclude="classifier")
    load_checked(transformers.BertForMaskedLM, tmp_path / "out")


OLDER = {
    "bert": ("BertForSequenceClassification", oracle.bert, ["query"], "classifier."),
    "llama": ("LlamaForSequenceClassification", oracle.llama, ["q_proj"], "score."),
    "distilbert": ("DistilBertForSequenceClassification", None, ["q_lin"], "pre_classifier."),
}


def _distilbert(cls="DistilBertModel"):
    sizes = {
        "vocab_size": 80,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 1,
        "n_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return getattr(transformers, cls)(transformers.DistilBertConfig(**sizes)).eval()


@pytest.mark.parametrize("name", OLDER)
def test_heads_of_older_adapters_are_the_tasks(name, cached_folder, tmp_path):
    """Before PEFT 0.5 the config said nothing of the head: the task type does, here as in PEFT."""
    trained, build, targets, head = OLDER[name]
    build = build or _distilbert
    base = cached_folder(
        f"older-{name}", lambda folder: oracle.save_base(build(cls=trained), folder, "bf16")
    )
    oracle.train(
        load(trained, base), tmp_path / "adapter", target_modules=targets, task_type="SEQ_CLS"
    )
    old = oracle.edit_config(tmp_path / "adapter", tmp_path / "old", modules_to_save=None)
    assert any(head in key for key in stored(old))
    oracle.merge(base, old, out=tmp_path / "out", compat="peft")
    assert_same(merged(tmp_path / "out", trained), peft_merged(load(trained, base), old))
    again = tmp_path / "again"
    adapterkit.resize(old, rank=4, out=again)
    assert any(head in key for key in stored(again))
    peft_model(load(trained, base), again)


def test_heads_that_the_model_lacks_are_no_problem(cached_folder, tmp_path):
    """PEFT names classifier and score for every classifier, qa_outputs for every reader; XLNet's
    are called otherwise."""
    config = transformers.XLNetConfig(vocab_size=80, d_model=32, n_layer=1, n_head=4, d_inner=48)
    torch.manual_seed(0)
    with oracle.quiet():
        base = cached_folder(
            "xlnet-cls",
            lambda f: oracle.save_base(
                transformers.XLNetForSequenceClassification(config), f, "bf16"
            ),
        )
    cls = transformers.XLNetForSequenceClassification
    oracle.train(
        load_checked(cls, base),
        tmp_path / "adapter",
        target_modules=["layer_1"],
        task_type="SEQ_CLS",
    )
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {"classifier", "score"} <= set(said["modules_to_save"]) and not any(
        "logits" in key for key in stored(tmp_path / "adapter")
    )
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", compat="peft")
    assert_same(
        load_checked(cls, tmp_path / "out").state_dict(),
        peft_merged(load_checked(cls, base), tmp_path / "adapter"),
    )


def test_a_tasks_head_that_the_file_lacks(cached_folder, tmp_path):
    """PEFT looks for it too."""
    base = cached_folder(
        "older-bert",
        lambda folder: oracle.save_base(
            oracle.bert(cls="BertForSequenceClassification"), folder, "bf16"
        ),
    )
    oracle.train(
        load("BertForSequenceClassification", base),
        tmp_path / "adapter",
        target_modules=["query"],
        task_type="SEQ_CLS",
    )
    tensors = {k: v for k, v in stored(tmp_path / "adapter").items() if "classifier" not in k}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(
        Refused, match=r"modules_to_save classifier, and the file holds no classifier"
    ):
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", exclude="classifier")


def test_a_saved_module_that_is_stored_in_parts(tmp_path):
    """OLMo-hybrid's convolution is three tensors in the file, each a third of its channels."""
    model = tiny.model("olmo_hybrid")
    model.save_pretrained(tmp_path / "base")
    oracle.train(model, tmp_path / "adapter", target_modules=["k_proj"], modules_to_save=["conv1d"])
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    found = oracle.load_checked(type(model), tmp_path / "out").state_dict()
    expected = peft_merged(
        oracle.load_checked(type(model), tmp_path / "base"), tmp_path / "adapter"
    )
    saved = [name for name in expected if "conv1d" in name]
    assert saved and all(torch.equal(found[name], expected[name]) for name in saved)


def _tokens(base, folder, build=oracle.llama, **config):
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [79, 3, 40]} | config
    oracle.train(load(build, base), folder, **config)


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.fixture
def resized(llama, tmp_path):
    """An adapter trained after `resize_token_embeddings(90)`, on attention; PEFT saved both
    embeddings. And its model."""

    def make(base=llama, build=oracle.llama, size=90, **config):
        model = load(build, base)
        with oracle.quiet():
            model.resize_token_embeddings(size, mean_resizing=False)
        model.name_or_path = str(base)
        with oracle.quiet():
            wrapped = peft.get_peft_model(
                model, peft.LoraConfig(r=4, **({"target_modules": ["q_proj"]} | config))
            )
            oracle.perturb(wrapped, 1)
            with torch.no_grad():
                embedding = wrapped.get_input_embeddings().weight
                embedding[80:] = torch.randn(
                    embedding[80:].shape, generator=torch.Generator().manual_seed(3)
                ).to(embedding)
            wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
            theirs = wrapped.merge_and_unload()
        return tmp_path / "adapter", theirs

    return make


@pytest.mark.parametrize("size", [90, 64])
def test_resized_vocabulary(size, llama, resized, tmp_path):
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
COPY = "base_model.model.model.embed_tokens.base_layer.weight"


def _two(llama, tmp_path):
    """Two adapters of embedding, head and attention; PEFT stores copies of the base's embedding and
    head in both."""
    for seed in (1, 2):
        oracle.train(
            load(oracle.llama, llama),
            tmp_path / f"a{seed}",
            seed=seed,
            target_modules=["embed_tokens", "lm_head", "q_proj"],
        )
        assert COPY in stored(tmp_path / f"a{seed}")
    return tmp_path / "a1", tmp_path / "a2"


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
    with pytest.raises(
        Refused,
        match=(
            r"embed_tokens.base_layer.weight \(80 of 80 rows "
            r"differ\).*\n.*\n.*--base-copies ignore"
        ),
    ):
        oracle.merge(tmp_path / "merged", second, out=tmp_path / "out")
    oracle.merge(
        tmp_path / "merged", second, out=tmp_path / "out", base_copies="ignore", verify=True
    )
    assert adapterkit.verify(tmp_path / "out", base=tmp_path / "merged", adapters=[second])["rows"]
    both = exact(peft_model(load(oracle.llama, llama), first, second))
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(
            stored(tmp_path / "out")[name].double(), both[name].value, rtol=0, atol=1e-6
        )
    oracle.merge(
        tmp_path / "merged", second, out=tmp_path / "copies", base_copies="adapter", compat="peft"
    )
    theirs = peft_merged(load(oracle.llama, tmp_path / "merged"), second)
    assert_same(merged(tmp_path / "copies", oracle.llama), theirs)
    alone = exact(peft_model(load(oracle.llama, llama), second))
    torch.testing.assert_close(
        theirs[EMBEDDING].double(), alone[EMBEDDING].value, rtol=0, atol=1e-6
    )


def test_a_copy_that_differs_in_a_row(llama, tmp_path):
    model = load(oracle.llama, llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    oracle.train(model, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(Refused, match=r"\(1 of 80 rows differ\)"):
        oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out", base_copies="adapter")
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
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "ignored", base_copies="ignore")
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
    with pytest.raises(Refused, match=r"is U8|shape \(\(4, 80\)|embed_tokens.weight: shape"):
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
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["text_config"]["vocab_size"] == 88
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


WHOLE = {
    "head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "a-name-inside-another": (
        {"modules_to_save": ["dense"], "target_modules": ["dense_h_to_4h"]},
        None,
    ),
    "rows": ({"trainable_token_indices": [1]}, r"model\.embed_tokens"),
    "biases": ({"bias": "lora_only"}, "bias$"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_weight_other_than_one_and_its_way_out(what, cached_folder, tmp_path):
    """Values have no multiple; the message names the option that leaves them as they are, and it
    works."""
    config, pattern = WHOLE[what]
    build = {
        "biases": lambda: oracle.llama(attention_bias=True),
        "a-name-inside-another": oracle.neox,
    }.get(what, oracle.llama)
    base = cached_folder(
        f"weights-{what}", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    oracle.train(
        load(build, base), tmp_path / "adapter", **({"target_modules": ["q_proj"]} | config)
    )
    with pytest.raises(
        Refused, match=r"(replaced parameters|trained token rows).* with weight -1"
    ) as caught:
        oracle.merge(base, f"{tmp_path / 'adapter'}=-1", out=tmp_path / "out")
    exclude = str(caught.value).partition("--exclude '")[2].partition("'")[0]
    assert exclude == pattern or (
        pattern is None and exclude.startswith(r"^gpt_neox\.layers\.0\.attention\.dense\.bias$|")
    )
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "there")
    oracle.merge(
        tmp_path / "there", f"{tmp_path / 'adapter'}=-1", out=tmp_path / "back", exclude=exclude
    )
    before, there, back = (
        stored(folder) for folder in (base, tmp_path / "there", tmp_path / "back")
    )
    trained = [name for name in before if not torch.equal(there[name], before[name])]
    undone = [name for name in trained if torch.allclose(back[name], before[name], atol=1e-6)]
    assert undone and set(undone) == {
        n for n in trained if n.endswith(("q_proj.weight", "4h.weight"))
    }
    assert all(torch.equal(back[name], there[name]) for name in trained if name not in undone)


def test_two_adapters_replacing_one_module_are_refused(llama, tmp_path):
    for seed in (1, 2):
        oracle.train(
            load(oracle.llama, llama),
            tmp_path / f"a{seed}",
            seed=seed,
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
        )
    with pytest.raises(Refused, match=r"lm_head\.weight is replaced by both a1 and a2"):
        oracle.merge(llama, tmp_path / "a1", tmp_path / "a2", out=tmp_path / "out")


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


def _copies(llama, folder, dtype="bf16", change=0.0, **config):
    """An adapter of the embedding whose copy is of the base in another dtype, or of another
    base."""
    model = load(oracle.llama, llama).to(DTYPES[dtype])
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += change
    oracle.train(model, folder, target_modules=["embed_tokens"], **config)
    return folder


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
