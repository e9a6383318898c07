"""Values trained in full on live models: modules_to_save and biases, beside the base."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
)

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from adapterkit.runtime.training.trainer import restore
from tests.support import oracle
from tests.support.beside_peft import (
    SIZES,
    WARNINGS,
    check_merging,
    compare,
    gradients,
    in_peft,
    shake,
    trained,
)
from tests.support.live import llama, peft_of, tokens

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]

BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(12).reshape(2, 6) + 1


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                nn.init.normal_(parameter, 0.5, 0.3)
        return model

    return made


MODELS = {
    "llama": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))),
    "tied": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))),
    "llama_cls": seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES))),
    "bert_cls": seeded(lambda: BertForSequenceClassification(BertConfig(**BERT))),
    "bert": seeded(lambda: BertForMaskedLM(BertConfig(**BERT))),
}
QV = ["q_proj", "v_proj"]
CASES = {
    "head": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "head and target": (
        "llama",
        {"target_modules": [*QV, "lm_head"], "modules_to_save": ["lm_head"]},
    ),
    "norm": ("llama", {"target_modules": QV, "modules_to_save": ["input_layernorm"]}),
    "block": (
        "llama",
        {"target_modules": [*QV, "gate_proj"], "modules_to_save": ["layers.0.self_attn"]},
    ),
    "tied head": ("tied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "tied embedding": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "tied both": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied together": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "score": ("llama_cls", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "classifier": ("bert_cls", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all biases": ("llama", {"target_modules": QV, "bias": "all"}),
    "own biases": ("llama", {"target_modules": QV, "bias": "lora_only"}),
    "all of bert": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "own of bert": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    # whole names, for which PEFT does not look at layers
    "beside layers": (
        "llama",
        {"target_modules": ["model.embed_tokens", "lm_head"], "layers_to_transform": [0]},
    ),
    "own of parameters": (
        "bert",
        {"target_modules": [], "target_parameters": ["query.weight"], "bias": "lora_only"},
    ),
    "biases and a head": (
        "bert_cls",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_values_equal_peft(case, tmp_path):
    model, settings = CASES[case]
    _, adapters = compare(MODELS[model], logits, tmp_path, r=4, **settings)
    check_merging(adapters, logits)


def test_modules_that_are_tied_to_an_entry_have_none_of_their_own(tmp_path):
    """PEFT ties its copies to that of the entry; of all three names it makes a model without a
    forward."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = Pop2PianoConfig(vocab_size=40, **sizes)
    make = seeded(lambda: Pop2PianoForConditionalGeneration(config).eval())
    settings = {"target_modules": ["q"], "modules_to_save": ["shared"], "ensure_weight_tying": True}
    with oracle.quiet():
        theirs = in_peft(make(), r=2, **settings).eval()
        shake(p for name, p in theirs.named_parameters() if "modules_to_save" in name)
        names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
        trained = theirs.base_model.model.shared.modules_to_save["default"].weight
        state = peft.get_peft_model_state_dict(theirs)
        state |= {f"base_model.model.{name}.weight": trained.detach().clone() for name in names}
        theirs.peft_config["default"].save_pretrained(tmp_path / "theirs")
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    adapters = load(make(), tmp_path / "theirs")
    adapters.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert written["modules_to_save"] == ["shared"]
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    run = lambda model: model(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(run(again), run(adapters.model))


class Small(nn.Module):
    """Layers of several kinds, in no model of transformers."""

    def __init__(self, momentum=0.0):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8, momentum=momentum)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.tail = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    def forward(self, x):
        return self.tail(self.mix(self.bn(self.conv(x)).mT))


