"""Values that replace the base's: modules_to_save, and heads that the base lacks."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle, tiny
from tests.support.oracle import (
    assert_same,
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


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(SAVED, "head"))
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
    text = json.loads((tmp_path / "out/config.json").read_text())
    assert text["architectures"] == [trained]
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
            r'neither.*(\n.*)*--exclude "classifier"'
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
    text = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {"classifier", "score"} <= set(text["modules_to_save"]) and not any(
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
        Refused, match=r"modules_to_save classifier, and the file has no classifier"
    ):
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", exclude="classifier")


def test_a_saved_module_that_is_stored_in_parts(tmp_path):
    """OLMo-hybrid's convolution is three tensors in the file, each a third of its channels."""
    model = tiny.model("olmo_hybrid")
    model.save_pretrained(tmp_path / "base")
    oracle.train(model, tmp_path / "adapter", target_modules=["k_proj"], modules_to_save=["conv1d"])
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    actual = oracle.load_checked(type(model), tmp_path / "out").state_dict()
    expected = peft_merged(
        oracle.load_checked(type(model), tmp_path / "base"), tmp_path / "adapter"
    )
    saved = [name for name in expected if "conv1d" in name]
    assert saved and all(torch.equal(actual[name], expected[name]) for name in saved)


WHOLE = {
    "head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "a-name-inside-another": (
        {"modules_to_save": ["dense"], "target_modules": ["dense_h_to_4h"]},
        "dense",
    ),
    "rows": ({"trainable_token_indices": [1]}, "model.embed_tokens"),
    "biases": ({"bias": "lora_only"}, "bias"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_weight_other_than_one_is_refused_with_a_fix(what, cached_folder, tmp_path):
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
    exclude = str(caught.value).partition('--exclude "')[2].partition('"')[0]
    assert exclude == pattern
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
