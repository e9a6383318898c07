"""Trained token rows on live models: embeddings, the heads tied to them, scaled embeddings."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
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

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]

IDS = torch.tensor([[1, 2, 3, 4, 0], [5, 3, 1, 3, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return model(input_ids=IDS).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        return make()

    return made


MODELS = {
    "llama": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES))),
    "tied": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))),
    "gemma3": seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8))),
    "gpt2": seeded(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                       embd_pdrop=0.0, attn_pdrop=0.0)
        )
    ),
    "t5": seeded(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                     dropout_rate=0.0, decoder_start_token_id=0)
        )
    ),
    "bert": seeded(
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                       num_attention_heads=2, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)
        )
    ),
}  # fmt: skip
Q = ["q_proj"]
CASES = {
    "list": ("llama", {"target_modules": Q, "trainable_token_indices": [3, 1]}),
    "names": ("llama", {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [5, 3]}}),
    "two": (
        "llama",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [4, 1, 2]},
        },
    ),
    "padding": ("llama", {"target_modules": Q, "trainable_token_indices": [0, 3]}),
    "tied": ("tied", {"target_modules": Q, "trainable_token_indices": [3, 1]}),
    "tied, said": (
        "tied",
        {"target_modules": Q, "trainable_token_indices": [3, 1], "ensure_weight_tying": True},
    ),
    "tied, the same": (
        "tied",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]},
        },
    ),
    "tied, different": (
        "tied",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 4]},
        },
    ),
    "tied, head": ("tied", {"target_modules": Q, "trainable_token_indices": {"lm_head": [1, 4]}}),
    "LoRA on the head": (
        "tied",
        {"target_modules": [*Q, "lm_head"], "trainable_token_indices": [1, 4]},
    ),
    "another head's copy": (
        "llama",
        {"target_modules": Q, "trainable_token_indices": [1, 4], "modules_to_save": ["lm_head"]},
    ),
    "biases": ("tied", {"target_modules": Q, "trainable_token_indices": [1, 4], "bias": "all"}),
    "scaled": ("gemma3", {"target_modules": Q, "trainable_token_indices": [2, 3]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [2, 3]}),
    "t5": ("t5", {"target_modules": ["q"], "trainable_token_indices": [2, 3]}),
}


@pytest.mark.parametrize("case", CASES)
def test_trainable_tokens_equal_peft(case, tmp_path):
    model, settings = CASES[case]
    _, adapters = compare(MODELS[model], logits, tmp_path, r=4, **settings)
    check_merging(adapters, logits)


@pytest.mark.parametrize("model, tokens", [("tied", [2, 5]), ("llama", {"lm_head": [3, 1]})])
def test_a_new_adapter_starts_as_the_base_and_trains_as_in_peft(model, tokens, tmp_path):
    ours = MODELS[model]().train()
    y = logits(ours).detach()
    h = attach(ours, LoraConfig(targets=Q, trainable_tokens=tokens), seed=3)
    torch.testing.assert_close(logits(ours), y)
    assert len(list(h.parameters())) == len(set(h.parameters())) == 2 * 2 + 1
    h.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path, is_trainable=True).train()
    optimizers = [torch.optim.AdamW(trained(each), lr=0.01) for each in (theirs, ours)]
    for _ in range(4):
        torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), y)


def dense(model: nn.Module, rows: dict[str, tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    """Logits of a model whose weights have these rows."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, (indices, values) in rows.items():
            model.get_parameter(name)[indices] = values
    return logits(model)


def test_the_bias_of_a_head_is_kept(tmp_path):
    """PEFT drops it."""
    base = MODELS["bert"]().eval()
    nn.init.normal_(base.cls.predictions.bias)
    h = attach(copy.deepcopy(base), LoraConfig(targets=["query"], trainable_tokens=[4, 2]), seed=1)
    rows = torch.randn(2, 16)
    part = h.state.sites["bert.embeddings.word_embeddings"].patches["default"]["tokens"]
    with torch.no_grad():
        part.rows.copy_(rows)
    weight = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(logits(h.model), dense(base, {weight: ([4, 2], rows)}))
    check_merging(h, logits)
    h.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not torch.allclose(logits(theirs), logits(h.model), atol=0.1)