def rows_of_small(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["bn", "tail"]},
    {"modules_to_save": ["bn"], "bias": "all"},
    {"bias": "all"},
    {"bias": "lora_only"},
], ids=str)  # fmt: skip
def test_layers_of_all_kinds(settings, tmp_path, monkeypatch):
    """The running statistics of a batch norm are the copy's; torch's attention reads the bias of
    its output projection itself."""
    make = seeded(lambda: Small(0.1 if "modules_to_save" in settings else 0.0))
    # PEFT's adapters do not act in torch's fused layers
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    theirs, adapters = compare(
        make, rows_of_small, tmp_path, target_modules=["linear1"], **settings
    )
    model = adapters.model
    with torch.no_grad():
        y = rows_of_small(model)
        monkeypatch.undo()
        torch.testing.assert_close(rows_of_small(model), y)
    if "modules_to_save" in settings:
        copies = adapters.state.sites["bn"].patches["default"]["copy"]
        statistics = copies.module.running_mean
        assert torch.equal(model.bn.running_mean, torch.zeros(8))
        assert statistics.abs().max() > 0
        torch.testing.assert_close(
            statistics, theirs.base_model.model.bn.modules_to_save["default"].running_mean
        )
    check_merging(adapters, rows_of_small)


def attached(make, config: LoraConfig, run, folder, **settings) -> None:
    """Assert that an adapter of the runtime starts as the base and trains as in PEFT."""
    ours = make().train()
    y = run(ours).detach()
    adapters = attach(ours, config, seed=3)
    assert torch.equal(run(ours), y)
    adapters.save(folder)
    theirs = peft.PeftModel.from_pretrained(make(), folder, is_trainable=True).train()
    optimizers = [torch.optim.AdamW(trained(model), lr=0.01) for model in (theirs, ours)]
    for _ in range(4):
        torch.testing.assert_close(gradients(ours, run), gradients(theirs, run))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(run(ours), run(theirs))
    assert not torch.allclose(run(ours), y)


@pytest.mark.parametrize("model, config", [
    ("llama", LoraConfig(targets=QV, modules_to_save=["lm_head", "norm"])),
    ("tied", LoraConfig(targets=QV, modules_to_save=["embed_tokens"], tie=True)),
    ("bert_cls", LoraConfig(targets=["query"], task_type="SEQ_CLS")),
    ("llama", LoraConfig(targets=QV, bias="all")),
    ("bert", LoraConfig(targets=["query", "dense"], bias="lora_only")),
    ("bert", LoraConfig(targets=[], parameters=["output.dense.weight"], bias="lora_only")),
], ids=str)  # fmt: skip
def test_a_new_adapter_trains_as_in_peft(model, config, tmp_path):
    attached(MODELS[model], config, logits, tmp_path)


def test_rows_of_a_head_have_the_bias_of_its_copy():
    """PEFT has none there, and does not read its own file."""
    tokens = {"word_embeddings": [3, 5]}
    config = LoraConfig(targets=["query"], modules_to_save=["decoder"], trainable_tokens=tokens)
    adapters = attach(MODELS["bert"](), config, seed=0)
    shake(adapters.parameters())
    check_merging(adapters, logits)


def test_tied_copies_are_one_parameter(tmp_path):
    h = attach(MODELS["tied"](), LoraConfig(targets=QV, modules_to_save=["lm_head"], tie=True))
    sites = [h.state.sites[path] for path in ("model.embed_tokens", "lm_head")]
    parts = [site.patches["default"]["copy"] for site in sites]
    assert parts[0].module.weight is parts[1].module.weight
    assert len(list(h.parameters())) == len(set(h.parameters())) == 4 * 2 + 1


def test_peft_keeps_trained_biases_when_disabled(tmp_path):
    model, settings = CASES["all biases"]
    theirs = in_peft(MODELS[model](), **settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = MODELS[model]().eval()
    expected = logits(ours)
    h = load(ours, tmp_path)
    with h.disabled():
        assert torch.equal(logits(ours), expected)
    with theirs.disable_adapter():
        assert not torch.allclose(logits(theirs), expected)


@pytest.mark.parametrize("first, second, word", [
    ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "trained copy"),
    ({"modules_to_save": ["mlp"]}, {"targets": ["up_proj"]}, "a trained copy of"),
    ({"modules_to_save": ["embed_tokens"]}, {"trainable_tokens": [1]}, "trained copy"),
    ({"modules_to_save": ["v_proj"]}, {"bias": "all"}, "trained copy"),
    ({"bias": "all"}, {"bias": "lora_only"}, "trained biases"),
], ids=str)  # fmt: skip
def test_two_adapters_with_one_value_do_not_act_together(first, second, word):
    model = MODELS["llama"]().eval()
    h = attach(model, LoraConfig(**{"targets": ["q_proj"], **first}), name="a", seed=1)
    h.attach(LoraConfig(**{"targets": ["q_proj"], **second}), name="b", seed=2)
    shake(h.parameters())
    results = []
    for name in "ab":
        h.activate(name)
        results.append(logits(model))
    h.activate("a")
    for call in (lambda: h.activate(["a", "b"]), lambda: h.merge({"a": 0.5, "b": 0.5})):
        with pytest.raises(AdapterkitError, match=word):
            call()
        assert torch.equal(logits(model), results[0])
        assert h.active == {"a": 1.0}
    assert not torch.equal(*results)


