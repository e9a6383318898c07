"""Values that the code around a module reads itself, and does not call the module for: what is
trained there acts as in PEFT, and what PEFT's factors cannot do there is refused."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
)

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support import oracle
from tests.support.beside_peft import WARNINGS, check_merging, compare, in_peft, shake

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]

DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
IDS = torch.arange(12).reshape(2, 6) + 1


class Fused(nn.Module):
    """As models of timm do, it multiplies by the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(24, 8)

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Fused()

    def forward(self, input_ids):
        return self.block(input_ids.float().cos()[..., None].expand(-1, -1, 8))


class Mapped(nn.Linear):
    """As JetMoE's experts, it is used by its methods, and never called."""

    def map(self, x):
        return F.linear(x, self.weight)

    def reduce(self, y):
        return y.tanh() + self.bias


class ByMethods(Net):
    def __init__(self):
        super().__init__()
        self.map, self.head = Mapped(8, 8), nn.Linear(8, 4)

    def forward(self, input_ids):
        return self.head(self.map.reduce(self.map.map(super().forward(input_ids))))


class Counted(nn.Embedding):
    """As ProphetNet's positions, it is called, and used by a method that calls the forward."""

    def forward(self, x):
        return self.other(x)

    def other(self, x):
        return super().forward(x)


class ByForward(Net):
    def __init__(self):
        super().__init__()
        self.places, self.head = Counted(40, 8), nn.Linear(8, 4)

    def forward(self, input_ids):
        y = super().forward(input_ids) + self.places(input_ids) + self.places.other(input_ids + 1)
        return self.head(y)


def mamba() -> nn.Module:
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "use_mambapy": False}
    return MambaForCausalLM(MambaConfig(vocab_size=40, **sizes))


def bamba() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_indices": [1]}
    states = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    return BambaForCausalLM(BambaConfig(vocab_size=40, **sizes, **heads, **states))


def mobilebert() -> nn.Module:
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24}
    inner = {"num_hidden_layers": 1, "num_attention_heads": 2, "intra_bottleneck_size": 8}
    config = MobileBertConfig(
        vocab_size=40, **sizes, **inner, true_hidden_size=8, **dict.fromkeys(DROPOUT, 0.0)
    )
    return MobileBertForMaskedLM(config)


def seeded(make):
    def made():
        torch.manual_seed(0)
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, 0.0, 0.3)
        return model

    return made