@pytest.mark.parametrize("model", ["llama", "tied", "gemma3"])
def test_factors_add_to_trained_rows(model, tmp_path):
    """PEFT refuses LoRA and rows on one embedding. The rows are inside: W' + scale·b·a."""
    base = MODELS[model]().eval()
    config = LoraConfig(targets=["q_proj", "embed_tokens"], trainable_tokens=[4, 2])
    h = attach(copy.deepcopy(base), config, seed=1)
    parts = h.state.sites["model.embed_tokens"].patches["default"]
    rows = torch.randn(2, 16)
    with torch.no_grad():
        parts["tokens"].rows.copy_(rows)
        parts["delta"].a.normal_()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        expected.lm_head.weight = nn.Parameter(expected.lm_head.weight.clone())
        for module in (expected.model.embed_tokens, expected.lm_head)[: 1 + (model != "llama")]:
            module.weight[[4, 2]] = rows
        expected.model.embed_tokens.weight += parts["delta"].delta()
    torch.testing.assert_close(logits(h.model), logits(expected))
    check_merging(h, logits)
    h.save(tmp_path)
    torch.testing.assert_close(logits(load(copy.deepcopy(base), tmp_path).model), logits(h.model))
    with pytest.raises(TypeError):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_rows_of_several_adapters():
    base = MODELS["tied"]().eval()
    h = attach(copy.deepcopy(base), LoraConfig(targets=Q, trainable_tokens=[4, 2]), name="a")
    h.attach(LoraConfig(targets=Q, trainable_tokens=[3]), name="b")
    h.attach(LoraConfig(targets=Q, trainable_tokens=[2, 3]), name="c")
    table = {}
    for name, indices in (("a", [4, 2]), ("b", [3]), ("c", [2, 3])):
        part = h.state.sites["model.embed_tokens"].patches[name]["tokens"]
        nn.init.normal_(part.rows)
        table[name] = indices, part.rows.detach()
    h.activate(["a", "b"])
    both = [4, 2, 3], torch.cat([table["a"][1], table["b"][1]])
    expected = dense(base, {"model.embed_tokens.weight": both})
    torch.testing.assert_close(logits(h.model), expected)
    check_merging(h, logits)
    for names, word in ((["a", "c"], r"rows of tokens \[2\]"), ("bc", r"rows of tokens \[3\]")):
        with pytest.raises(AdapterkitError, match=word):
            h.activate(list(names))
        assert h.active == {"a": 1.0, "b": 1.0}
    h.activate(None)
    with torch.no_grad(), h.rows(["c", None]):
        y = logits(h.model)
    torch.testing.assert_close(y[1], logits(base)[1])
    torch.testing.assert_close(y[0], dense(base, {"model.embed_tokens.weight": table["c"]})[0])