def test_a_copy_and_another_adapters_factors_act_together():
    """On one module the factors add to the copy's output; merged as well."""
    model = MODELS["llama"]().eval()
    h = attach(model, LoraConfig(targets=QV, modules_to_save=["lm_head"]), name="a", seed=1)
    h.attach(LoraConfig(targets=["lm_head"]), name="b", seed=2)
    shake(h.parameters())
    h.activate({"a": 1, "b": 0.5})
    part = h.state.sites["lm_head"].patches["b"]["delta"]
    weight = h.state.sites["lm_head"].patches["a"]["copy"].module.weight + 0.5 * part.delta()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    logits(model)
    torch.testing.assert_close(seen[0][1], seen[0][0] @ weight.T)
    check_merging(h, logits)


def test_copies_hold_no_other_adapters():
    model = MODELS["llama"]().eval()
    expected = logits(model)
    h = attach(model, LoraConfig(targets=["up_proj", "q_proj"]), name="a", seed=1)
    shake(h.parameters())
    h.attach(LoraConfig(targets=["q_proj"], modules_to_save=["mlp"]), name="b", seed=1)
    h.activate("b")
    assert torch.equal(logits(model), expected)
    names = [name for name, _ in h.state.sites["model.layers.0.mlp"].named_parameters()]
    assert names == [f"b:copy.module.{x}_proj.weight" for x in ("gate", "up", "down")]


def test_merging_a_copy_of_a_tied_head_unties(tmp_path):
    model = MODELS["tied"]().eval()
    h = attach(model, LoraConfig(targets=QV, modules_to_save=["lm_head"]), seed=1)
    shake(h.parameters())
    expected, before = logits(model), model.lm_head.weight
    h.merge()
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)
    h.unmerge()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is before is model.model.embed_tokens.weight


def test_a_merged_tie_stays_one(tmp_path):
    model = MODELS["tied"]().eval()
    h = attach(model, LoraConfig(targets=QV, modules_to_save=["lm_head"], tie=True), seed=1)
    shake(h.parameters())
    expected = logits(model)
    h.merge()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)


def test_values_are_the_adapters_in_rows():
    model = MODELS["llama"]().eval()
    h = attach(model, LoraConfig(targets=QV, modules_to_save=["lm_head"]), name="a", seed=1)
    h.attach(LoraConfig(targets=QV, bias="all"), name="b", seed=2)
    shake(h.parameters())
    names, alone = ["a", None, "b", "a"], []
    ids = torch.arange(24).reshape(4, 6) % 20
    with torch.no_grad():
        for i, name in enumerate(names):
            h.activate(name)
            alone.append(model(input_ids=ids[i : i + 1]).logits)
        h.activate(None)
        with h.rows(names):
            torch.testing.assert_close(model(input_ids=ids).logits, torch.cat(alone))


def test_a_base_on_meta():
    config = LoraConfig(targets=QV, modules_to_save=["lm_head"])
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(AdapterkitError, match="lm_head.* on the meta device"):
        attach(model, config)
    assert not [name for name, _ in model.named_modules() if "adapterkit" in name]


def test_files_arrive_before_their_base(tmp_path):
    make = MODELS["llama"]
    settings = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [1]}
    theirs = in_peft(make(), target_modules=QV, **settings).eval()
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()
    load(model, tmp_path)
    model.to_empty(device="cpu")
    base = make()
    model.load_state_dict(base.state_dict())
    model.model.rotary_emb = base.model.rotary_emb
    torch.testing.assert_close(logits(model), logits(theirs))