def run(model: nn.Module) -> torch.Tensor:
    output = model(input_ids=IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


CASES = {
    "biases of Mamba": (mamba, {"target_modules": ["in_proj"], "bias": "all"}),
    "a convolution of Mamba": (
        mamba,
        {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]},
    ),
    "what Bamba does not call": (
        bamba,
        {"target_modules": ["o_proj"], "modules_to_save": ["conv1d"], "bias": "all"},
    ),
    "MobileBERT's decoder": (
        mobilebert,
        {"target_modules": ["query"], "modules_to_save": ["predictions.decoder"]},
    ),
    "biases of MobileBERT": (mobilebert, {"target_modules": ["query"], "bias": "all"}),
    "biases of any module": (Net, {"target_modules": ["out"], "bias": "all"}),
    "biases of a module with methods": (ByMethods, {"target_modules": ["out"], "bias": "all"}),
    "a module with methods": (ByMethods, {"target_modules": ["out"], "modules_to_save": ["map"]}),
    "a module whose method calls its forward": (
        ByForward,
        {"target_modules": ["out"], "modules_to_save": ["places"]},
    ),
    "any module": (Net, {"target_modules": ["out"], "modules_to_save": ["qkv"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_that_their_parents_read_equal_peft(case, tmp_path):
    """Outputs, gradients, training, files and merging."""
    make, settings = CASES[case]
    _, adapters = compare(seeded(make), run, tmp_path, steps=1, **settings)
    check_merging(adapters, run)


def test_rows_of_a_tied_head_that_is_not_called():
    """They are the embedding's alone; in PEFT such a model has no forward."""
    config = LoraConfig(2, 4, ["query"], trainable_tokens={"word_embeddings": [2, 5]}, init=False)
    adapters = attach(seeded(mobilebert)(), config)
    shake(adapters.parameters())
    check_merging(adapters, run)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["conv1d"]}])
def test_generation_with_directly_read_weights_equals_peft(settings, tmp_path):
    """Mamba's cached step reads the convolution another way."""
    theirs = in_peft(seeded(mamba)(), target_modules=["in_proj"], **settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(seeded(mamba)().eval(), tmp_path).model
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected = theirs.generate(input_ids=IDS, **options).logits
    torch.testing.assert_close(ours.generate(IDS, **options).logits, expected)
    base = seeded(mamba)().eval().generate(IDS, **options).logits
    assert not torch.allclose(base[-1], expected[-1], atol=1e-3)


IGNORED = {
    "any module": (Net, "qkv"),
    "MobileBERT": (mobilebert, "predictions.decoder"),
    "Mamba's time step": (mamba, "dt_proj"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_factors_that_would_do_nothing(case, tmp_path):
    """`attach` and `load` refuse them by one rule; those that PEFT's training left as they were are
    read."""
    make, target = IGNORED[case]
    with pytest.raises(AdapterkitError, match="is read by .*, not by its forward"):
        attach(seeded(make)(), LoraConfig(2, 4, [target]))
    if case == "MobileBERT":
        with pytest.raises(AdapterkitError, match="is read by .*, not by its forward"):
            attach(seeded(make)(), LoraConfig(2, 4, ["query"], trainable_tokens={target: [1]}))
    with pytest.raises(AdapterkitError, match="is read by .*, not by its forward"):
        attach(seeded(make)(), LoraConfig(2, 4, [], parameters=[f"{target}.weight"]))
    theirs = peft.get_peft_model(seeded(make)(), peft.LoraConfig(target_modules=[target]))
    theirs.save_pretrained(tmp_path)
    model = seeded(make)()
    torch.testing.assert_close(run(load(model, tmp_path).model), run(seeded(make)()))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    model = seeded(make)()
    with pytest.raises(AdapterkitError, match="factors that do nothing: .* is read by"):
        load(model, tmp_path)
    assert torch.equal(run(model), run(seeded(make)()))


def test_files_are_merged_by_the_same_rule(tmp_path):
    """The factors of a layer that PEFT passes by would act in merged files alone."""
    seeded(mobilebert)().save_pretrained(tmp_path / "base")
    targets = ["predictions.decoder", "query"]
    theirs = peft.get_peft_model(seeded(mobilebert)(), peft.LoraConfig(target_modules=targets))
    theirs.save_pretrained(tmp_path / "zero")
    adapterkit.merge(tmp_path / "base", tmp_path / "zero", out=tmp_path / "unchanged")
    in_peft(seeded(mobilebert)(), target_modules=targets).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterkitError, match="MobileBertLMPredictionHead reads itself") as refused:
        adapterkit.merge(tmp_path / "base", tmp_path / "a", out=tmp_path / "out")
    assert '--exclude "decoder"' in str(refused.value)
    adapterkit.merge(tmp_path / "base", tmp_path / "a", out=tmp_path / "out", exclude="decoder")
    merged = MobileBertForMaskedLM.from_pretrained(tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(seeded(mobilebert)(), tmp_path / "a").eval()
    torch.testing.assert_close(run(merged.eval()), run(theirs))


def test_rows_without_a_cache(tmp_path):
    """Each row has its convolution; a cache of all rows is refused, as it would hold those of one
    adapter."""
    settings = {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]}
    for seed, name in enumerate("ab"):
        in_peft(seeded(mamba)(), seed=seed, **settings).save_pretrained(tmp_path / name)
    adapters = load(seeded(mamba)().eval(), tmp_path / "a", name="a")
    adapters.load(tmp_path / "b", name="b")
    model = adapters.model
    with torch.no_grad():
        with adapters.rows(["a", "b"]):
            mixed = model(IDS, use_cache=False).logits
            with pytest.raises(AdapterkitError, match="a cache"):
                model(IDS, use_cache=True)
        for row, name in enumerate("ab"):
            adapters.activate(name)
            torch.testing.assert_close(mixed[row], model(IDS).logits[row])


class Hidden(nn.Module):
    """It multiplies by the weight of a layer as no look at its code shows, and drops an output."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        layers = dict(self.named_children())
        self.v(x)
        return F.linear(self.q(x), layers["k"].weight)


NAMED = {
    "call": r"not called in the model's first call, .*: k\n",
    "step": r"without a gradient at the first step: v\n",
}


def test_modules_without_gradients_are_warned_of_in_a_run():
    """A warning names the modules, once each; with `strict` it is an error."""
    adapters = attach(model := Hidden(), LoraConfig(2, 4, ["q", "k", "v"]))
    optimizer = torch.optim.SGD(adapters.parameters(), 0.1)
    with pytest.warns(UserWarning, match=NAMED["call"]):
        y = model(torch.ones(1, 4))
    y.sum().backward()
    with pytest.warns(UserWarning, match=NAMED["step"]):
        optimizer.step()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    adapters.detach()
    adapters = attach(model, LoraConfig(2, 4, ["k"]), strict=True)
    with pytest.raises(AdapterkitError, match=NAMED["call"]):
        model(torch.ones(1, 4))
    adapters.detach()
    adapters = attach(model, LoraConfig(2, 4, ["q", "v"]), strict=True)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(AdapterkitError, match=NAMED["step"]):
        torch.optim.SGD(adapters.parameters(), 0.1).step()


def test_a_loaded_adapter_may_be_strict(tmp_path):
    adapters = attach(model := Hidden(), LoraConfig(2, 4, ["k"]))
    adapters.save(tmp_path)
    adapters.detach()
    load(model, tmp_path, strict=True)
    with pytest.raises(AdapterkitError, match=NAMED["call"]):
        model(torch.ones(1, 4))


def test_biases_that_only_a_run_shows():
    adapters = attach(model := Hidden(), LoraConfig(2, 4, ["q"], bias="all"))
    with pytest.warns(UserWarning, match=NAMED["call"]):
        model(torch.ones(1, 4))
    adapters.detach()


def test_an_optimizer_that_computes_the_gradients_itself():
    adapters = attach(model := Net(), LoraConfig(2, 4, ["out"]), strict=True)

    def loss():
        y = run(model).square().sum()
        y.backward()
        return y

    torch.optim.LBFGS(adapters.parameters(), max_iter=2).step(loss)


def test_an_adapter_that_does_not_act_is_not_judged():
    adapters = attach(model := Hidden(), LoraConfig(2, 4, ["k"]), name="a")
    adapters.activate(None)
    model(torch.ones(1, 4))
    adapters.activate("a")
    with pytest.warns(UserWarning, match=NAMED["call"]):
        model(torch.ones(1, 4))


@pytest.mark.parametrize("kind", ["opt", "bart"])
def test_embeddings_with_a_forward_of_their_own(kind, tmp_path):
    """PEFT's factors and rows act after what is looked up by the ids of texts, a merged weight
    before, by positions."""
    build = {"opt": oracle.opt, "bart": bart}[kind]
    with pytest.raises(AdapterkitError, match="PositionalEmbedding, with a forward of its own"):
        attach(build(), LoraConfig(2, 4, ["embed_positions"]))
    with pytest.raises(AdapterkitError, match="PositionalEmbedding, with a forward of its own"):
        config = LoraConfig(2, 4, ["q_proj"], trainable_tokens={"embed_positions": [1]})
        attach(build(), config)
    build().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "embed_positions"]}
    in_peft(build(), **settings).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterkitError, match="PositionalEmbedding, with a forward of its own"):
        load(build(), tmp_path / "a")
    with pytest.raises(AdapterkitError, match="PositionalEmbedding with a forward of its own"):
        adapterkit.merge(tmp_path / "base", tmp_path / "a", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bart() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **layers, **heads, max_position_embeddings=32)
    return BartForConditionalGeneration(config)