class LargestTensor(TorchDispatchMode):
    """The most elements of a result with memory of its own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "t." not in str(func):
            self.count = max(self.count, result.numel())
        return result


def test_no_step_copies_the_weight():
    size = {**SIZES, "vocab_size": 3000}
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)).train()
    attach(model, LoraConfig(targets=Q, trainable_tokens=[4, 2]))
    with LargestTensor() as largest:
        logits(model).square().mean().backward()
    assert largest.count == 2 * 5 * 3000 < 3000 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_small_dtype(dtype, tmp_path):
    def make():
        return MODELS["gemma3"]().to(dtype)

    theirs = in_peft(make(), target_modules=Q, trainable_token_indices=[4, 2]).eval()
    theirs.save_pretrained(tmp_path)
    h = load(make().eval(), tmp_path)
    part = h.state.sites["model.embed_tokens"].patches["default"]["tokens"]
    assert part.rows.dtype == torch.float32
    torch.testing.assert_close(logits(h.model), logits(theirs))


@pytest.mark.parametrize("model, config, word", [
    ("llama", {"trainable_tokens": [3, 20, 21]}, r"no rows \[20, 21\]"),
    ("llama", {"trainable_tokens": {"embed_token": [3]}}, "embed_token"),
    ("llama", {"trainable_tokens": [3], "modules_to_save": ["embed_tokens"]}, "fully trained"),
    (
        "tied",
        {"trainable_tokens": {"embed_tokens": [1, 3], "lm_head": [1, 4]}, "tie": True},
        "the same rows",
    ),
], ids=str)  # fmt: skip
def test_rows_that_cannot_be_trained(model, config, word):
    model = MODELS[model]()
    with pytest.raises(AdapterkitError, match=word):
        attach(model, LoraConfig(targets=Q, **config))
    assert not [name for name, _ in model.named_modules() if "adapterkit" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def base(tied, tmp_path):
    MODELS["tied" if tied else "llama"]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base, size: int, seed: int = 0) -> nn.Module:
    """The base with a vocabulary of another size, its new rows drawn from a seed."""
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


NEW = torch.tensor([[1, 21, 22, 3], [23, 2, 20, 20]])


def new_logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=NEW).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [[20, 21, 22, 23], [22, 3], {"embed_tokens": [22, 3]}])
def test_added_tokens_go_both_ways(base, tied, tokens, tmp_path):
    """Files hold the resized embeddings too, whose rows replace those of another resize."""
    theirs = in_peft(resized(base, 24, 1), target_modules=Q, trainable_token_indices=tokens).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    h = load(resized(base, 24, 2), tmp_path / "theirs")
    torch.testing.assert_close(new_logits(h.model), new_logits(theirs))
    check_merging(h, new_logits)
    adapterkit.merge(base, tmp_path / "theirs", out=tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(new_logits(merged), new_logits(theirs))
    h.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(resized(base, 24, 3), tmp_path / "ours").eval()
    torch.testing.assert_close(new_logits(again), new_logits(theirs))
    own = attach(resized(base, 24, 4), LoraConfig(targets=Q, trainable_tokens=tokens), seed=1)
    shake(own.parameters())
    own.save(tmp_path / "new")
    for model in (
        peft.PeftModel.from_pretrained(resized(base, 24, 5), tmp_path / "new").eval(),
        load(resized(base, 24, 5), tmp_path / "new").model,
    ):
        torch.testing.assert_close(new_logits(model), new_logits(own.model))
    for size in (20, 28):
        model = resized(base, size, 2)
        with pytest.raises(AdapterkitError, match=r"resize_token_embeddings\(24\)"):
            load(model, tmp_path / "theirs")
        assert not [name for name, _ in model.named_modules() if "adapterkit" in name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_weights_of_the_base_in_files(base, tied, targets, tmp_path):
    """PEFT writes the whole embedding beside its factors. The base's own is no copy; another one
    acts in the base's place, and is not trained."""
    theirs = in_peft(resized(base, 20, 0), target_modules=targets).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    h = load(resized(base, 20, 0), tmp_path / "theirs")
    assert not [part for _, part in h.state.adapters["default"].patches() if part.replaces]
    torch.testing.assert_close(logits(h.model), logits(theirs))
    other = resized(base, 20, 0)
    shake([other.model.embed_tokens.weight, *([] if tied else [other.lm_head.weight])])
    plain = copy.deepcopy(other)
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "theirs").eval()
    before = logits(other)
    h = load(other, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(logits(h.model), logits(expected))
    assert not [p for p in h.parameters() if p.shape == (20, 16)]
    with h.disabled():
        assert torch.equal(logits(h.model), before)
    h.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(expected))