def test_copies_are_trained_through_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = MODELS["llama"]().train()
        settings = {"modules_to_save": ["0.mlp", "lm_head"], "bias": "all"}
        h = attach(model, LoraConfig(targets=QV, trainable_tokens=[1, 2], **settings), seed=1)
        shake(h.parameters())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients(model, logits)
        grads.append([parameter.grad for parameter in h.parameters()])
        assert all(grad is not None for grad in grads[-1])
    torch.testing.assert_close(grads[0], grads[1])


def test_trained_values_compile():
    model = MODELS["llama"]().eval()
    settings = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_tokens": [1, 2]}
    h = attach(model, LoraConfig(targets=QV, **settings), seed=1)
    shake(h.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(compiled), logits(model))


def test_a_sequence_keeps_its_steps():
    model = seeded(Small)().eval().requires_grad_(False)  # so that torch's layers are fused
    steps, y = list(model.tail), rows_of_small(model)
    h = attach(model, LoraConfig(targets=["linear1"], modules_to_save=["tail"]), seed=1)
    assert list(model.tail) == steps and len(model.tail) == 3 and model.tail[-1] is steps[-1]
    assert len(list(h.parameters())) == 2 + 6
    assert set(h.parameters()) <= set(model.tail.parameters()) | set(model.mix.parameters())
    shake(h.parameters())
    assert not torch.allclose(rows_of_small(model), y)
    with h.disabled():
        assert torch.equal(rows_of_small(model), y)
    check_merging(h, rows_of_small)
    h.detach()
    assert torch.equal(rows_of_small(model), y) and list(model.tail.named_children())[2][0] == "2"


def edited(folder, change) -> None:
    """Change an adapter's tensors and config."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


HEAD = "base_model.model.classifier.weight"


def without_head(tensors, config):
    del tensors[HEAD]


def without_any_head(tensors, config):
    del tensors[HEAD], tensors["base_model.model.classifier.bias"]
    config["modules_to_save"] = None


def with_another_size(tensors, config):
    tensors[HEAD] = torch.zeros(3, 16)


def with_more(tensors, config):
    tensors["base_model.model.classifier.extra"] = torch.zeros(3)


def with_another_bias(tensors, config):
    config["bias"] = "all"
    tensors["base_model.model.bert.pooler.activation.bias"] = torch.zeros(3)


@pytest.mark.parametrize("change, word", [
    (without_head, "no values of classifier.weight"),
    (without_any_head, "no values of classifier, the head of a SEQ_CLS model"),
    (with_another_size, r"classifier.weight with shape \(3, 16\)"),
    (with_more, "values of classifier.extra"),
    (with_another_bias, "values of bert.pooler.activation.bias"),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_files_that_do_not_fit(change, word, tmp_path):
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    in_peft(MODELS["bert_cls"](), **settings).save_pretrained(tmp_path)
    edited(tmp_path, change)
    model = MODELS["bert_cls"]().eval()
    y = logits(model)
    with pytest.raises(AdapterkitError, match=word):
        load(model, tmp_path)
    assert torch.equal(logits(model), y)
    assert not [name for name, _ in model.named_modules() if "adapterkit" in name]


def test_a_head_that_the_model_lacks(tmp_path):
    settings = {"target_modules": QV, "task_type": "SEQ_CLS"}
    in_peft(MODELS["llama_cls"](), **settings).save_pretrained(tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(AdapterkitError, match="class with this head"):
        load(model, tmp_path)


def test_trained_values_come_back_in_a_new_process_and_under_new_names(tmp_path):
    """What two adapters on one model save is what each of them has."""
    model = MODELS["llama"]().eval()
    h = attach(model, LoraConfig(targets=QV, modules_to_save=["norm"]), name="a.b", seed=1)
    h.attach(LoraConfig(targets=QV, bias="all", trainable_tokens=[3]), name="c", seed=2)
    shake(h.parameters())
    results = []
    for name in ("a.b", "c"):
        h.activate(name)
        results.append(logits(model))
        h.save(tmp_path / name)
    h.detach()
    for name, y in zip(("a.b", "c"), results, strict=True):
        h = load(model, tmp_path / name, name="x")
        assert torch.equal(logits(model), y)
        theirs = peft.PeftModel.from_pretrained(MODELS["llama"](), tmp_path / name).eval()
        torch.testing.assert_close(logits(theirs), y)
        h.detach()


def test_a_checkpoint_gives_all_values_back(tmp_path):
    config = LoraConfig(targets=QV, modules_to_save=["norm"], bias="all", trainable_tokens=[3, 1])
    h = attach(MODELS["llama"]().eval(), config, seed=1)
    shake(h.parameters())
    h.save(tmp_path)
    other = attach(MODELS["llama"]().eval(), config, seed=2)
    parameters = list(other.parameters())
    restore(other.state, tmp_path)
    assert torch.equal(logits(other.model), logits(h.model))
    assert list(other.parameters()) == parameters


class Bare(nn.Module):
    """Two norms, one of them without weights."""

    def __init__(self):
        super().__init__()
        self.up, self.first_norm = nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)
        self.down, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.down(self.first_norm(self.up(x))))


@pytest.mark.parametrize("entries", [["first_norm"], ["first_norm", "norm"], ["norm"]], ids=str)
def test_a_norm_without_weights(entries, tmp_path):
    """PEFT copies it too; a file has nothing of it."""
    net, x = seeded(Bare)(), torch.randn(3, 4)
    adapters = attach(net, LoraConfig(2, 2, ["up"], modules_to_save=entries), seed=0)
    shake(adapters.parameters())
    y = net(x)
    adapters.save(tmp_path)
    assert torch.equal(load(seeded(Bare)(), tmp_path).model(x), y)
    theirs = peft.PeftModel.from_pretrained(seeded(Bare)(), tmp_path)
    torch.testing.assert_close(theirs(x), y)


def test_short_names_of_modules_trained_in_full_are_pefts(tmp_path):
    """In memory, in files and back: "norm" means each module whose name ends with it."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "up_proj"]}
    own = attach(llama(), settings, seed=0)
    shake(own.parameters())
    y = own.model(tokens()).logits
    own.save(tmp_path / "own")
    trained = {key for key in oracle.stored(tmp_path / "own") if "lora_" not in key}
    oracle.train(llama(), tmp_path / "theirs", **settings)
    theirs = {key for key in oracle.stored(tmp_path / "theirs") if "lora_" not in key}
    assert trained == theirs
    assert len({key.rpartition(".")[0].rpartition(".")[2] for key in trained}) > 3
    torch.testing.assert_close(peft_of(tmp_path / "own", llama())(tokens()).logits, y)
    adapterkit.merge(tmp_path / "base", tmp_path / "own", out=tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(tokens()).logits, y)


def test_values_of_parameters_that_an_extraction_names_are_saved_again(tmp_path):
    """Of a norm by whose name PEFT would mean others, too."""
    base, tuned = llama().model, llama().model
    with torch.no_grad():
        tuned.norm.weight += 0.5
        tuned.layers[0].self_attn.q_proj.weight += 0.5
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    adapterkit.extract(tmp_path / "base", tmp_path / "tuned", rank=1, out=tmp_path / "adapter")
    adapters = load(llama().model, tmp_path / "adapter")
    adapters.save(tmp_path / "again")
    adapterkit.merge(tmp_path / "base", tmp_path / "again", out=tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    expected = adapters.model(tokens()).last_hidden_state
    torch.testing.assert_close(merged(tokens()).last_hidden_state, expected)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(2, 2, ["up"], modules_to_save=["down"]), LoraConfig(2, 2, ["up"], bias="all")],
    ids=["copy", "bias"],
)
def test_no_merge_beneath_values_that_act(config):
    """What another adapter would merge into them, these would hide."""
    net, x = seeded(Bare)(), torch.randn(3, 4)
    adapters = attach(net, config, name="values", seed=0)
    adapters.attach(LoraConfig(2, 2, ["down"], lora_bias=True, init=False), name="factors", seed=1)
    shake(adapters.parameters())
    adapters.activate(["values", "factors"])
    y = net(x)
    with pytest.raises(AdapterkitError, match="replaces values of down"):
        adapters.merge("factors")
    assert torch.equal(net(x), y)
    adapters.merge()
    torch.testing.assert_close(net(x), y)
